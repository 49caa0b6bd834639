"""New tokens on their way into a cache."""

from collections.abc import Callable
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from nsa_varlen import PagedKV, VarlenLayout
from nsa_varlen.transfer import to_device
from torch import Tensor

if TYPE_CHECKING:
    from nsa.cache import NSACache

Compress = Callable[[Tensor, Tensor, Tensor, VarlenLayout, Tensor], tuple[Tensor, Tensor]]


class CacheStep:
    """New tokens on their way into a cache. Leaving the `with` block commits them; an exception drops them.

    Write all three branches, then attend to `cmp`, `slc` and `win` with `layout`. One step at a time may be
    open, and only there it takes tokens; anything else is a RuntimeError.

    Fields:
        layout: the new tokens as queries over all the tokens of each sequence.

    Example:
        >>> from nsa import NSACache, NSAConfig, ops
        >>> config = NSAConfig(hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8)
        >>> cache, x = NSACache(config, batch_size=1, max_tokens=64), torch.randn(33, 1, 8)
        >>> def mean(k, v, positions, layout, starts):
        ...     return tuple(ops.compress_mean(x, layout, config.blocks) for x in (k, v))
        >>> with cache.extend([33]) as step:
        ...     step.write_slc(x, x)
        ...     step.write_win(x, x)
        ...     step.write_cmp(x, x, mean)
        ...     k_cmp, v_cmp = step.cmp
        >>> cache.lengths, k_cmp.lengths.tolist()
        ((33,), [1])
    """

    def __init__(self, cache: "NSACache", lengths: list[int]) -> None:
        self._cache = cache
        self._lengths = lengths
        self._old = list(cache.lengths)
        self._total = [old + new for old, new in zip(self._old, lengths, strict=True)]
        blocks = cache.config.blocks
        self.layout = VarlenLayout.from_lengths(lengths, self._total, cache.device)
        self._old_cmp = [blocks.num_compressed(old) for old in self._old]
        self._total_cmp = [blocks.num_compressed(total) for total in self._total]
        self._commit_tail: Callable[[], None] | None = None
        self._unwritten = {"slc", "win", "cmp"} if any(lengths) else set()

    @cached_property
    def new(self) -> VarlenLayout:
        """The new tokens alone, as queries and keys."""
        layout = self.layout
        return VarlenLayout.from_cu_seqlens(
            layout.cu_seqlens_q, max_seqlen_q=layout.max_seqlen_q, total_q=layout.total_q
        )

    def __enter__(self) -> Self:
        if self._cache._step is not None:
            raise RuntimeError("cache: expected one open step at a time, got a second one")
        if list(self._cache.lengths) != self._old:
            raise RuntimeError(f"cache: expected lengths {self._old} as when the step began, got {self._cache.lengths}")
        self._held = [stream.held() for stream in self._cache._streams()]
        self._cache._reserve(self._total)
        self._cache._step = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache._step = None
        if kind is not None or self._unwritten:
            self._cache._give_back(self._held)
            if kind is None:
                raise RuntimeError(f"step: expected slc, win and cmp to be written, got no {sorted(self._unwritten)}")
            return
        if self._commit_tail is not None:
            self._commit_tail()
        self._cache._commit(self._total)

    @property
    def cmp(self) -> tuple[PagedKV, PagedKV]:
        """Compressed keys and values, with the blocks that this step completes."""
        return self._cache.cmp.views(self._on_device(self._total_cmp).int())

    @property
    def slc(self) -> tuple[PagedKV, PagedKV]:
        """Keys and values of the selected branch, the new tokens included."""
        return self._cache.slc.views(self._on_device(self._total).int())

    @property
    def win(self) -> tuple[PagedKV, PagedKV]:
        """Keys and values of the window, the new tokens included."""
        return self._cache.win.views(self._on_device(self._total).int())

    def write_slc(self, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' keys [T, Hk, Dk] and values [T, Hk, Dv] of the selected branch."""
        self._check("k_slc", k, self.layout.total_q, 0)
        self._check("v_slc", v, self.layout.total_q, 1)
        self._cache.slc.write(k, v, self.layout.sequence_of_queries(), self.layout.positions())
        self._unwritten.discard("slc")

    def write_win(self, k: Tensor, v: Tensor) -> None:
        """The same for the window; with `config.shared_kv` the streams are one and there is nothing to store."""
        self._check("k_win", k, self.layout.total_q, 0)
        self._check("v_win", v, self.layout.total_q, 1)
        if self._cache.win is not self._cache.slc:
            self._cache.win.write(k, v, self.layout.sequence_of_queries(), self.layout.positions())
        self._unwritten.discard("win")

    def write_cmp(self, k: Tensor, v: Tensor, compress: Compress) -> None:
        """Store the blocks that the new tokens complete; tokens of a block still open wait for a later step.

        Args:
            k: [T, Hk, Dk], v: [T, Hk, Dv], the new tokens before compression.
            compress: `(k, v, positions, layout, starts) -> (k_cmp, v_cmp)`, called if a block completes, with the
                waiting tokens before the new ones: their rows, int64 positions and layout, and the position at which
                each of the layout's compressed blocks begins.
        """
        self._check("k_cmp", k, self.layout.total_q, 0)
        self._check("v_cmp", v, self.layout.total_q, 1)
        cache, stride = self._cache, self._cache.config.kernel_stride
        self._commit_tail = lambda: cache.tail.write(k, v, self._lengths, self._total)
        self._unwritten.discard("cmp")
        if self._total_cmp == self._old_cmp:
            return
        pending = [old - count * stride for old, count in zip(self._old, self._old_cmp, strict=True)]
        rows = [total - count * stride for total, count in zip(self._total, self._old_cmp, strict=True)]
        raw = VarlenLayout.from_lengths(rows, device=cache.device)
        waiting = VarlenLayout.from_lengths(pending, list(self._old), cache.device)
        first = raw.cu_seqlens_k[:-1].long()
        shift = self._on_device(self._old_cmp) * stride  # position of a sequence's first row
        waiting_sequence, waiting_position = waiting.sequence_of_queries(), waiting.positions()
        new_sequence, new_position = self.layout.sequence_of_queries(), self.layout.positions()
        k_raw, v_raw = k.new_empty(raw.total_k, *k.shape[1:]), v.new_empty(raw.total_k, *v.shape[1:])
        old_k, old_v = cache.tail.read(waiting_sequence, waiting_position)
        for joined, old, x in ((k_raw, old_k, k), (v_raw, old_v, v)):
            joined[(first - shift)[waiting_sequence] + waiting_position] = old
            joined[(first - shift)[new_sequence] + new_position] = x
        positions = raw.key_positions() + shift[raw.sequence_of_keys()]
        starts = raw.compressed_starts(cache.config.blocks)
        starts = starts + shift[raw.sequence_of_compressed(cache.config.blocks)]
        k_cmp, v_cmp = compress(k_raw, v_raw, positions, raw, starts)
        counts = [total - old for total, old in zip(self._total_cmp, self._old_cmp, strict=True)]
        emitted = VarlenLayout.from_lengths(counts, self._total_cmp, cache.device)
        self._check("compressed k", k_cmp, emitted.total_q, 0)
        self._check("compressed v", v_cmp, emitted.total_q, 1)
        cache.cmp.write(k_cmp, v_cmp, emitted.sequence_of_queries(), emitted.positions())

    def count(self, block_indices: Tensor) -> None:
        """Tell the cache's counters, if it has some, what was chosen: int32 [T, Hk, topk]."""
        if self._cache.counters is not None:
            position, sequence = self.layout.positions(), self.layout.sequence_of_queries()
            self._cache.counters.add(block_indices, position, sequence, self._cache.config.blocks)

    def _check(self, name: str, x: Tensor, rows: int, which: int) -> None:
        if self._cache._step is not self:
            raise RuntimeError("step: expected to be used inside its `with` block, got a call outside it")
        self._cache.check_rows(name, x, (rows,), which)

    def _on_device(self, numbers: list[int]) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64, device="cpu"), self._cache.device)
