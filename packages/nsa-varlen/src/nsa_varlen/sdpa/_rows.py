"""Rows of packed or paged keys and values by their packed row number."""

import torch
from torch import Tensor

from nsa_varlen.arguments import KV
from nsa_varlen.paged import PagedKV


def slice_rows(kv: KV, start: int, end: int, cu_seqlens: Tensor) -> Tensor:
    """Packed rows [start, end): [end - start, H, D]. A view where `kv` is packed."""
    if not isinstance(kv, PagedKV):
        return kv[start:end]
    return take_rows(kv, torch.arange(start, end, device=kv.device), cu_seqlens)


def take_rows(kv: KV, index: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed rows at `index` (any shape): [..., H, D]. `cu_seqlens` are the offsets the row numbers count from."""
    if not isinstance(kv, PagedKV):
        return kv[index]
    sequence = torch.searchsorted(cu_seqlens, index.int().contiguous(), right=True) - 1
    return kv.rows(sequence, index - cu_seqlens[sequence])
