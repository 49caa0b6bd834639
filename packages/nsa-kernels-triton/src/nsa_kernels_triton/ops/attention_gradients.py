"""Gradients of attention over compressed blocks and over a window: see `kernels.interval_gradients`."""

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.ops.descriptors import kv_tiles
from nsa_kernels_triton.ops.gradients import row_statistics, unwritten
from nsa_kernels_triton.ops.launching import num_processors, on_device, rows
from nsa_kernels_triton.tiles import LOG2_E, count_tiles, pieces, power_of_two, row_bytes

SPLITS = 1 << 30  # bytes for the sums of splits; those of one split may exceed it


@torch.library.custom_op("nsa_kernels_triton::interval_attention_backward", mutates_args=())
@on_device
def interval_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_compressed: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `compressed_attention`, or without `cu_compressed` of `window_attention`. Bitwise repeatable."""
    from nsa_kernels_triton.kernels.interval_gradients import interval_dkdv_kernel, interval_dq_kernel

    name = "window_attention" if cu_compressed is None else "compressed_attention"
    q, k, v, grad_out = rows(q), rows(k), rows(v), rows(grad_out)
    dq, dk, dv = unwritten(q, k, v)
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    total_q, num_heads, head_dim = q.shape
    total_k, num_kv_heads, v_head_dim = v.shape
    group_size, batch_size = num_heads // num_kv_heads, cu_seqlens_q.shape[0] - 1
    delta, lse_2 = row_statistics(out, grad_out, lse)
    case = {
        "row_bytes": row_bytes(q, v),
        "itemsize": q.element_size(),
        "group_size": group_size,
        "rows_per_sequence": -(-total_q // batch_size) * group_size,
    }
    rows_of = grad_out, lse_2, delta
    offsets = cu_seqlens_q, cu_seqlens_k, cu_compressed
    strides = [x.stride(i) for x in (q, k, v, grad_out) for i in (0, 1)]
    constants = {
        **{"KERNEL_SIZE": kernel_size, "KERNEL_STRIDE": kernel_stride},
        **{"GROUP": group_size, "DIM": head_dim, "V_DIM": v_head_dim},
        **dict(zip(("K0", "K1"), pieces(head_dim), strict=True)),
        **dict(zip(("V0", "V1"), pieces(v_head_dim), strict=True)),
    }

    config = launch(f"{name}_dq", q.device, **case)
    tile_rows = max(config["rows"], power_of_two(group_size))
    grid = count_tiles(total_q, batch_size, tile_rows // group_size), num_kv_heads
    interval_dq_kernel[grid](
        *(q, k, v, *kv_tiles(k, v, config["keys"], wanted=config["tma"]), *rows_of, dq, *offsets),
        *(batch_size, total_q, window_size, scale * LOG2_E, *strides),
        **constants,
        ROWS=tile_rows,
        KEYS=config["keys"],
        **config.options,
    )

    config = launch(f"{name}_dkdv", q.device, **case)
    tile_rows = max(config["rows"], power_of_two(group_size))
    tiles = count_tiles(total_k, batch_size, config["keys"])
    splits = _splits(q, k, v, cu_compressed is not None, tiles * num_kv_heads, config["programs"])
    sums_k, sums_v = dk, dv
    if splits > 1:
        sums_k, sums_v = (x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (k, v))
    interval_dkdv_kernel[tiles, num_kv_heads, splits](
        *(q, k, v, *rows_of, sums_k, sums_v, *offsets),
        *(batch_size, window_size, splits, k.numel(), v.numel(), scale * LOG2_E, *strides),
        **constants,
        ROWS=tile_rows,
        KEYS=config["keys"],
        **config.options,
    )
    if splits > 1:
        dk.copy_(sums_k.sum(0))
        dv.copy_(sums_v.sum(0))
    return dq, dk, dv


@interval_attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_compressed: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return unwritten(q, k, v)


def _splits(q: Tensor, k: Tensor, v: Tensor, compressed: bool, programs: int, wanted: int) -> int:
    """Among how many programs the rows that see a tile of keys are shared, so that there are `wanted` a processor.

    All rows of a window's tile are few; those of compressed blocks may be all of a long sequence.
    """
    if not compressed:
        return 1
    most = SPLITS // (4 * (k.numel() + v.numel()))
    return max(1, min(-(-wanted * num_processors(q.device) // programs), most, q.shape[0]))
