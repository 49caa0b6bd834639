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
    """Rows `position[t, h, s]` of head h of `sequence[t]`: sequence [R], position [R, Hk, S] -> two [R, Hk, S, D]."""
    index = _head_row(k, sequence, position, cu_seqlens)
    shared = isinstance(k, PagedKV) and isinstance(v, PagedKV) and k.block_table is v.block_table
    same = shared or (isinstance(k, Tensor) and isinstance(v, Tensor))
    return _take(k, index), _take(v, index if same else _head_row(v, sequence, position, cu_seqlens))


def _head_row(kv: KV, sequence: Tensor, position: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Row number of each head's row among all heads' rows: int64 [R, Hk, S]."""
    sequence = sequence[:, None, None]
    # A sequence without keys has no row 0: whatever stands in its place is read, and hidden by the caller.
    if isinstance(kv, PagedKV):
        row = kv.slots(sequence, position).clamp_min_(0)
    else:
        row = (position + cu_seqlens.long()[sequence]).clamp_max_(kv.shape[0] - 1)
    heads = torch.arange(position.shape[1], device=position.device)[:, None]
    return row * position.shape[1] + heads


def _take(kv: KV, index: Tensor) -> Tensor:
    rows = kv.pages.flatten(0, 1) if isinstance(kv, PagedKV) else kv
    if rows.is_contiguous():  # index_select copies whole rows, several times faster than indexing
        return rows.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
    num_heads = rows.shape[1]
    return rows[torch.div(index, num_heads, rounding_mode="floor"), index % num_heads]
