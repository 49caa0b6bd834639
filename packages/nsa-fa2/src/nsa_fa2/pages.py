"""Paged keys and values as packed ones: for kernels that read pages of other sizes than a cache's, or none."""

import torch
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.arguments import KV
from nsa_varlen.transfer import to_device
from torch import Tensor


def compressed_rows(kv: KV, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """The compressed blocks of every sequence, packed [Tc, H, D]. `kv` itself where it is packed."""
    if not isinstance(kv, PagedKV):
        return kv
    number = torch.div(layout.compressed_starts(blocks), blocks.kernel_stride, rounding_mode="floor")
    return kv.rows(layout.sequence_of_compressed(blocks), number)


def window_rows(k: KV, v: KV, layout: VarlenLayout, blocks: BlockGeometry) -> tuple[Tensor, Tensor, VarlenLayout]:
    """Keys and values that some window reaches, packed, with their layout: the last q_len + w - 1 of each sequence.

    Packed ones stay as they are. Reads a layout's offsets once if they live on a device only; see `VarlenLayout`.
    """
    if not (isinstance(k, PagedKV) or isinstance(v, PagedKV)):
        return k, v, layout

    def build() -> tuple[VarlenLayout, Tensor]:
        q_len, k_len = (x.long().diff() for x in (layout.host.cu_seqlens_q, layout.host.cu_seqlens_k))
        kept = torch.minimum(k_len, q_len + blocks.window_size - 1).masked_fill_(q_len == 0, 0)
        reached = VarlenLayout.from_lengths(q_len.tolist(), kept.tolist(), layout.device)
        return reached, to_device(k_len - kept, layout.device)[reached.sequence_of_keys()] + reached.key_positions()

    reached, position = layout.derive(("nsa_fa2", "reached", blocks.window_size), build)
    sequence = reached.sequence_of_keys()

    def rows(kv: KV) -> Tensor:
        if isinstance(kv, PagedKV):
            return kv.rows(sequence, position)
        return kv.index_select(0, position + layout.cu_seqlens_k.long()[sequence])

    return rows(k), rows(v), reached
