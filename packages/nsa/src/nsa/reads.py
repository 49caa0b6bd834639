"""How many keys the queries really read, counted from real indices; `BlockGeometry.reads` is what they may."""

from typing import NamedTuple

from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.arguments import check_block_indices, check_layout
from nsa_varlen.block_indices import distinct_blocks
from torch import Tensor


class Reads(NamedTuple):
    """Keys read per query and kv head, by branch: int64 [Tq, Hk] each."""

    cmp: Tensor
    slc: Tensor
    win: Tensor

    @property
    def total(self) -> Tensor:
        """Keys read over all branches: int64 [Tq, Hk]."""
        return self.cmp + self.slc + self.win


def count_reads(block_indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Reads:
    """Count the keys behind `block_indices` int32 [Tq, Hk, N], with those of the other two branches.

    A listed block counts its keys up to the query's position; duplicates and -1 count nothing.

    Example:
        >>> import torch
        >>> layout, blocks = VarlenLayout.from_lengths([1], [130]), BlockGeometry()
        >>> reads = count_reads(torch.tensor([[[0, 2, -1]]], dtype=torch.int32), layout, blocks)
        >>> reads.cmp.item(), reads.slc.item(), reads.win.item()
        (7, 66, 130)
    """
    check_layout(layout, blocks)
    num_kv_heads = block_indices.shape[1] if isinstance(block_indices, Tensor) and block_indices.ndim == 3 else 0
    check_block_indices(block_indices, num_kv_heads, layout)
    seen = (layout.positions() + 1).clamp_min(0)[:, None]
    indices = distinct_blocks(block_indices)
    keys = (seen[..., None] - indices * blocks.block_size).clamp(0, blocks.block_size)
    slc = keys.masked_fill(indices < 0, 0).sum(-1)
    cmp, win = (x.expand(-1, num_kv_heads) for x in (blocks.num_compressed(seen), seen.clamp_max(blocks.window_size)))
    return Reads(cmp, slc, win)


def reads_when_selected(length: int, blocks: BlockGeometry) -> int:
    """Keys that the last of `length` tokens reads when its own block and topk - 1 whole ones are selected.

    num_cmp(S) + (min(n, Nb) - 1) * l' + ((S - 1) mod l') + 1 + min(w, S), Nb = ceil(S / l'): what `count_reads` must
    find for the output of `select_blocks`.

    Raises:
        ValueError: length below 1.

    Example:
        >>> reads_when_selected(65_536, BlockGeometry()), BlockGeometry().reads(65_536)
        (5631, 5631)
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    whole = min(blocks.topk, blocks.num_blocks(length)) - 1
    slc = whole * blocks.block_size + (length - 1) % blocks.block_size + 1
    return blocks.num_compressed(length) + slc + min(blocks.window_size, length)
