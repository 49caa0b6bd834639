"""How many keys the queries really read, counted from real indices; `BlockGeometry.reads` is what they may."""

from typing import NamedTuple

import torch
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
    return _reads(distinct_blocks(block_indices), layout.positions(), blocks)


def _reads(indices: Tensor, position: Tensor, blocks: BlockGeometry) -> Reads:
    """Of queries at `position` [...], negative ones being nobody's, with distinct blocks [..., Hk, N]."""
    seen = (position + 1).clamp_min(0)[..., None]
    keys = (seen[..., None] - indices * blocks.block_size).clamp(0, blocks.block_size)
    slc = keys.masked_fill(indices < 0, 0).sum(-1)
    cmp, win = (x.expand(slc.shape) for x in (blocks.num_compressed(seen), seen.clamp_max(blocks.window_size)))
    return Reads(cmp, slc, win)


def reads_and_budget(block_indices: Tensor, position: Tensor, blocks: BlockGeometry) -> Tensor:
    """Keys read in cmp, slc and win and the budget, summed over the kv heads: int64 [T, 4], 0 for padding.

    Of queries at int64 `position` [T], negative ones being padding, that chose int32 `block_indices` [T, Hk, N], each
    block once.
    """
    reads = _reads(block_indices, position, blocks)
    seen = (position + 1).clamp_min(0)
    budget = blocks.num_compressed(seen) + blocks.topk * blocks.block_size + seen.clamp_max(blocks.window_size)
    budget = budget.masked_fill(position < 0, 0) * block_indices.shape[1]
    return torch.stack([*(x.sum(-1) for x in reads), budget], -1)


class ReadCounters:
    """Keys that the queries of a cache's sequences read, counted from their real block indices, on the device.

    A cache counts while it has one (`cache.counters = ReadCounters(cache.batch_size, cache.device)`) and pays nothing
    without. Counting waits for nothing and is part of a CUDA graph that was captured meanwhile.

    Fields:
        last: int64 [B, 4], of the last step, by sequence: keys read in cmp, slc and win, and the budget, summed over
            its new tokens and the kv heads.
        total: int64 [5]: steps, and the sums of `last` over all of them and all sequences.

    Example:
        >>> from nsa import NSAAttention, NSACache, NSAConfig
        >>> config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
        >>> layer, cache = NSAAttention(config), NSACache(config, batch_size=1, max_tokens=256)
        >>> cache.counters = ReadCounters(cache.batch_size, cache.device)
        >>> with torch.no_grad():
        ...     for tokens in (100, 1):
        ...         out = layer(torch.randn(1, tokens, 64), cache=cache)
        >>> cache.counters.last[0].tolist()  # 5 blocks of 101 tokens, 101 keys, 101 in the window; for two kv heads
        [10, 202, 202, 2260]
    """

    def __init__(self, batch_size: int, device: torch.device | str | None = None) -> None:
        self.last = torch.zeros(batch_size, 4, dtype=torch.int64, device=device)
        self.total = torch.zeros(5, dtype=torch.int64, device=device)

    def add(self, block_indices: Tensor, position: Tensor, sequence: Tensor, blocks: BlockGeometry) -> None:
        """A step: queries at int64 `position` [T] of `sequence` [T] chose int32 `block_indices` [T, Hk, N].

        Negative positions are padding.
        """
        self.last.zero_().index_add_(0, sequence, reads_and_budget(block_indices, position, blocks))
        self.total[0] += 1
        self.total[1:] += self.last.sum(0)

    def read(self) -> dict[str, int]:
        """steps, cmp, slc, win and budget so far, on the host, which waits for the device."""
        return dict(zip(("steps", "cmp", "slc", "win", "budget"), self.total.tolist(), strict=True))


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
