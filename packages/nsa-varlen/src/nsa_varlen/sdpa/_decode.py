"""All three branches for the newest tokens of paged sequences, at lengths that only the device knows.

Every tensor's shape follows from the arguments' shapes, and no number is read from the device: a CUDA graph may hold
it. What a table has room for is looked at and hidden; on a CPU, where reading them is free, only what the longest
sequence has.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_varlen.autograd import outside_autocast
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.kv_rows import take_head_rows
from nsa_varlen.paged import PagedKV
from nsa_varlen.sdpa._interval import compute_dtype
from nsa_varlen.sdpa._selection import stencil, top_blocks

Stream = tuple[PagedKV, PagedKV]


class Newest(NamedTuple):
    """The newest tokens of each sequence.

    Fields:
        position: [B, N], -1 where a row is padding: it stands before the first token and sees nothing.
        rows, rows_cmp: q and q_cmp, scaled, in the dtype of the arithmetic [B, N, Hk, G, Dk].
    """

    position: Tensor
    rows: Tensor
    rows_cmp: Tensor


@outside_autocast
def decode(
    q: Tensor,
    q_cmp: Tensor,
    cmp: Stream,
    slc: Stream,
    win: Stream,
    gates: Tensor,
    counts: Tensor,
    blocks: BlockGeometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, N, Hq, Dv], block_indices int32 [B, N, Hk, topk])."""
    if is_idle(q, slc):
        nothing = torch.full((*q.shape[:2], slc[0].num_heads, blocks.topk), -1, dtype=torch.int32, device=q.device)
        return q.new_zeros(*q.shape[:3], slc[1].head_dim), nothing
    position, rows, rows_cmp = newest(q, q_cmp, slc[0], counts, scale)
    o_cmp, p_cmp = compressed(rows_cmp, cmp, position, blocks)
    block_indices = choice(p_cmp, position, slc[0], blocks)
    o_slc = selected(rows, slc, block_indices, position, blocks)
    o_win = window(rows, win, position, blocks)
    return combined(gates, (o_cmp, o_slc, o_win), position, q.dtype), block_indices


def is_idle(q: Tensor, slc: Stream) -> bool:
    """Whether nobody asks, or nobody has a token."""
    return 0 in (*q.shape[:2], slc[0].block_table.shape[1])


def newest(q: Tensor, q_cmp: Tensor, k_slc: PagedKV, counts: Tensor, scale: float) -> Newest:
    """Where the newest tokens stand, and what they ask."""
    place = torch.arange(q.shape[1], device=q.device)
    position = ((k_slc.lengths - counts)[:, None] + place).masked_fill(place >= counts[:, None], -1)
    dtype = compute_dtype(q.dtype)
    rows, rows_cmp = (x.to(dtype).unflatten(2, (k_slc.num_heads, -1)) * scale for x in (q, q_cmp))
    return Newest(position, rows, rows_cmp)


def combined(gates: Tensor, branches: tuple[Tensor, ...], position: Tensor, dtype: torch.dtype) -> Tensor:
    """Eq. 5 over cmp, slc and win [B, N, Hk, G, Dv], in `dtype`: [B, N, Hq, Dv]; 0 for padding, whatever it holds."""
    num_kv_heads = branches[0].shape[2]
    wide = torch.promote_types(branches[0].dtype, gates.dtype)
    weights = gates.to(wide).unflatten(2, (num_kv_heads, -1))[..., None].unbind(-2)
    out = sum(weight * o.to(wide) for weight, o in zip(weights, branches, strict=True))
    assert isinstance(out, Tensor)
    return out.flatten(2, 3).masked_fill((position < 0)[..., None, None], 0.0).to(dtype)


def compressed(rows: Tensor, cmp: Stream, position: Tensor, blocks: BlockGeometry) -> tuple[Tensor, Tensor]:
    """(o [B, N, Hk, G, Dv], probabilities of Eq. 8 summed over each group [B, Hk, N, blocks])."""
    k_cmp, v_cmp = cmp
    room = _room(k_cmp)
    block = torch.arange(room, device=rows.device)
    sequence = torch.arange(len(rows), device=rows.device)[:, None]
    unused = (block >= k_cmp.lengths[:, None])[..., None, None]  # may hold NaN, which no weight of 0 hides
    k, v = (x.rows(sequence, block).masked_fill_(unused, 0.0).to(rows.dtype) for x in (k_cmp, v_cmp))
    hidden = block >= blocks.num_compressed(position + 1)[..., None]
    logits = torch.einsum("bnhgd,bshd->bnhgs", rows, k).masked_fill_(hidden[:, :, None, None], -torch.inf)
    weights, top, total = _softmax(logits)
    out = torch.einsum("bnhgs,bshd->bnhgd", weights, v) / total.clamp_min(torch.finfo(total.dtype).tiny)
    # As `select` has it: from an lse in fp32, heads added one by one, so that equal blocks tie.
    lse = (top + total.log()).float().masked_fill_(total == 0, 0.0)
    first, *others = logits.sub_(lse).exp_().unbind(3)
    for head in others:
        first = first + head
    return out, first.transpose(1, 2)


def choice(p_cmp: Tensor, position: Tensor, k_slc: PagedKV, blocks: BlockGeometry) -> Tensor:
    """Eq. 9 to 11: int32 [B, N, Hk, topk]."""
    num_blocks = max(blocks.topk, blocks.num_blocks(_room(k_slc)))
    current = torch.div(position, blocks.block_size, rounding_mode="floor")
    return top_blocks(stencil(p_cmp, num_blocks, blocks), current[:, None], blocks).transpose(1, 2)


def selected(rows: Tensor, slc: Stream, block_indices: Tensor, position: Tensor, blocks: BlockGeometry) -> Tensor:
    """Attention to the keys of the listed blocks: [B, N, Hk, G, Dv]."""
    within = torch.arange(blocks.block_size, device=position.device)
    key = (block_indices[..., None] * blocks.block_size + within).flatten(3)
    return _gathered(rows, *slc, key, (key < 0) | (key > position[..., None, None]))


def window(rows: Tensor, win: Stream, position: Tensor, blocks: BlockGeometry) -> Tensor:
    """Attention to the last keys: [B, N, Hk, G, Dv]."""
    within = torch.arange(1 - blocks.window_size, 1, device=position.device)
    key = (position[..., None] + within)[:, :, None].expand(-1, -1, rows.shape[2], -1)
    return _gathered(rows, *win, key, key < 0)


def _gathered(rows: Tensor, k: PagedKV, v: PagedKV, key: Tensor, hidden: Tensor) -> Tensor:
    """Attention of each row [B, N, Hk, G, D] to keys of its own, at positions [B, N, Hk, S]: [B, N, Hk, G, Dv]."""
    key, hidden = (x.flatten(0, 1) for x in (key, hidden))
    sequence = torch.arange(len(rows), device=rows.device)[:, None].expand(rows.shape[:2]).flatten()
    # Instead of a hidden key the first one that is seen, whose row is there.
    shown = key.masked_fill(hidden, torch.iinfo(key.dtype).max).amin(-1, keepdim=True)
    key = key.where(~hidden, shown.masked_fill(shown == torch.iinfo(key.dtype).max, 0))
    k_rows, v_rows = take_head_rows(k, v, sequence, key.long(), k.lengths)
    logits = torch.matmul(rows.flatten(0, 1), k_rows.to(rows.dtype).mT)
    weights, _, total = _softmax(logits.masked_fill_(hidden[:, :, None], -torch.inf))
    mean = torch.matmul(weights, v_rows.to(rows.dtype)) / total
    return mean.masked_fill_(total == 0, 0.0).unflatten(0, rows.shape[:2])


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exponentials, maximum, their sum): 0, 0 and 0 where nothing is seen."""
    top = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(*logits.shape[:-1], 1)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (logits - top).exp_()
    return weights, top, weights.sum(-1, keepdim=True)


def _room(kv: PagedKV) -> int:
    """Rows of a sequence at most."""
    room = kv.block_table.shape[1] * kv.page_size
    return min(room, int(kv.lengths.max())) if kv.device.type == "cpu" and len(kv.lengths) else room
