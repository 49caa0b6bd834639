"""Backends that run sdpa under another name, for tests that need one that misbehaves, or one for torch.compile."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from nsa_routing import OPS
from nsa_varlen import BlockGeometry, VarlenLayout, unfold_blocks
from nsa_varlen.sdpa import BACKEND
from torch import Tensor


class Delegate:
    """sdpa under another name. `spoil[op]` takes what an op returns, or raises, and gives what the caller gets."""

    def __init__(self, name: str, **spoil: Callable[[Any], Any]) -> None:
        self.name = name
        self.uses_triton = name == "triton"
        self.spoil = spoil
        self.ran: list[str] = []

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        return BACKEND.refuse(op, problem, environment)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in OPS:
            raise AttributeError(op)
        return partial(self._run, op)

    def _run(self, op: str, *args: Any, **options: Any) -> Any:
        self.ran.append(op)
        result = getattr(BACKEND, op)(*args, **options)
        return self.spoil[op](result) if op in self.spoil else result


SIZES = [field.name for field in fields(BlockGeometry)]


class Opaque(Delegate):
    """sdpa behind operators of torch.library, forward and backward: nothing for torch.compile to break its graph at."""

    def _run(self, op: str, *args: Any, scale: float | None = None, deterministic: bool | None = None) -> Any:
        if op == "combine":
            return BACKEND.combine(*args)
        *tensors, layout, blocks = args
        offsets = layout.cu_seqlens_q, layout.cu_seqlens_k
        if op == "compress_mean":
            return unfold_blocks(*tensors, layout, blocks).mean(1)
        sizes = [getattr(blocks, name) for name in SIZES]
        scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
        if op == "select_blocks":
            return torch.ops.nsa_opaque.select_blocks(*tensors, *offsets, sizes, scale)
        q, k, v, *indices = tensors
        return torch.ops.nsa_opaque.attend(op, q, k, v, *(indices or [None]), *offsets, sizes, scale)


@torch.library.custom_op("nsa_opaque::select_blocks", mutates_args=())
def _select(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, sizes: list[int], scale: float
) -> Tensor:
    layout = VarlenLayout.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    return BACKEND.select_blocks(q, k, lse, layout, BlockGeometry(*sizes), scale=scale)


@_select.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, sizes: list[int], scale: float) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[1], sizes[SIZES.index("topk")], dtype=torch.int32)


@torch.library.custom_op("nsa_opaque::attend", mutates_args=())
def _attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sizes: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _by_sdpa(op, q, k, v, indices, cu_seqlens_q, cu_seqlens_k, sizes, scale)


def _by_sdpa(op: str, *args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, indices, cu_seqlens_q, cu_seqlens_k, sizes, scale = args
    layout = VarlenLayout.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    listed = () if indices is None else (indices,)
    out, lse = getattr(BACKEND, op)(q, k, v, *listed, layout, BlockGeometry(*sizes), scale=scale)
    return out, lse


@_attend.register_fake
def _(op: str, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("nsa_opaque::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sizes: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out, _ = _by_sdpa(op, *leaves, indices, cu_seqlens_q, cu_seqlens_k, sizes, scale)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    return dq, dk, dv


@_attend_backward.register_fake
def _(grad: Tensor, op: str, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _note(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    op, *tensors, sizes, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = op, sizes, scale
    ctx.mark_non_differentiable(output[1])


def _pass_back(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    op, sizes, scale = ctx.options
    return None, *torch.ops.nsa_opaque.attend_backward(grad, op, *ctx.saved_tensors, sizes, scale), *[None] * 5


_attend.register_autograd(_pass_back, setup_context=_note)


class Point:
    """An entry point that holds its object."""

    def __init__(self, held: Any) -> None:
        self.name, self.value, self.held = held.name, f"made:{held.name}", held

    def load(self) -> Any:
        return self.held
