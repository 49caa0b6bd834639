"""New tokens into their pages, and the compressed blocks that they complete, at lengths that only the device knows.

Every shape follows from the arguments' shapes and no number is read from the device. So no row can be left out: one
that must not be stored is replaced by one that is, with its place, and if there is none, by what is already there.
"""

import torch
from torch import Tensor

from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.new_tokens import CompletedBlocks, NewTokens, PooledTokens
from nsa_varlen.paged import PagedKV
from nsa_varlen.sdpa._interval import compute_dtype


def append(
    new: NewTokens,
    cmp: tuple[PagedKV, PagedKV],
    slc: tuple[PagedKV, PagedKV],
    win: tuple[PagedKV, PagedKV],
    counts: Tensor,
    blocks: BlockGeometry,
) -> None:
    """Store `new`, and write the lengths of cmp."""
    before = (slc[0].lengths - counts)[:, None]
    place = torch.arange(new.k_slc.shape[1], device=counts.device)
    position, there = before + place, place < counts[:, None]
    for kv, rows in zip((*slc, *win), (new.k_slc, new.v_slc, new.k_win, new.v_win), strict=True):
        put(kv, rows, position, there)
    old, completed = blocks.num_compressed(before), blocks.num_compressed(slc[0].lengths)
    most = max(0, (new.k_slc.shape[1] - 1) // blocks.kernel_stride + 1)
    number = old + torch.arange(most, device=counts.device)
    made = new.cmp if isinstance(new.cmp, CompletedBlocks) else _pool(new.cmp, position, there, number, blocks)
    for kv, rows in zip(cmp, (made.k, made.v), strict=True):
        put(kv, rows, number, number < completed[:, None])
        kv.lengths.copy_(completed)


def put(kv: PagedKV, rows: Tensor, position: Tensor, there: Tensor) -> None:
    """Store rows [B, N, H, D] at position [B, N] of their sequences, where `there` and where there is a page."""
    room = kv.block_table.shape[1] * kv.page_size
    if 0 in (there.numel(), room, kv.pages.shape[0]):
        return
    sequence = torch.arange(len(rows), device=rows.device)[:, None]
    slots = kv.slots(sequence, position.clamp(0, room - 1))
    stored = (there & (position >= 0) & (position < room) & (slots >= 0)).flatten()
    # Which of a duplicate's writes comes last nobody knows: they are of the same row. argmax finds the first that is.
    first = stored.to(torch.uint8).argmax()
    source = torch.arange(len(stored), device=rows.device).where(stored, first)
    slot = slots.flatten()[source].clamp_min(0)
    # By page and row: flattening pages that are a view of a larger pool would copy them all.
    page, within = torch.div(slot, kv.page_size, rounding_mode="floor"), slot % kv.page_size
    kv.pages[page, within] = rows.flatten(0, 1)[source].where(stored.any(), kv.pages[page, within])


def _pool(new: PooledTokens, position: Tensor, there: Tensor, number: Tensor, blocks: BlockGeometry) -> CompletedBlocks:
    """Store raw tokens in their rings, and make the blocks number [B, E] from those: with the last ones, anything."""
    size, dtype = new.k_tail.shape[1], compute_dtype(new.k.dtype)
    sequence = torch.arange(len(position), device=position.device)[:, None]
    ring = position % size
    for tail, rows in ((new.k_tail, new.k), (new.v_tail, new.v)):
        tail[sequence, ring] = rows.where(there[..., None, None], tail[sequence, ring])
    token = number[..., None] * blocks.kernel_stride + torch.arange(blocks.kernel_size, device=number.device)
    made = []
    for tail, weights in ((new.k_tail, new.k_weights), (new.v_tail, new.v_weights)):
        rows = tail[sequence[..., None], token % size].to(dtype)  # [B, E, l, H, D]
        pooled = rows.mean(2) if weights is None else (rows * weights.T[..., None].to(dtype)).sum(2)
        made.append(pooled.to(tail.dtype))
    k, v = made
    if new.rotation is not None:
        known = number.clamp(0, new.rotation.shape[1] - 1)
        cos, sin = new.rotation[:, known][:, :, :, None]
        k = rotate(k, cos, sin, new.interleaved)
    return CompletedBlocks(k, v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs (2i, 2i + 1), or (i, i + D/2), of x [..., D] turned by cos, sin [..., D / 2], in their precision."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return out.to(x.dtype)
