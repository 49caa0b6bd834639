"""Which blocks each query attends to: scores of Eq. 9 and 10, then an exact top-k of Eq. 11."""

import torch
from torch import Tensor

from nsa_varlen.arguments import KV, heads_and_dim
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.sdpa._autograd import outside_autocast
from nsa_varlen.sdpa._interval import Interval, compute_dtype, group_heads, head_major_rows, step_logits
from nsa_varlen.sdpa._tiles import Tile

FORCED = 0x7F800000  # bits of +inf: above every finite score
INDEX_BITS = 32


@outside_autocast
def select(
    q: Tensor, k_cmp: KV, lse: Tensor, layout: VarlenLayout, blocks: BlockGeometry, interval: Interval, scale: float
) -> Tensor:
    """Block indices int32 [Tq, Hk, topk], ascending, padded with -1; `interval` is the compressed branch's."""
    num_kv_heads = heads_and_dim(k_cmp)[0]
    current = torch.div(layout.positions(), blocks.block_size, rounding_mode="floor")
    indices = torch.empty(q.shape[0], num_kv_heads, blocks.topk, dtype=torch.int32, device=q.device)
    ranked = [tile for tile in interval.tiles if _num_blocks(tile, blocks) > blocks.topk]
    if sum(tile.q1 - tile.q0 for tile in ranked) < q.shape[0]:  # where all candidates fit, all are chosen
        indices[:] = _all_candidates(current, blocks)[:, None]
    for tile in ranked:
        rows = slice(tile.q0, tile.q1)
        p_cmp = _group_probabilities(q, k_cmp, lse, interval, tile, num_kv_heads, scale)
        if tile.sequences > 1:
            first = layout.compressed(blocks).cu_seqlens.long()[layout.sequence_of_queries()[rows]]
            p_cmp = _align(p_cmp, first - tile.k0)
        scores = stencil(p_cmp, _num_blocks(tile, blocks), blocks)
        indices[rows] = top_blocks(scores, current[rows], blocks).transpose(0, 1)
    return indices


def _num_blocks(tile: Tile, blocks: BlockGeometry) -> int:
    """Selection blocks that hold the tile's compressed blocks, and one more that may hold the query's own."""
    return (tile.k1 - tile.k0 - 1) * blocks.kernel_stride // blocks.block_size + 3


def stencil(p_cmp: Tensor, num_blocks: int, blocks: BlockGeometry) -> Tensor:
    """Eq. 9 by overlap counting: p_cmp [..., num_cmp] to scores [..., num_blocks].

    score[j] = sum over o of weight(o) * p_cmp[j*l'/d + o], weight(o) = |[o*d, o*d + l) ∩ [0, l')| / d. Every block
    adds its terms in the same order, so that equal inputs give bitwise equal scores.

    Example:
        >>> stencil(torch.ones(5), 2, BlockGeometry()).tolist()
        [7.0, 3.0]
    """
    step, width = blocks.block_size // blocks.kernel_stride, blocks.kernel_size // blocks.kernel_stride
    before = width - 1
    needed = (num_blocks - 1) * step + before + step
    padded = torch.nn.functional.pad(p_cmp, (before, needed - before - p_cmp.shape[-1]))
    scores = torch.zeros(*p_cmp.shape[:-1], num_blocks, dtype=p_cmp.dtype, device=p_cmp.device)
    for offset in range(-before, step):
        weight = min(offset + width, step) - max(offset, 0)
        # Not add_(alpha=weight): fused in some lanes and not in others, it rounds equal terms differently.
        scores.add_(padded[..., offset + before :: step][..., :num_blocks] * weight)
    return scores


def top_blocks(scores: Tensor, current: Tensor, blocks: BlockGeometry) -> Tensor:
    """The forced blocks and the best candidates: scores [Hk, R, Nb], current block [R] -> int32 [Hk, R, topk].

    Scores are at least 0, so the bits of their fp32 values order like the values. A 64-bit key of those bits above
    the complement of the block's number is exact and ranks equal scores by the lower index.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    bits = scores.float().view(torch.int32).long().clamp_max_(FORCED - 1)  # NaN too ranks below the forced blocks
    forced = (block < blocks.init_blocks) | (block > current[:, None] - blocks.local_blocks)
    bits.masked_fill_(forced, FORCED)
    key = bits.bitwise_left_shift_(INDEX_BITS).add_(scores.shape[-1] - block)
    key.masked_fill_(block > current[:, None], -1)
    best = key.topk(blocks.topk, dim=-1, sorted=False).values
    beyond = scores.shape[-1]
    chosen = torch.where(best < 0, beyond, beyond - (best & ((1 << INDEX_BITS) - 1))).sort(-1).values
    return chosen.masked_fill(chosen == beyond, -1).int()


def _all_candidates(current: Tensor, blocks: BlockGeometry) -> Tensor:
    """Blocks 0..current, -1 beyond: int64 [Tq, topk]. Right wherever there are at most topk candidates."""
    block = torch.arange(blocks.topk, device=current.device)
    return torch.where(block <= current[:, None], block, -1)


def _group_probabilities(
    q: Tensor, k_cmp: KV, lse: Tensor, interval: Interval, tile: Tile, num_kv_heads: int, scale: float
) -> Tensor:
    """Eq. 8 summed over each group's heads (Eq. 10): [Hk, R, k1 - k0].

    Heads are added one by one: `sum` picks its order by the column, and equal blocks would no longer tie.
    """
    rows, dtype = slice(tile.q0, tile.q1), compute_dtype(q.dtype)
    q_tile = group_heads(q[rows], num_kv_heads, dtype) * scale
    lse_tile = lse[:, rows].to(dtype).reshape(num_kv_heads, -1, 1)
    p_cmp = q_tile.new_empty(num_kv_heads, tile.q1 - tile.q0, tile.k1 - tile.k0)
    for k0, k1 in interval.steps(tile):
        logits = step_logits(q_tile, head_major_rows(k_cmp, k0, k1, interval, dtype), interval, tile, k0)
        first, *others = logits.sub_(lse_tile).exp_().unflatten(1, (-1, tile.q1 - tile.q0)).unbind(1)
        for head in others:
            first.add_(head)
        p_cmp[..., k0 - tile.k0 : k1 - tile.k0] = first
    return p_cmp


def _align(p_cmp: Tensor, first: Tensor) -> Tensor:
    """Shift each row so that column 0 is its own sequence's compressed block 0: [Hk, R, keys] -> [Hk, R, keys].

    `first` [R] is that block's column. Only a tile that several short sequences share has rows to shift; what
    another sequence's columns hold is zero.
    """
    num_heads, rows, keys = p_cmp.shape
    column = torch.arange(keys, device=p_cmp.device) + first[:, None]
    inside = column < keys
    shifted = p_cmp.gather(-1, column.clamp_max(keys - 1).expand(num_heads, rows, keys))
    return shifted.masked_fill_(~inside, 0.0)
