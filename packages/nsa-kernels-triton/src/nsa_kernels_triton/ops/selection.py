"""Block scores and the choice of blocks."""

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.ops.launching import num_processors, on_device, rows, side_streams, take_turns
from nsa_kernels_triton.tiles import LOG2_E, count_tiles, evenly, pieces, power_of_two

SCORE_BYTES = 1 << 30
"""Most memory for scores at a time: more queries are taken in chunks, of at least one tile, whatever that needs."""

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

    Two kernels for each chunk of query tiles: the scores, [tile, head, query, block], and their top-k. Chunks take
    turns on side streams: while the scores of one are computed, those of another are chosen from. All sizes follow
    from the host's numbers: a row has room for the blocks of the longest sequence.
    """
    from nsa_kernels_triton.kernels.scores import block_scores_kernel, paired_block_scores_kernel
    from nsa_kernels_triton.kernels.topk import topk_kernel

    q, k_cmp = rows(q), rows(k_cmp)
    total, num_heads, head_dim = q.shape
    num_kv_heads = k_cmp.shape[1]
    out = q.new_empty(total, num_kv_heads, topk, dtype=torch.int32)
    if not out.numel():
        return out
    group, batch_size = num_heads // num_kv_heads, cu_seqlens_q.shape[0] - 1
    alpha, beta = kernel_size // kernel_stride, block_size // kernel_stride
    free = topk - init_blocks - local_blocks
    itemsize = q.element_size()
    case = {"group_size": group, "row_bytes": head_dim * itemsize, "itemsize": itemsize}
    scoring = launch("block_scores", q.device, **case, rows_per_sequence=ceil(total * group / batch_size))
    picking = launch("topk", q.device, free=free)

    def competing(longest: int) -> int:
        """Blocks that compete for places in so long a sequence; none where there are places for all, or no places."""
        blocks = ceil(longest / block_size)
        return blocks - local_blocks if blocks > topk and free else 0

    queries, keys = max(1, scoring["columns"] // power_of_two(group)), scoring["keys"]
    fits = keys in (32, 64) and scoring["columns"] == 32 * scoring.num_warps
    paired = fits and group in (1, 2, 4) and (alpha, beta) == (2, 4) and local_blocks > 1
    spill_every = 0 if alpha == 1 else keys // 32 if paired else 1
    step = max(1, keys // beta)  # blocks
    tiles = count_tiles(total, batch_size, queries)
    lines = num_kv_heads * queries  # of scores, a tile

    most_blocks = competing(max_seqlen_k)
    width = 32 * ceil(step * ceil(most_blocks / step) / 32)
    spill_width = width // spill_every if spill_every else 0
    winners = sum(level.next_width for level in _levels(most_blocks, free, picking["span"]))
    tile_bytes = lines * (4 * (width + spill_width) + 8 * winners)
    streams = side_streams(q.device, tiles * tile_bytes > SCORE_BYTES)
    chunk = evenly(tiles, SCORE_BYTES // max(1, len(streams) * tile_bytes))  # tiles
    buffers = [
        [q.new_empty(chunk * lines * size, dtype=torch.float32) for size in (width, spill_width)] for _ in streams
    ]

    constants: dict[str, int] = {"BLOCK_SIZE": block_size, "TOPK": topk, "LOCAL": local_blocks, "QUERIES": queries}
    widths = dict(zip(("D0", "D1"), pieces(head_dim), strict=True))
    score_constants = constants | widths | {"GROUP": group, "DIM": head_dim, "KEYS": keys}
    if paired:
        score_constants |= {"WARPS": scoring.num_warps}
    else:
        score_constants |= {"ALPHA": alpha, "BETA": beta, "GROUP_WIDTH": power_of_two(group)}
    score = paired_block_scores_kernel if paired else block_scores_kernel
    picked = min(picking["rows"], queries)
    constants |= {"INIT": init_blocks, "SPILL_EVERY": spill_every, "FEW": free <= FEW, "ROWS": picked}

    def select(first_tile: int, own: Tensor, spill: Tensor) -> None:
        num_tiles = min(chunk, tiles - first_tile)
        # Of one sequence the host knows how many queries, and so keys, there are behind the chunk.
        behind = max(0, total - (first_tile + num_tiles) * queries) if batch_size == 1 else 0
        blocks = competing(max_seqlen_k - behind)
        if blocks:
            steps = ceil(blocks / step)
            part = ceil(steps * num_tiles * num_kv_heads / (2 * num_processors(q.device)))  # a few queries alone: split
            score[num_tiles * num_kv_heads, ceil(steps / part)](
                *(q, k_cmp, lse, own, spill, cu_seqlens_q, cu_seqlens_k, cu_compressed, batch_size),
                *(first_tile, num_tiles, part, width, q.stride(0), q.stride(1), k_cmp.stride(0), k_cmp.stride(1)),
                *(lse.stride(0), lse.stride(1), num_kv_heads, scale * LOG2_E),
                **score_constants,
                **scoring.options,
            )
        source, source_width, source_span = (out, out), width, 0
        for number, level in enumerate(_levels(blocks, free, picking["span"])):
            size = num_tiles * lines * level.next_width
            target = (out.new_empty(size), out.new_empty(size)) if size else (out, out)
            topk_kernel[num_tiles * num_kv_heads * (queries // picked), level.spans](
                *(own, spill, *source, *target, out, cu_seqlens_q, cu_seqlens_k, batch_size),
                *(first_tile, source_width, level.next_width, num_kv_heads),
                LEVEL=number,
                LAST=not size,
                SPAN=level.span,
                BEFORE=source_span,
                SLOTS=level.slots,
                **constants,
                **picking.options,
            )
            source, source_width, source_span = target, level.next_width, level.span

    take_turns(streams, range(0, tiles, chunk), lambda turn, first_tile: select(first_tile, *buffers[turn]))
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
