"""Block scores and the choice of blocks."""

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.ops.launching import on_device, num_processors, rows
from nsa_kernels_triton.tiles import count_tiles, pieces, power_of_two

SCORE_BYTES = 256 << 20
"""Most memory for scores at a time; more queries are taken in chunks. One tile of queries is taken whatever it needs."""

LOG2_E = 1.4426950408889634

FEW = 32
"""Most free places that one warp deals with in registers."""


@torch.library.custom_op("nsa_kernels_triton::select_blocks", mutates_args=())
@on_device
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_compressed: Tensor,
    max_seqlen_k: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
) -> Tensor:
    """q [Tq, Hq, D], k_cmp [Tc, Hk, D], lse fp32 [Hq, Tq] -> int32 [Tq, Hk, topk]: see `TritonBackend.select_blocks`.

    The scores of a chunk of query tiles, [tile, head, query, block], then their top-k. All sizes follow from the host's
    numbers: a row has room for the blocks of the longest sequence.
    """
    from nsa_kernels_triton.kernels.scores import block_scores_kernel
    from nsa_kernels_triton.kernels.topk import topk_kernel

    q, k_cmp = rows(q), rows(k_cmp)
    total, num_heads, head_dim = q.shape
    num_kv_heads = k_cmp.shape[1]
    out = q.new_empty(total, num_kv_heads, topk, dtype=torch.int32)
    if not out.numel():
        return out
    group = num_heads // num_kv_heads
    group_width = power_of_two(group)
    batch_size = cu_seqlens_q.shape[0] - 1
    alpha, beta = kernel_size // kernel_stride, block_size // kernel_stride
    free = topk - init_blocks - local_blocks
    scoring = launch("block_scores", q.device, group_size=group, row_bytes=head_dim * q.element_size())
    picking = launch("topk", q.device, free=free)

    queries = max(1, scoring["columns"] // group_width)
    keys = max(scoring["keys"], beta)
    step = keys // beta
    tiles = count_tiles(total, batch_size, queries)
    longest = ceil(max_seqlen_k / block_size)
    # Blocks that compete in the longest sequence; none where rows take all there are, or only the forced ones.
    blocks = longest - local_blocks if longest > topk and free else 0
    parts = min(ceil(blocks / (4 * step)), ceil(2 * num_processors(q.device) / (tiles * num_kv_heads)))
    part = step * ceil(blocks / (step * max(1, parts)))
    width = 16 * ceil((step * ceil(blocks / step) + 1) / 16)
    levels = _levels(blocks, free, picking["span"])

    line_bytes = 4 * width * (1 + (alpha > 1)) + 8 * sum(level.next_width for level in levels)
    most = max(1, SCORE_BYTES // (queries * num_kv_heads * line_bytes))
    chunk = ceil(tiles / ceil(tiles / most))
    lines = chunk * num_kv_heads * queries if blocks else 0
    own, spill = (q.new_empty(lines * width if there else 0, dtype=torch.float32) for there in (True, alpha > 1))
    winners = [[q.new_empty(lines * level.next_width, dtype=torch.int32) for _ in range(2)] for level in levels]

    for first_tile in range(0, tiles, chunk):
        num_tiles = min(chunk, tiles - first_tile)
        if blocks:
            block_scores_kernel[num_tiles * num_kv_heads, parts](
                *(q, k_cmp, lse, own, spill, cu_seqlens_q, cu_seqlens_k, cu_compressed, batch_size),
                *(first_tile, num_tiles, part, width, q.stride(0), q.stride(1), k_cmp.stride(0), k_cmp.stride(1)),
                *(lse.stride(0), lse.stride(1), num_kv_heads, scale * LOG2_E),
                GROUP=group,
                GROUP_WIDTH=group_width,
                DIM=head_dim,
                D0=pieces(head_dim)[0],
                D1=pieces(head_dim)[1],
                ALPHA=alpha,
                BETA=beta,
                BLOCK_SIZE=block_size,
                TOPK=topk,
                LOCAL=local_blocks,
                QUERIES=queries,
                KEYS=keys,
                **scoring.options,
            )
        picked = min(picking["rows"], queries)
        before, before_width, source = 0, width, winners[0]
        for number, (level, target) in enumerate(zip(levels, winners, strict=True)):
            topk_kernel[num_tiles * num_kv_heads * (queries // picked), level.spans](
                *(own, spill, *source, *target, out, cu_seqlens_q, cu_seqlens_k, batch_size),
                *(first_tile, before_width, level.next_width, num_kv_heads),
                LEVEL=number,
                LAST=level is levels[-1],
                SPAN=level.span,
                BEFORE=before,
                SLOTS=level.slots,
                FEW=free <= FEW,
                BLOCK_SIZE=block_size,
                ALPHA=alpha,
                TOPK=topk,
                INIT=init_blocks,
                LOCAL=local_blocks,
                QUERIES=queries,
                ROWS=picked,
                **picking.options,
            )
            before, before_width, source = level.span, level.next_width, target
    return out


class _Level(NamedTuple):
    """One level of the tournament: spans of so many positions, each leaving so many slots; none on the last."""

    span: int
    spans: int
    slots: int
    next_width: int


def _levels(blocks: int, free: int, span: int) -> list[_Level]:
    """Levels that choose `free` of `blocks`: any but the last at least halves the positions.

    Example:
        >>> _levels(4096, 13, 1024)
        [_Level(span=1024, spans=4, slots=16, next_width=64), _Level(span=128, spans=1, slots=16, next_width=0)]
    """
    slots = max(4, power_of_two(free))
    span = min(span, 1024) if free <= FEW else max(span, 2 * slots)
    levels, width = [], blocks
    while width > span:
        spans = ceil(width / span)
        levels.append(_Level(span, spans, slots, spans * slots))
        width = spans * slots
    return [*levels, _Level(max(128, power_of_two(width)), 1, slots, 0)]


@select_blocks.register_fake
def _(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_compressed: Tensor,
    max_seqlen_k: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape[0], k_cmp.shape[1], topk, dtype=torch.int32)
