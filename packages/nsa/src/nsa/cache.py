"""Keys and values of one layer while its sequences grow: prefill, chunked prefill and decode."""

from collections.abc import Callable, Sequence
from functools import cached_property
from types import TracebackType
from typing import Self

import torch
from nsa_varlen import PagedKV, VarlenLayout
from nsa_varlen.arguments import FLOATS
from torch import Tensor

from nsa._pages import PagedStream
from nsa.config import NSAConfig

Compress = Callable[[Tensor, Tensor, Tensor, VarlenLayout, Tensor], tuple[Tensor, Tensor]]


class NSACache:
    """Three paged streams of a layer: compressed blocks, selected keys, window keys; and the raw tokens of the block
    that is not complete yet.

    ```
    raw cmp tokens  ... [ pending: at most l - 1 ]   a block is emitted when its last token arrives
    cmp stream      one row per complete block
    slc, win        one row per token (one shared stream with `config.shared_kv`)
    ```

    Tokens enter through `extend`, a transaction: an exception inside it leaves the cache as it was.

    Args:
        config: of the layer.
        batch_size: number of sequences.
        max_tokens: capacity per sequence.
        page_size: rows per page, a multiple of `block_size`.
        device, dtype: of the keys and values; None are torch's defaults.

    Raises:
        TypeError, ValueError: sizes that do not fit.

    Example:
        >>> from nsa import NSAAttention, NSAConfig
        >>> config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
        >>> layer, cache = NSAAttention(config), NSACache(config, batch_size=1, max_tokens=256)
        >>> with torch.no_grad():
        ...     prefill = layer(torch.randn(1, 100, 64), cache=cache)
        ...     step = layer(torch.randn(1, 1, 64), cache=cache)
        >>> step.shape, cache.lengths
        (torch.Size([1, 1, 64]), (101,))
    """

    def __init__(
        self,
        config: NSAConfig,
        batch_size: int,
        max_tokens: int,
        *,
        page_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(config, NSAConfig):
            raise TypeError(f"config: expected an NSAConfig, got {type(config).__name__}")
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("page_size", page_size)):
            if type(value) is not int:
                raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if page_size % config.block_size:
            raise ValueError(f"page_size: expected a multiple of block_size={config.block_size}, got {page_size}")
        self.config = config
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.dtype not in FLOATS:
            raise TypeError(f"dtype: expected one of {[str(x) for x in FLOATS]}, got {self.dtype}")
        heads, dims = config.num_kv_heads, (config.head_dim, config.value_dim)
        max_cmp = config.blocks.num_compressed(max_tokens)
        anywhere = torch.empty(0, device=device).device
        self.cmp = PagedStream(batch_size, max_cmp, page_size, heads, dims, anywhere, self.dtype)
        self.slc = PagedStream(batch_size, max_tokens, page_size, heads, dims, anywhere, self.dtype)
        self.win = (
            self.slc
            if config.shared_kv
            else PagedStream(batch_size, max_tokens, page_size, heads, dims, anywhere, self.dtype)
        )
        self.pending_k, self.pending_v = (
            torch.zeros(batch_size, config.kernel_size - 1, heads, dim, device=anywhere, dtype=self.dtype)
            for dim in dims
        )
        self._lengths = [0] * batch_size
        self._step: CacheStep | None = None  # the one that is open

    @property
    def device(self) -> torch.device:
        """Where the pages live."""
        return self.slc.k_pages.device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, known on the host."""
        return tuple(self._lengths)

    def extend(self, lengths: Sequence[int]) -> "CacheStep":
        """Begin to append `lengths[b]` tokens to each sequence; see `CacheStep`.

        Raises:
            TypeError: a length is not an int.
            ValueError: a wrong number of lengths, a negative one, or one past the capacity.
        """
        if isinstance(lengths, str) or not isinstance(lengths, Sequence):
            raise TypeError(f"lengths: expected a sequence of ints, got {type(lengths).__name__}")
        if len(lengths) != self.batch_size:
            raise ValueError(f"lengths: expected {self.batch_size}, one per sequence, got {len(lengths)}")
        self._check_room("lengths", lengths)
        return CacheStep(self, list(lengths))

    def reserve(self, tokens: int) -> None:
        """Take pages for `tokens` more tokens of each sequence now, so that a later `extend` allocates none.

        Raises:
            TypeError: tokens is not an int.
            ValueError: it is negative, or past the capacity of a sequence.
        """
        self._check_room("tokens", [tokens] * self.batch_size)
        self._reserve([length + tokens for length in self._lengths])

    def _check_room(self, name: str, lengths: Sequence[int]) -> None:
        for sequence, (old, new) in enumerate(zip(self._lengths, lengths, strict=True)):
            if type(new) is not int:
                raise TypeError(f"{name}: expected ints, got {new!r} of type {type(new).__name__}")
            if new < 0:
                raise ValueError(f"{name}: expected at least 0, got {new} for sequence {sequence}")
            if old + new > self.max_tokens:
                raise ValueError(
                    f"{name}: expected at most max_tokens={self.max_tokens} tokens per sequence, got {old} + {new} "
                    f"for sequence {sequence}"
                )

    def reset(self) -> None:
        """Forget all sequences and return their pages.

        Raises:
            RuntimeError: a step is open.
        """
        if self._step is not None:
            raise RuntimeError("cache: expected no open step to reset, got one")
        self._lengths = [0] * self.batch_size
        for stream in self._streams():
            stream.release(self._lengths)

    def _streams(self) -> list[PagedStream]:
        return [self.cmp, self.slc] if self.win is self.slc else [self.cmp, self.slc, self.win]

    def _reserve(self, lengths: list[int]) -> None:
        compressed, *raw = self._streams()
        compressed.reserve([self.config.blocks.num_compressed(length) for length in lengths])
        for stream in raw:
            stream.reserve(lengths)


class CacheStep:
    """New tokens on their way into a cache. Leaving the `with` block commits them; an exception drops them.

    Write all three branches, then attend to `cmp`, `slc` and `win` with `layout`. One step at a time may be
    open, and only there it takes tokens; anything else is a RuntimeError.

    Fields:
        layout: the new tokens as queries over all the tokens of each sequence.

    Example:
        >>> from nsa import ops
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

    def __init__(self, cache: NSACache, lengths: list[int]) -> None:
        self._cache = cache
        self._old = list(cache.lengths)
        self._total = [old + new for old, new in zip(self._old, lengths, strict=True)]
        blocks = cache.config.blocks
        self.layout = VarlenLayout.from_lengths(lengths, self._total, cache.device)
        self._old_cmp = [blocks.num_compressed(old) for old in self._old]
        self._total_cmp = [blocks.num_compressed(total) for total in self._total]
        self._commit_pending: Callable[[], None] | None = None
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
            for stream, rows in zip(self._cache._streams(), self._held, strict=True):
                stream.release(rows)
            if kind is None:
                raise RuntimeError(f"step: expected slc, win and cmp to be written, got no {sorted(self._unwritten)}")
            return
        if self._commit_pending is not None:
            self._commit_pending()
        self._cache._lengths = self._total

    @property
    def cmp(self) -> tuple[PagedKV, PagedKV]:
        """Compressed keys and values, with the blocks that this step completes."""
        return self._cache.cmp.views(self._lengths_tensor(self._total_cmp))

    @property
    def slc(self) -> tuple[PagedKV, PagedKV]:
        """Keys and values of the selected branch, the new tokens included."""
        return self._cache.slc.views(self._lengths_tensor(self._total))

    @property
    def win(self) -> tuple[PagedKV, PagedKV]:
        """Keys and values of the window, the new tokens included."""
        return self._cache.win.views(self._lengths_tensor(self._total))

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
        if self._total_cmp == self._old_cmp:
            self._commit_pending = lambda: self._append_pending(k, v)
            self._unwritten.discard("cmp")
            return
        pending = [old - count * stride for old, count in zip(self._old, self._old_cmp, strict=True)]
        kept = [total - count * stride for total, count in zip(self._total, self._total_cmp, strict=True)]
        rows = [total - count * stride for total, count in zip(self._total, self._old_cmp, strict=True)]
        raw = VarlenLayout.from_lengths(rows, device=cache.device)
        waiting = VarlenLayout.from_lengths(pending, device=cache.device)
        first = raw.cu_seqlens_k[:-1].long()
        waiting_rows = first[waiting.sequence_of_keys()] + waiting.key_positions()
        first_new = first + torch.tensor(pending, device="cpu").to(cache.device)
        new_rows = first_new[self.new.sequence_of_keys()] + self.new.key_positions()
        # The last `kept` rows of each sequence wait for the next step; rows past them are never read.
        place = torch.arange(cache.pending_k.shape[1], device=cache.device)
        first_kept = raw.cu_seqlens_k[1:].long() - torch.tensor(kept, device="cpu").to(cache.device)
        kept_rows = (first_kept[:, None] + place).clamp_max(raw.total_k - 1)
        k_raw, v_raw = k.new_empty(raw.total_k, *k.shape[1:]), v.new_empty(raw.total_k, *v.shape[1:])
        for joined, old, x in ((k_raw, cache.pending_k, k), (v_raw, cache.pending_v, v)):
            joined[waiting_rows] = old[waiting.sequence_of_keys(), waiting.key_positions()]
            joined[new_rows] = x
        shift = torch.tensor(self._old_cmp, device="cpu").to(cache.device) * stride
        positions = raw.key_positions() + shift[raw.sequence_of_keys()]
        starts = raw.compressed_starts(cache.config.blocks)
        starts = starts + shift[raw.sequence_of_compressed(cache.config.blocks)]
        k_cmp, v_cmp = compress(k_raw, v_raw, positions, raw, starts)
        counts = [total - old for total, old in zip(self._total_cmp, self._old_cmp, strict=True)]
        emitted = VarlenLayout.from_lengths(counts, self._total_cmp, cache.device)
        self._check("compressed k", k_cmp, emitted.total_q, 0)
        self._check("compressed v", v_cmp, emitted.total_q, 1)
        cache.cmp.write(k_cmp, v_cmp, emitted.sequence_of_queries(), emitted.positions())
        kept_k, kept_v = k_raw[kept_rows], v_raw[kept_rows]
        self._commit_pending = lambda: self._replace_pending(kept_k, kept_v)
        self._unwritten.discard("cmp")

    def _append_pending(self, k: Tensor, v: Tensor) -> None:
        first = torch.tensor(self._old_cmp, device="cpu").to(self._cache.device) * self._cache.config.kernel_stride
        sequence = self.layout.sequence_of_queries()
        place = self.layout.positions() - first[sequence]
        self._cache.pending_k[sequence, place] = k
        self._cache.pending_v[sequence, place] = v

    def _replace_pending(self, k: Tensor, v: Tensor) -> None:
        self._cache.pending_k.copy_(k)
        self._cache.pending_v.copy_(v)

    def _check(self, name: str, x: Tensor, rows: int, which: int) -> None:
        if self._cache._step is not self:
            raise RuntimeError("step: expected to be used inside its `with` block, got a call outside it")
        config = self._cache.config
        expected = (rows, config.num_kv_heads, (config.head_dim, config.value_dim)[which])
        if x.shape != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(x.shape)}")
        if x.dtype != self._cache.dtype:
            raise TypeError(f"{name}: expected dtype {self._cache.dtype} of the cache, got {x.dtype}")
        if x.device != self._cache.device:
            raise ValueError(f"{name}: expected device {self._cache.device} of the cache, got {x.device}")

    def _lengths_tensor(self, lengths: list[int]) -> Tensor:
        return torch.tensor(lengths, dtype=torch.int32, device="cpu").to(self._cache.device)
