"""What callers do between a forward and its backward, and to what it returned."""

import pytest
import torch
from nsa_fa2.testing import plain_backend
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import random_inputs
from torch import Tensor

OPS = ["compressed_attention", "selected_attention", "window_attention"]
BLOCKS = BlockGeometry(4, 2, 4, 3, window_size=3)
NEXT = torch.tensor([0, 6, 30], dtype=torch.int32)  # the next batch's offsets


def arguments(op: str, layout: VarlenLayout, **sizes: int) -> tuple[list[Tensor], tuple]:
    q, k, v, _ = random_inputs(layout, **sizes)
    if op == "compressed_attention":
        k, v = (x[: layout.compressed(BLOCKS).total] for x in (k, v))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    blocks = torch.tensor([1, 0, 2], dtype=torch.int32).expand(layout.total_q, k.shape[1], 3)
    return leaves, (blocks, layout, BLOCKS) if op == "selected_attention" else (layout, BLOCKS)


@pytest.mark.parametrize("few", [True, False], ids=["few-queries", "prefill"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [plain_backend(), BACKEND], ids=lambda backend: backend.name)
def test_the_callers_offsets_may_hold_the_next_batch_by_the_backward(backend: object, op: str, few: bool) -> None:
    def gradients(overwrite: bool) -> list[Tensor]:
        cu_k = torch.tensor([0, 13, 30], dtype=torch.int32)
        cu_q = torch.tensor([0, 1, 3], dtype=torch.int32) if few else cu_k.clone()
        leaves, rest = arguments(op, VarlenLayout.from_cu_seqlens(cu_q, cu_k))
        out, _ = getattr(backend, op)(*leaves, *rest)
        if overwrite:
            cu_k.copy_(NEXT)
            cu_q.copy_(NEXT.clamp_max(3) if few else NEXT)
        out.sum().backward()
        return [x.grad for x in leaves]

    assert all(torch.equal(x, y) for x, y in zip(gradients(False), gradients(True), strict=True))


@pytest.mark.parametrize("lengths", [[30], [10, 10], [7, 12]], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_are_the_callers_to_write_into(op: str, lengths: list[int]) -> None:
    leaves, rest = arguments(op, VarlenLayout.from_lengths(lengths), head_dim=8, v_head_dim=6)
    out, lse = getattr(plain_backend(), op)(*leaves, *rest)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    lse.exp_()
    assert all(torch.equal(x, y) for x, y in zip(expected, torch.autograd.grad(out.sum(), leaves), strict=True))
    gate = torch.ones((), dtype=out.dtype, requires_grad=True)
    with_frozen, _ = getattr(plain_backend(), op)(*(x.detach() for x in leaves), *rest)
    with_frozen.mul_(gate).sum().backward()
    assert gate.grad is not None


@pytest.mark.parametrize("op", OPS)
def test_a_decode_step_with_an_idle_sequence(op: str) -> None:
    """A longest sequence of one query must not say that every sequence has one: `Segments` says why."""
    layout = VarlenLayout.from_lengths([1, 0, 1], [9, 7, 5])
    leaves, rest = arguments(op, layout, heads=4, kv_heads=1)
    wide = (BlockGeometry(4, 2, 4, 3, window_size=32),) if op == "window_attention" else rest[-1:]
    out, _ = getattr(plain_backend(), op)(*leaves, *rest[:-1], *wide)
    expected, _ = getattr(BACKEND, op)(*leaves, *rest[:-1], *wide)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
