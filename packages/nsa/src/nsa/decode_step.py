"""The newest tokens of every sequence on their way into a cache, at lengths that only the device knows."""

from typing import TYPE_CHECKING

import torch
from nsa_varlen import PagedKV
from torch import Tensor

if TYPE_CHECKING:
    from nsa.cache import NSACache
    from nsa.cache_step import Compress


class DecodeStep:
    """What `NSACache.decode` begins: write all three branches, attend to `cmp`, `slc` and `win`, then `commit`.

    Unlike a `CacheStep` it asks the host for nothing that changes from step to step: every tensor keeps its shape, and
    a CUDA graph that holds it goes on from wherever the sequences are when it is replayed. It is no transaction.

    Fields:
        counts: int32 [B], how many of the N rows of each sequence are new tokens; the others are padding.
        positions: int64 [B, N], of the rows.

    Example:
        >>> from nsa import NSACache, NSAConfig, ops
        >>> config = NSAConfig(hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8)
        >>> cache, x = NSACache(config, batch_size=2, max_tokens=64), torch.randn(2, 1, 1, 8)
        >>> def mean(k, v, positions, layout, starts):
        ...     return tuple(ops.compress_mean(x, layout, config.blocks) for x in (k, v))
        >>> for _ in range(32):
        ...     cache.reserve(1)
        ...     step = cache.decode(1)
        ...     step.write_slc(x, x)
        ...     step.write_win(x, x)
        ...     step.write_cmp(x, x, mean)
        ...     k_cmp, v_cmp = step.cmp
        ...     step.commit()
        ...     cache.advance(1)
        >>> cache.lengths, k_cmp.lengths.tolist()
        ((32, 32), [1, 1])
    """

    def __init__(self, cache: "NSACache", rows: int, counts: Tensor) -> None:
        self._cache, self._rows, self.counts = cache, rows, counts
        place = torch.arange(rows, device=cache.device)
        self._there = place < counts[:, None]
        self._old = cache.device_lengths.long()
        self.positions = self._old[:, None] + place
        self._sequence = torch.arange(cache.batch_size, device=cache.device)[:, None]
        self._lengths = cache.device_lengths + counts

    @property
    def cmp(self) -> tuple[PagedKV, PagedKV]:
        """Compressed keys and values, with the blocks that this step completes."""
        return self._cache.cmp.views(self._cache.config.blocks.num_compressed(self._lengths))

    @property
    def slc(self) -> tuple[PagedKV, PagedKV]:
        """Keys and values of the selected branch, the new tokens included."""
        return self._cache.slc.views(self._lengths)

    @property
    def win(self) -> tuple[PagedKV, PagedKV]:
        """Keys and values of the window, the new tokens included."""
        return self._cache.win.views(self._lengths)

    def write_slc(self, k: Tensor, v: Tensor) -> None:
        """Store keys [B, N, Hk, Dk] and values [B, N, Hk, Dv] of the selected branch."""
        self._check("slc", k, v)
        self._cache.slc.write_there(k, v, self._sequence, self.positions, self._there)

    def write_win(self, k: Tensor, v: Tensor) -> None:
        """The same for the window; with `config.shared_kv` the streams are one and there is nothing to store."""
        self._check("win", k, v)
        if self._cache.win is not self._cache.slc:
            self._cache.win.write_there(k, v, self._sequence, self.positions, self._there)

    def write_cmp(self, k: Tensor, v: Tensor, compress: "Compress") -> None:
        """Keep raw rows k [B, N, Hk, Dk], v [B, N, Hk, Dv], and store the blocks that they complete.

        `compress` is that of `CacheStep.write_cmp`. It is called in every step, for as many blocks as N tokens could
        complete; which of them did, the device decides.
        """
        self._check("cmp", k, v)
        cache, blocks = self._cache, self._cache.config.blocks
        cache.tail.write_there(k, v, self._sequence, self.positions, self._there)
        most = (self._rows - 1) // blocks.kernel_stride + 1
        number = blocks.num_compressed(self._old)[:, None] + torch.arange(most, device=cache.device)
        complete = number < blocks.num_compressed(self._lengths)[:, None]
        starts = number * blocks.kernel_stride
        positions = starts[..., None] + torch.arange(blocks.kernel_size, device=cache.device)
        k_raw, v_raw = cache.tail.read(self._sequence[..., None], positions)
        layout = cache.layout_of_blocks(most)
        k_cmp, v_cmp = compress(k_raw.flatten(0, 2), v_raw.flatten(0, 2), positions.flatten(), layout, starts.flatten())
        k_cmp, v_cmp = (x.unflatten(0, number.shape) for x in (k_cmp, v_cmp))
        cache.cmp.write_there(k_cmp, v_cmp, self._sequence, number, complete)

    def count(self, block_indices: Tensor) -> None:
        """Tell the cache's counters, if it has some, what was chosen: int32 [B, N, Hk, topk]."""
        if self._cache.counters is not None:
            sequence = self._sequence.expand(-1, self._rows).flatten()
            position = self.positions.where(self._there, -1).flatten()
            self._cache.counters.add(block_indices.flatten(0, 1), position, sequence, self._cache.config.blocks)

    def commit(self) -> None:
        """The new tokens count from now on, on the device; `NSACache.advance` tells the host."""
        self._cache.device_lengths.copy_(self._lengths)
        self._cache.expect_advance()

    def _check(self, branch: str, k: Tensor, v: Tensor) -> None:
        for which, x in enumerate((k, v)):
            self._cache.check_rows(f"{'kv'[which]}_{branch}", x, (self._cache.batch_size, self._rows), which)
