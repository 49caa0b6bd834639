"""Rows of packed or paged keys and values by where they stand in the batch."""

import torch
from torch import Tensor

from nsa_varlen.arguments import KV
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.paged import PagedKV


def all_rows(kv: KV, layout: VarlenLayout) -> Tensor:
    """Every packed row of the layout's keys: [Tk, H, D]. `kv` itself where it is packed."""
    return kv.rows(layout.sequence_of_keys(), layout.key_positions()) if isinstance(kv, PagedKV) else kv


def sequence_rows(kv: KV, sequence: int, first: int, start: int, end: int) -> Tensor:
    """Rows [start, end) of a sequence whose row 0 is packed row `first`: [end - start, H, D]. A view if packed."""
    return kv.span(sequence, start, end) if isinstance(kv, PagedKV) else kv[first + start : first + end]


def take_head_rows(k: KV, v: KV, sequence: Tensor, position: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `position[t, h, s]` of head h of `sequence[t]`: sequence [R], position [R, Hk, S] -> two [R, Hk, S, D].

    Zeros where a sequence has no page. What a packed sequence without keys gets is anybody's: the caller hides it.
    """
    row = _row(k, sequence, position, cu_seqlens)
    shared = isinstance(k, PagedKV) and isinstance(v, PagedKV) and k.block_table is v.block_table
    same = shared or (isinstance(k, Tensor) and isinstance(v, Tensor))
    return _take(k, row), _take(v, row if same else _row(v, sequence, position, cu_seqlens))


def _row(kv: KV, sequence: Tensor, position: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Row number of each head's row among all rows, negative where there is no page: int64 [R, Hk, S]."""
    sequence = sequence[:, None, None]
    if isinstance(kv, PagedKV):
        return kv.slots(sequence, position)
    return (position + cu_seqlens.long()[sequence]).clamp_max_(kv.shape[0] - 1)


def _take(kv: KV, row: Tensor) -> Tensor:
    heads = torch.arange(row.shape[1], device=row.device)[:, None]
    if not isinstance(kv, PagedKV):
        return _flat(kv, row, heads) if kv.is_contiguous() else kv[row, heads]
    found, pages = row.clamp_min(0), kv.pages
    if pages.is_contiguous():
        taken = _flat(pages.flatten(0, 1), found, heads)
    else:  # by page and row: flattening a view of a larger pool would copy it all
        taken = pages[torch.div(found, kv.page_size, rounding_mode="floor"), found % kv.page_size, heads]
    # A missing page must be written over: what stands in its place may be NaN, which no weight of 0 hides.
    return taken.masked_fill_((row < 0)[..., None], 0.0)


def _flat(rows: Tensor, row: Tensor, heads: Tensor) -> Tensor:
    """Contiguous rows [n, Hk, D] at (row, head): [R, Hk, S, D]."""
    index = row * rows.shape[1] + heads  # index_select copies whole rows, several times faster than indexing
    return rows.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
