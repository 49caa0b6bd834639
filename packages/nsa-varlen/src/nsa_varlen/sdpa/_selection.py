"""Which blocks each query attends to: scores of Eq. 9 and 10, then an exact top-k of Eq. 11."""

import torch
from torch import Tensor

from nsa_varlen.arguments import KV, heads_and_dim
from nsa_varlen.autograd import outside_autocast
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.sdpa._interval import Interval, compute_dtype, group_heads, head_major_keys, step_logits
from nsa_varlen.sdpa._tiles import Batch, Tile

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
    ranked = [piece for piece in interval.pieces if _num_blocks(piece, blocks) > blocks.topk]
    if sum(piece.total for piece in ranked) < q.shape[0]:  # where all candidates fit, all are chosen
        indices[:] = _all_candidates(current, blocks)[:, None]
    for piece in ranked:
        p_cmp = _group_probabilities(q, k_cmp, lse, interval, piece, num_kv_heads, scale)
        scores = stencil(p_cmp, _num_blocks(piece, blocks), blocks)
        piece.put_queries(top_blocks(scores, piece.queries(current)[:, None], blocks).transpose(1, 2), indices)
    return indices


def _num_blocks(piece: Tile | Batch, blocks: BlockGeometry) -> int:
    """Selection blocks that hold the piece's compressed blocks, and one more that may hold the query's own."""
    return (piece.k1 - 1) * blocks.kernel_stride // blocks.block_size + 3


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
    """The forced blocks and the best candidates: scores [b, Hk, R, Nb], current block [b, 1, R] -> int32 [..., topk].

    Scores are at least 0, so the bits of their fp32 values order like the values. A 64-bit key of those bits above
    the complement of the block's number is exact and ranks equal scores by the lower index.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    # NaN too ranks below the forced blocks and, with its sign bit set, not below 0, where no block is chosen.
    bits = scores.float().view(torch.int32).long().clamp_(0, FORCED - 1)
    forced = (block < blocks.init_blocks) | (block > current[..., None] - blocks.local_blocks)
    bits.masked_fill_(forced, FORCED)
    key = bits.bitwise_left_shift_(INDEX_BITS).add_(scores.shape[-1] - block)
    key.masked_fill_(block > current[..., None], -1)
    best = key.topk(blocks.topk, dim=-1, sorted=False).values
    beyond = scores.shape[-1]
    chosen = torch.where(best < 0, beyond, beyond - (best & ((1 << INDEX_BITS) - 1))).sort(-1).values
    return chosen.masked_fill(chosen == beyond, -1).int()


def _all_candidates(current: Tensor, blocks: BlockGeometry) -> Tensor:
    """Blocks 0..current, -1 beyond: int64 [Tq, topk]. Right wherever there are at most topk candidates."""
    block = torch.arange(blocks.topk, device=current.device)
    return torch.where(block <= current[:, None], block, -1)


def _group_probabilities(
    q: Tensor, k_cmp: KV, lse: Tensor, interval: Interval, piece: Tile | Batch, num_kv_heads: int, scale: float
) -> Tensor:
    """Eq. 8 summed over each group's heads (Eq. 10): [b, Hk, R, keys].

    Heads are added one by one: `sum` picks its order by the column, and equal blocks would no longer tie.
    """
    dtype = compute_dtype(q.dtype)
    q_rows = group_heads(piece.queries(q), num_kv_heads, dtype) * scale
    lse_rows = group_heads(piece.queries(lse.T[..., None]), num_kv_heads, dtype)
    p_cmp = q_rows.new_empty(len(q_rows), piece.rows, piece.k1)
    for k0, k1 in piece.steps(interval.tile_logits):
        logits = step_logits(q_rows, head_major_keys(k_cmp, piece, k0, k1, dtype), interval, piece, k0)
        first, *others = logits.sub_(lse_rows).exp_().unflatten(1, (-1, piece.rows)).unbind(1)
        for head in others:
            first.add_(head)
        p_cmp[..., k0:k1] = first
    return p_cmp.unflatten(0, (-1, num_kv_heads))
