"""Attention over compressed blocks and over a window: two cases of one kernel, see `kernels.interval`."""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.ops.attention_gradients import interval_attention_backward
from nsa_kernels_triton.ops.descriptors import kv_tiles
from nsa_kernels_triton.ops.gradients import keep
from nsa_kernels_triton.ops.launching import on_device, rows
from nsa_kernels_triton.tiles import LOG2_E, count_tiles, pieces, row_bytes


@torch.library.custom_op("nsa_kernels_triton::compressed_attention", mutates_args=())
@on_device
def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_compressed: Tensor,
    kernel_size: int,
    kernel_stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, Dk], k_cmp [Tc, Hk, Dk], v_cmp [Tc, Hk, Dv] -> out [Tq, Hq, Dv], lse [Hq, Tq].

    See `TritonBackend.compressed_attention`.
    """
    sizes = {"KERNEL_SIZE": kernel_size, "KERNEL_STRIDE": kernel_stride}
    offsets = cu_seqlens_q, cu_seqlens_k, cu_compressed
    return _attend("compressed_attention", q, k_cmp, v_cmp, offsets, 1, scale, sizes)


@torch.library.custom_op("nsa_kernels_triton::window_attention", mutates_args=())
@on_device
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, Dk], k [Tk, Hk, Dk], v [Tk, Hk, Dv] -> out [Tq, Hq, Dv], lse [Hq, Tq].

    See `TritonBackend.window_attention`.
    """
    sizes = {"KERNEL_SIZE": 1, "KERNEL_STRIDE": 1}
    offsets = cu_seqlens_q, cu_seqlens_k, None
    return _attend("window_attention", q, k, v, offsets, _within(window_size, k), scale, sizes)


@compressed_attention.register_fake
def _(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_compressed: Tensor,
    kernel_size: int,
    kernel_stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _results(q, v_cmp)


@window_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _results(q, v)


def _keep_compressed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *offsets, kernel_size, kernel_stride, scale = inputs
    keep(ctx, (q, k, v), output, *offsets)
    ctx.rest = kernel_size, kernel_stride, 1, scale


def _keep_window(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *offsets, window_size, scale = inputs
    keep(ctx, (q, k, v), output, *offsets, None)
    ctx.rest = 1, 1, _within(window_size, k), scale


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = interval_attention_backward(grad_out, *ctx.saved_tensors, *ctx.rest)
    return *found, *[None] * (len(ctx.needs_input_grad) - len(found))


compressed_attention.register_autograd(_backward, setup_context=_keep_compressed)
window_attention.register_autograd(_backward, setup_context=_keep_window)


def _within(window_size: int, k: Tensor) -> int:
    """A window of all keys in place of a larger one: it fits int32."""
    return min(window_size, max(1, k.shape[0]))


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse), not yet written."""
    total_q, num_heads, _ = q.shape
    return q.new_empty(total_q, num_heads, v.shape[2]), q.new_empty(num_heads, total_q, dtype=torch.float32)


def _attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: tuple[Tensor, Tensor, Tensor | None],
    window_size: int,
    scale: float,
    sizes: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Launch `interval_attention_kernel` with the configuration `name`."""
    from nsa_kernels_triton.kernels.interval import interval_attention_kernel

    q, k, v = rows(q), rows(k), rows(v)
    out, lse = _results(q, v)
    if not lse.numel():
        return out, lse
    total_q, num_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = v.shape[1:]
    group_size = num_heads // num_kv_heads
    batch_size = offsets[0].shape[0] - 1
    config = launch(
        *(name, q.device),
        row_bytes=row_bytes(q, v),
        itemsize=q.element_size(),
        group_size=group_size,
        rows_per_sequence=-(-total_q // batch_size) * group_size,
    )
    grid = count_tiles(total_q, batch_size, config["rows"] // group_size), num_kv_heads
    interval_attention_kernel[grid](
        *(q, k, v, *kv_tiles(k, v, config["keys"], wanted=config["tma"]), out, lse, *offsets),
        *(batch_size, total_q, window_size, scale * LOG2_E),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        **sizes,
        GROUP=group_size,
        DIM=head_dim,
        V_DIM=v_head_dim,
        **dict(zip(("K0", "K1"), pieces(head_dim), strict=True)),
        **dict(zip(("V0", "V1"), pieces(v_head_dim), strict=True)),
        ROWS=config["rows"],
        KEYS=config["keys"],
        **config.options,
    )
    return out, lse
