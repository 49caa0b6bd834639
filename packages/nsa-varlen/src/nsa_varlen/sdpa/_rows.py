"""Rows of packed or paged keys and values by where they stand in the batch."""

import torch
from torch import Tensor

from nsa_varlen.arguments import KV
from nsa_varlen.paged import PagedKV


def slice_rows(kv: KV, start: int, end: int, cu_seqlens: Tensor) -> Tensor:
    """Packed rows [start, end): [end - start, H, D]. A view where `kv` is packed.

    `cu_seqlens` are the offsets that the row numbers count from.
    """
    if not isinstance(kv, PagedKV):
        return kv[start:end]
    if cu_seqlens.shape[0] == 2:
        return kv.span(0, start, end)
    index = torch.arange(start, end, device=kv.device)
    sequence = torch.searchsorted(cu_seqlens, index.int(), right=True) - 1
    return kv.rows(sequence, index - cu_seqlens[sequence])


def take_head_rows(kv: KV, sequence: Tensor, position: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Row `position[t, h, s]` of head h of `sequence[t]`: sequence [R], position [R, Hk, S] -> [R, Hk, S, D]."""
    heads = torch.arange(position.shape[1], device=position.device)[:, None]
    if isinstance(kv, PagedKV):
        rows, row = kv.pages.flatten(0, 1), kv.slots(sequence[:, None, None], position)
    else:
        rows, row = kv, position + cu_seqlens.long()[sequence][:, None, None]
    if rows.is_contiguous():  # index_select copies whole rows, several times faster than indexing
        flat = (row * rows.shape[1] + heads).flatten()
        return rows.flatten(0, 1).index_select(0, flat).unflatten(0, row.shape)
    return rows[row, heads]
