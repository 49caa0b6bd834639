"""The newest tokens of every sequence on their way into a cache, at lengths that only the device knows."""

from typing import TYPE_CHECKING

import torch
from nsa_varlen import CompletedBlocks, NewTokens, PagedKV, PooledTokens
from torch import Tensor

from nsa.compression import Pool

if TYPE_CHECKING:
    from nsa.cache import NSACache
    from nsa.cache_step import Compress


class DecodeStep:
    """What `NSACache.decode` begins: `ops.decode_attention` stores `new_tokens` and attends to all; then `commit`.

    Unlike a `CacheStep` it asks the host for nothing that changes from step to step: every tensor keeps its shape, and
    a CUDA graph that holds it goes on from wherever the sequences are when it is replayed. It is no transaction.

    Fields:
        counts: int32 [B], how many of the N rows of each sequence are new tokens; the others are padding.
        positions: int64 [B, N], of the rows.

    Example:
        >>> from nsa import NSACache, NSAConfig, ops
        >>> from nsa.compression import Pool
        >>> config = NSAConfig(hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8, rope_theta=None)
        >>> cache, x = NSACache(config, batch_size=2, max_tokens=64), torch.randn(2, 1, 1, 8)
        >>> for _ in range(32):
        ...     cache.reserve(1)
        ...     step = cache.decode(1)
        ...     new = step.new_tokens((x, x), (x, x), (x, x), Pool(None, None))
        ...     pages, gates = (*step.cmp, *step.slc, *step.win), torch.ones(2, 1, 1, 3)
        ...     out, block_indices = ops.decode_attention(x, *pages, gates, step.counts, config.blocks, new=new)
        ...     step.commit()
        ...     cache.advance(1)
        >>> cache.lengths, step.cmp[0].lengths.tolist()
        ((32, 32), [1, 1])
    """

    def __init__(self, cache: "NSACache", rows: int, counts: Tensor) -> None:
        self._cache, self._rows, self.counts = cache, rows, counts
        self.positions = cache.device_lengths[:, None] + cache.places[:rows]
        self._lengths = cache.device_lengths + counts
        self._compressed = torch.empty_like(self._lengths)

    @property
    def cmp(self) -> tuple[PagedKV, PagedKV]:
        """Compressed keys and values. Their lengths are those that the operation finds when it stores the new ones."""
        return self._cache.cmp.views(self._compressed)

    @property
    def slc(self) -> tuple[PagedKV, PagedKV]:
        """Keys and values of the selected branch, the new tokens included."""
        return self._cache.slc.views(self._lengths)

    @property
    def win(self) -> tuple[PagedKV, PagedKV]:
        """Keys and values of the window, the new tokens included."""
        return self._cache.win.views(self._lengths)

    def new_tokens(
        self,
        slc: tuple[Tensor, Tensor],
        win: tuple[Tensor, Tensor],
        cmp: tuple[Tensor, Tensor],
        compress: "Pool | Compress",
    ) -> NewTokens:
        """What `ops.decode_attention` is to store.

        Args:
            slc, win, cmp: keys [B, N, Hk, Dk] and values [B, N, Hk, Dv] of each branch, those of cmp before
                compression; slc and win must be the same with `config.shared_kv`.
            compress: a `Pool`, by which the operation makes the blocks that the tokens complete, or what
                `CacheStep.write_cmp` takes. That is called in every step, for as many blocks as N tokens could
                complete; which of them did, the device decides. Raw tokens are in the cache's tail then.

        Raises:
            TypeError, ValueError: raw rows of cmp that do not fit, if they are compressed here. All else the operation
                checks.
        """
        made = self._pooled(*cmp, compress) if isinstance(compress, Pool) else self._completed(*cmp, compress)
        return NewTokens(*slc, *win, made)

    def _pooled(self, k: Tensor, v: Tensor, pool: Pool) -> PooledTokens:
        tail, config = self._cache.tail, self._cache.config
        return PooledTokens(k, v, tail.k, tail.v, *pool, self._cache.rotation, config.rope_interleaved)

    def _completed(self, k: Tensor, v: Tensor, compress: "Compress") -> CompletedBlocks:
        cache, blocks = self._cache, self._cache.config.blocks
        for name, x, which in (("k_cmp", k, 0), ("v_cmp", v, 1)):
            cache.check_rows(name, x, (cache.batch_size, self._rows), which)
        sequence = torch.arange(cache.batch_size, device=cache.device)[:, None]
        cache.tail.write_there(k, v, sequence, self.positions, self._there())
        most = (self._rows - 1) // blocks.kernel_stride + 1
        number = blocks.num_compressed(cache.device_lengths.long())[:, None] + torch.arange(most, device=cache.device)
        starts = number * blocks.kernel_stride
        positions = starts[..., None] + torch.arange(blocks.kernel_size, device=cache.device)
        k_raw, v_raw = (x.flatten(0, 2) for x in cache.tail.read(sequence[..., None], positions))
        layout = cache.layout_of_blocks(most)
        k_cmp, v_cmp = compress(k_raw, v_raw, positions.flatten(), layout, starts.flatten())
        return CompletedBlocks(k_cmp.unflatten(0, number.shape), v_cmp.unflatten(0, number.shape))

    def _there(self) -> Tensor:
        """Which rows are tokens: bool [B, N]."""
        return self._cache.places[: self._rows] < self.counts[:, None]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Position, -1 for padding, and sequence of each row: int64 [B * N]."""
        sequence = torch.arange(self._cache.batch_size, device=self._cache.device)
        return self.positions.where(self._there(), -1).flatten(), sequence[:, None].expand(-1, self._rows).flatten()

    def count(self, block_indices: Tensor) -> None:
        """Tell the cache's counters, if it has some, what was chosen: int32 [B, N, Hk, topk]."""
        if self._cache.counters is not None:
            self._cache.counters.add(block_indices.flatten(0, 1), *self.rows(), self._cache.config.blocks)

    def commit(self) -> None:
        """The new tokens count from now on, on the device; `NSACache.advance` tells the host."""
        self._cache.device_lengths.copy_(self._lengths)
        self._cache.expect_advance()
