"""Keys and values of one layer while its sequences grow, shrink, split, join and leave."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nsa_varlen import VarlenLayout
from nsa_varlen.arguments import FLOATS
from nsa_varlen.keeping import outside_inference
from nsa_varlen.transfer import to_device
from torch import Tensor

from nsa.cache_step import CacheStep
from nsa.compression import POOLED
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.pages import Change, PagedStream, PagePool
from nsa.raw_tail import RawTail
from nsa.reads import ReadCounters
from nsa.rope import make_rope
from nsa.selection_overlap import ChosenBlocks
from nsa.sizes import check_size


class NSACache:
    """Three paged streams of a layer, and the raw tokens that compressed blocks still to come are made of.

    ```
    raw cmp tokens   ... [ tail ]      a block is emitted when its last token arrives
    cmp stream       one row per complete block
    slc, win         one row per token (one shared stream with `config.shared_kv`)
    ```

    Tokens enter through `extend`, a transaction: an exception inside it leaves the cache as it was (but of pages that
    others hold too and that it would have written to, it keeps copies). `decode` is the way in for CUDA graphs, with
    `reserve` before and `advance` after. `truncate` takes tokens back, `free` ends a sequence, `share`, `adopt` and
    `fork` let sequences begin with the same pages, `export` and `restore` carry one elsewhere. What would need more
    pages than the pool has raises `CacheFull` and changes nothing. Pages that several hold are copied when one of them
    writes.

    Pages of the window that no query can reach any more are returned: those behind `window_size + rollback` tokens,
    unless others hold them too, or the stream is shared with slc.

    While `counters` is a `nsa.reads.ReadCounters`, steps count there what their queries read.

    Args:
        config: of the layer.
        batch_size: number of sequences.
        max_tokens: capacity per sequence.
        page_size: rows per page, a multiple of `block_size`.
        rollback: how many tokens `truncate` can take back at least, from the most that a sequence had.
        pool: where pages come from, of the same rows, page size, device and dtype; several caches may share it. None
            is a pool of the cache's own, in which all sequences fit at their capacity.
        device, dtype: of the keys and values; None are torch's defaults, or the pool's.

    Raises:
        TypeError, ValueError: sizes that do not fit.

    Example:
        >>> from nsa import NSAAttention
        >>> from nsa_varlen import VarlenLayout
        >>> config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
        >>> layer, cache = NSAAttention(config), NSACache(config, batch_size=2, max_tokens=256)
        >>> with torch.no_grad():
        ...     prefill = layer(torch.randn(100, 64), layout=VarlenLayout.from_lengths([100, 0]), cache=cache)
        ...     cache.fork(0, 1)
        ...     step = layer(torch.randn(2, 1, 64), cache=cache)
        >>> step.shape, cache.lengths
        (torch.Size([2, 1, 64]), (101, 101))
    """

    def __init__(
        self,
        config: NSAConfig,
        batch_size: int,
        max_tokens: int,
        *,
        page_size: int = 64,
        rollback: int = 8,
        pool: PagePool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(config, NSAConfig):
            raise TypeError(f"config: expected an NSAConfig, got {type(config).__name__}")
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("page_size", page_size)):
            check_size(name, value)
        check_size("rollback", rollback, 0)
        if page_size % config.block_size:
            raise ValueError(f"page_size: expected a multiple of block_size={config.block_size}, got {page_size}")
        self.config = config
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.rollback = rollback
        if pool is None:
            dtype = torch.get_default_dtype() if dtype is None else dtype
            if dtype not in FLOATS:
                raise TypeError(f"dtype: expected one of {[str(x) for x in FLOATS]}, got {dtype}")
            num_pages = batch_size * _pages_of(config, max_tokens, max_tokens, page_size, rollback)
            pool = PagePool.for_config(config, num_pages, page_size=page_size, device=device, dtype=dtype)
        else:
            _check_pool(pool, config, page_size, device, dtype)
        self.pool = pool
        self.cmp = PagedStream(pool, batch_size, max(1, config.blocks.num_compressed(max_tokens)))
        self.slc = PagedStream(pool, batch_size, max_tokens)
        self.win = self.slc if config.shared_kv else PagedStream(pool, batch_size, max_tokens)
        dims = config.head_dim, config.value_dim
        size = config.kernel_size - 1 + max(1, rollback)
        self.tail = RawTail(batch_size, size, config.num_kv_heads, dims, self.device, self.dtype)
        self.device_lengths = outside_inference(torch.zeros)(batch_size, dtype=torch.int32, device=self.device)
        self._lengths = [0] * batch_size
        # Lengths up to which each sequence is known to have pages of its own: what needs no plan. 0 is not known.
        self._ready = [0] * batch_size
        self._step: CacheStep | None = None  # the one that is open
        self._ahead = False  # the device's lengths are ahead of the host's
        self._counters: ReadCounters | None = None
        self.chosen: ChosenBlocks | None = None  # an observed layer's
        self._layouts: dict[int, VarlenLayout] = {}
        # Made here, so that no graph's capture has to.
        self.places = outside_inference(torch.arange)(self.most_decoded, device=self.device)
        self.rotation = self._rotation()

    @property
    def device(self) -> torch.device:
        """Where the pages live."""
        return self.pool.k_pages.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self.pool.k_pages.dtype

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, known on the host; `device_lengths` int32 [B] has them on the device."""
        return tuple(self._lengths)

    @property
    def counters(self) -> ReadCounters | None:
        """Where steps count what their queries read; None counts nothing.

        Raises:
            TypeError, ValueError: set to what does not fit. A step would find out when its tokens are stored.
        """
        return self._counters

    @counters.setter
    def counters(self, counters: ReadCounters | None) -> None:
        if counters is not None:
            if not isinstance(counters, ReadCounters):
                raise TypeError(f"counters: expected a ReadCounters or None, got {type(counters).__name__}")
            batch_size, device = len(counters.last), counters.last.device
            if batch_size != self.batch_size or device != self.device:
                raise ValueError(
                    f"counters: expected batch_size {self.batch_size} on {self.device}, got {batch_size} on {device}"
                )
        self._counters = counters

    def pages_for(self, tokens: int, chunk: int = 1) -> int:
        """The most pages that a sequence holds while it grows to `tokens`, in steps of at most `chunk`.

        Example:
            >>> config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
            >>> cache = NSACache(config, batch_size=1, max_tokens=65_536)
            >>> cache.pages_for(65_536), cache.pages_for(65_536, chunk=65_536)
            (1098, 2112)
        """
        check_size("tokens", tokens, 0)
        check_size("chunk", chunk)
        return _pages_of(self.config, tokens, chunk, self.pool.page_size, self.rollback)

    def extend(self, lengths: Sequence[int]) -> CacheStep:
        """Begin to append `lengths[b]` tokens to each sequence; see `CacheStep`.

        Raises:
            TypeError: a length is not an int.
            ValueError: a wrong number of lengths, a negative one, or one past the capacity.
        """
        self._check_told()
        self._check_room("lengths", lengths)
        return CacheStep(self, list(lengths))

    @property
    def most_decoded(self) -> int:
        """How many tokens of a sequence one decode step takes: what the raw tail has room for."""
        return max(1, self.rollback)

    def decode(self, rows: int, counts: Tensor | None = None) -> DecodeStep:
        """Begin to append up to `rows` tokens a sequence, at lengths that only the device knows; see `DecodeStep`.

        `reserve` takes their pages before, `advance` tells the host afterwards: both outside a CUDA graph, around each
        replay.

        Args:
            rows: N, at most `most_decoded`.
            counts: int32 [B] on the device, 0 to N: how many of them are tokens. None is all.

        Raises:
            TypeError, ValueError: arguments that do not fit.
            RuntimeError: a step is open, the last one was not told to the host, or pages were not reserved. Of counts
                on a GPU `advance` finds that out, when it is too late for the tokens.
        """
        self._check_idle()
        check_size("rows", rows)
        if rows > self.most_decoded:
            raise ValueError(f"rows: expected at most {self.most_decoded} (rollback={self.rollback}), got {rows}")
        known = None
        if counts is None:
            counts, known = torch.full_like(self.device_lengths, rows), [rows] * self.batch_size
        elif not isinstance(counts, Tensor):
            raise TypeError(
                f"counts: expected a torch.int32 tensor [{self.batch_size}] or None, got {type(counts).__name__}"
            )
        elif counts.dtype != torch.int32 or counts.shape != (self.batch_size,) or counts.device != self.device:
            raise ValueError(
                f"counts: expected torch.int32 [{self.batch_size}] on {self.device}, got {counts.dtype} "
                f"{list(counts.shape)} on {counts.device}"
            )
        elif self.device.type == "cpu":
            known = counts.tolist()
        if known is not None and not _capturing(self.device):
            self._check_reserved([old + new for old, new in zip(self._lengths, known, strict=True)])
        return DecodeStep(self, rows, counts)

    def advance(self, tokens: int | Sequence[int]) -> None:
        """Tell the host what a decode step, or a graph that holds one, appended to each sequence.

        Raises:
            TypeError, ValueError: as of `reserve`.
            RuntimeError: pages for these tokens had not been reserved. They are lost; `advance(0)` and a `truncate` to
                the length before forget them.
        """
        lengths = self._grown(tokens)
        self._check_reserved(lengths)
        self._lengths = lengths
        self.tail.advance(self._lengths)
        self._ahead = False

    def expect_advance(self) -> None:
        """A decode step ran: nothing else may happen until the host is told. A graph's capture runs nothing."""
        self._ahead = not _capturing(self.device)

    def layout_of_blocks(self, each: int) -> VarlenLayout:
        """The tokens of `each` compressed blocks a sequence, block by block: made once."""
        if each not in self._layouts:
            lengths = [self.config.kernel_size] * (each * self.batch_size)
            self._layouts[each] = VarlenLayout.from_lengths(lengths, device=self.device)
        return self._layouts[each]

    def check_rows(self, name: str, x: Tensor, rows: tuple[int, ...], which: int) -> None:
        """Raise unless x [*rows, Hk, D] are new rows for this cache: keys if `which` is 0, values if it is 1."""
        config = self.config
        expected = (*rows, config.num_kv_heads, (config.head_dim, config.value_dim)[which])
        if x.shape != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(x.shape)}")
        if x.dtype != self.dtype:
            raise TypeError(f"{name}: expected dtype {self.dtype} of the cache, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected device {self.device} of the cache, got {x.device}")

    def reserve(self, tokens: int | Sequence[int]) -> None:
        """Take pages for so many more tokens of each sequence now, so that a later step takes none.

        Raises:
            TypeError: tokens is neither an int nor a sequence of them.
            ValueError: it is negative, or past the capacity of a sequence.
            CacheFull: the pool has not enough pages.
            RuntimeError: a step is open, or the last one was not told to the host.
        """
        self._check_idle()
        lengths = self._grown(tokens)
        self._release_behind_window()
        self._reserve(lengths)

    def shortest(self, sequence: int) -> int:
        """The least length to which `truncate` can bring a sequence, beside 0: `rollback` tokens back, or more."""
        self._check_sequence("sequence", sequence)
        found = self._lengths[sequence]
        while found > 0 and self._holds_context(sequence, found - 1):
            found -= 1
        return found

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence, as if the others had never come.

        Raises:
            TypeError: arguments that are no ints.
            ValueError: no such sequence; longer than it is; or shorter than `shortest(sequence)`, and not 0.
            RuntimeError: a step is open.
        """
        self._check_idle()
        self._check_prefix(sequence, length)
        if length == 0:
            self.tail.forget(sequence)
        if self.chosen is not None and length < self._lengths[sequence]:
            self.chosen.forget(sequence)  # what comes in its place is another query
        lengths = list(self._lengths)
        lengths[sequence] = length
        self._commit(lengths)
        self._release_beyond(sequence, length)

    def free(self, sequence: int) -> None:
        """End a sequence: it is empty, and its pages are no longer held.

        Raises:
            TypeError, ValueError: no such sequence.
            RuntimeError: a step is open.
        """
        self.truncate(sequence, 0)

    def share(self, sequence: int, length: int | None = None) -> "SharedPrefix":
        """Hold the first `length` tokens of a sequence (None: all), so that others can begin with them: `adopt`.

        Raises:
            TypeError, ValueError: as of `truncate`.
            RuntimeError: a step is open.
        """
        self._check_idle()
        self._check_sequence("sequence", sequence)
        length = self._lengths[sequence] if length is None else length
        self._check_prefix(sequence, length)
        self._ready[sequence] = 0  # the page that it is about to write to will have two holders
        rows = self._rows_of(length)
        pages = tuple(tuple(stream.share(sequence, count)) for stream, count in zip(self._streams(), rows, strict=True))
        start = self.win.first_row(sequence) if length else 0
        return SharedPrefix(self.config, self.pool, length, pages, start, *self.tail.take(sequence, length))

    def adopt(self, sequence: int, prefix: "SharedPrefix") -> None:
        """Begin an empty sequence with a shared prefix. No row is copied until one of its holders writes to its page.

        Raises:
            TypeError, ValueError: no such sequence, one that is not empty, or a prefix that does not fit.
            RuntimeError: a step is open.
        """
        self._check_idle()
        self._check_empty("sequence", sequence)
        if not isinstance(prefix, SharedPrefix):
            raise TypeError(f"prefix: expected a SharedPrefix, got {type(prefix).__name__}")
        if prefix.pool is not self.pool or prefix.config != self.config:
            raise ValueError("prefix: expected one of this cache's pool and configuration, got another's")
        if not prefix.pages:
            raise ValueError("prefix: expected one that is held, got one that was dropped")
        self._check_capacity("prefix", prefix.length)
        self._release_beyond(sequence, 0)  # what was reserved
        starts = [0, 0, prefix.start]
        for stream, pages, start in zip(self._streams(), prefix.pages, starts, strict=False):
            stream.adopt(sequence, pages, start)
        self._begin(sequence, prefix.length, prefix.k_raw, prefix.v_raw)

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """Begin the empty sequence `target` with the first `length` tokens of `source` (None: all).

        Raises:
            TypeError, ValueError: as of `share` and `adopt`.
            RuntimeError: a step is open.
        """
        self._check_idle()
        self._check_sequence("source", source)
        self._check_empty("target", target)
        prefix = self.share(source, length)
        try:
            self.adopt(target, prefix)
        finally:
            prefix.drop()

    def export(self, sequence: int) -> "SequenceState":
        """A copy of a sequence: what another cache, perhaps elsewhere, needs to go on with it.

        Raises:
            TypeError, ValueError: no such sequence.
            RuntimeError: a step is open.
        """
        self._check_idle()
        self._check_sequence("sequence", sequence)
        length, starts = self._lengths[sequence], [0, 0, self.win.first_row(sequence)]
        streams = []
        for stream, start, count in zip(self._streams(), starts, self._rows_of(length), strict=False):
            k, v = (x.span(sequence, start, count).clone() for x in stream.views(self.device_lengths))
            streams.append((k, v))
        return SequenceState(length, tuple(streams), starts[-1], *self.tail.take(sequence, length))

    def restore(self, sequence: int, state: "SequenceState") -> None:
        """Begin an empty sequence with an exported one.

        Raises:
            TypeError, ValueError: no such sequence, one that is not empty, or a state that does not fit.
            CacheFull: the pool has not enough pages.
            RuntimeError: a step is open.
        """
        self._check_idle()
        self._check_empty("sequence", sequence)
        self._check_state(state)
        length, rows = state.length, self._rows_of(state.length)
        starts = [0, 0, state.start][: len(rows)]
        # Pages before the first row are none: they are not taken, so that a long sequence fits where it fitted.
        skipped = [start // self.pool.page_size for start in starts]
        needed = sum(-(-count // self.pool.page_size) - skip for count, skip in zip(rows, skipped, strict=True))
        reserved = sum(len(stream.pages(sequence)) for stream in self._streams())  # nobody else holds these
        self.pool.check_room(needed - reserved)
        self._release_beyond(sequence, 0)
        plans = [stream.plan([(sequence, 0, count)]) for stream, count in zip(self._streams(), rows, strict=True)]
        plans = [plan[skip:] for plan, skip in zip(plans, skipped, strict=True)]
        for stream, plan, skip, start, (k, v) in zip(
            self._streams(), plans, skipped, starts, state.streams, strict=True
        ):
            stream.adopt(sequence, [-1] * skip, start)
            stream.carry_out(plan)
            position = torch.arange(start, start + len(k), device=self.device)
            stream.write(k, v, torch.full_like(position, sequence), position)
        self._begin(sequence, length, state.k_raw, state.v_raw)

    def reset(self) -> None:
        """End all sequences.

        Raises:
            RuntimeError: a step is open.
        """
        self._check_idle()
        for sequence in range(self.batch_size):
            self.free(sequence)

    def _rotation(self) -> Tensor | None:
        """[2, blocks, Dk / 2]: what rotates the keys of pooled blocks, as many as there is room for."""
        rope, config = make_rope(self.config), self.config
        if rope is None or config.rope_cmp != "after" or config.compression not in POOLED:
            return None
        room = self.cmp.block_table.shape[1] * self.cmp.page_size
        return rope.table(room, config.kernel_stride, self.device, self.dtype)

    def _streams(self) -> list[PagedStream]:
        return [self.cmp, self.slc] if self.win is self.slc else [self.cmp, self.slc, self.win]

    def _rows_of(self, length: int) -> list[int]:
        """Rows of each stream for a sequence of `length` tokens."""
        return [self.config.blocks.num_compressed(length), *[length] * (len(self._streams()) - 1)]

    def _reserve(self, lengths: Sequence[int]) -> None:
        """Pages of their own for all rows behind those that the sequences have, up to these lengths, or none."""
        unready = self._unready(lengths)
        if not unready:
            return
        plans = self._plans(lengths, unready)
        self.pool.check_room(sum(len(changes) for _, changes in plans))
        for stream, changes in plans:
            stream.carry_out(changes)
        for sequence in unready:
            self._ready[sequence] = self._own_tokens(sequence)

    def _grown(self, tokens: int | Sequence[int]) -> list[int]:
        """The sequences' lengths with so many more tokens, checked."""
        more = [tokens] * self.batch_size if isinstance(tokens, int) else tokens
        self._check_room("tokens", more)
        return [old + new for old, new in zip(self._lengths, more, strict=True)]

    def _unready(self, lengths: Sequence[int]) -> list[int]:
        """Sequences that may need pages to grow to these lengths."""
        known = zip(self._lengths, lengths, self._ready, strict=True)
        return [sequence for sequence, (old, new, ready) in enumerate(known) if new > ready and new > old]

    def _plans(self, lengths: Sequence[int], sequences: Sequence[int]) -> list[tuple[PagedStream, list[Change]]]:
        """What each stream needs for rows of some sequences up to these lengths; streams that need nothing are left
        out.
        """
        old, new = ([self._rows_of(x[sequence]) for sequence in sequences] for x in (self._lengths, lengths))
        plans = []
        for number, stream in enumerate(self._streams()):
            spans = ((b, x[number], y[number]) for b, x, y in zip(sequences, old, new, strict=True))
            plans.append((stream, stream.plan(spans)))
        return [(stream, changes) for stream, changes in plans if changes]

    def _own_tokens(self, sequence: int) -> int:
        """The length to which a sequence can grow in pages that nobody else holds."""
        blocks, first = self.config.blocks, self._rows_of(self._lengths[sequence])
        compressed, *raw = (stream.own_rows(sequence, row) for stream, row in zip(self._streams(), first, strict=True))
        return min(compressed * blocks.kernel_stride + blocks.kernel_size - 1, *raw)

    def _commit(self, lengths: Sequence[int]) -> None:
        """These are the sequences' lengths from now on."""
        self._lengths = list(lengths)
        self.device_lengths.copy_(to_device(torch.tensor(self._lengths, dtype=torch.int32, device="cpu"), self.device))
        self._release_behind_window()

    def _release_behind_window(self) -> None:
        if self.win is not self.slc:
            reach = self.config.window_size - 1 + self.rollback
            self.win.release_before([length - reach for length in self._lengths])

    def _release_beyond(self, sequence: int, length: int) -> None:
        self._ready[sequence] = 0
        for stream, count in zip(self._streams(), self._rows_of(length), strict=True):
            rows = stream.held()
            rows[sequence] = count
            stream.release(rows)

    def _give_back(self, held: Sequence[Sequence[int]]) -> None:
        """Pages beyond the rows that each stream held of each sequence."""
        self._ready = [0] * self.batch_size
        for stream, rows in zip(self._streams(), held, strict=True):
            stream.release(rows)

    def _begin(self, sequence: int, length: int, k_raw: Tensor, v_raw: Tensor) -> None:
        if self.chosen is not None:
            self.chosen.forget(sequence)
        self.tail.put(sequence, k_raw, v_raw, length)
        lengths = list(self._lengths)
        lengths[sequence] = length
        self._commit(lengths)

    def _holds_context(self, sequence: int, length: int) -> bool:
        """Whether a query right behind the first `length` tokens finds its window, and the next block its tokens."""
        if length == 0:
            return True
        unmade = self.config.blocks.num_compressed(length) * self.config.kernel_stride
        reached = max(0, length - self.config.window_size + 1)
        return self.tail.first(sequence) <= unmade and self.win.first_row(sequence) <= reached

    def _check_idle(self) -> None:
        if self._step is not None:
            raise RuntimeError("cache: expected no open step, got one")
        self._check_told()

    def _check_told(self) -> None:
        if self._ahead:
            raise RuntimeError("cache: expected advance() after a decode step, got none")

    def _check_reserved(self, lengths: Sequence[int]) -> None:
        unready = self._unready(lengths)
        if unready and self._plans(lengths, unready):
            more = [new - old for old, new in zip(self._lengths, lengths, strict=True)]
            raise RuntimeError(f"cache: expected pages for {more} more tokens, got too few: reserve comes first")

    def _check_sequence(self, name: str, sequence: object) -> None:
        check_size(name, sequence, 0)
        if sequence >= self.batch_size:  # type: ignore[operator]
            raise ValueError(f"{name}: expected one of {self.batch_size}, got {sequence}")

    def _check_empty(self, name: str, sequence: int) -> None:
        self._check_sequence(name, sequence)
        if self._lengths[sequence]:
            raise ValueError(f"{name}: expected an empty one, got {sequence} with {self._lengths[sequence]} tokens")

    def _check_prefix(self, sequence: int, length: int) -> None:
        self._check_sequence("sequence", sequence)
        check_size("length", length, 0)
        if length > (most := self._lengths[sequence]):
            raise ValueError(f"length: expected at most {most}, the tokens of sequence {sequence}, got {length}")
        if not self._holds_context(sequence, length):
            raise ValueError(
                f"length: expected 0 or at least {self.shortest(sequence)} for sequence {sequence} "
                f"(rollback={self.rollback}), got {length}"
            )

    def _check_capacity(self, name: str, length: int) -> None:
        if length > self.max_tokens:
            raise ValueError(f"{name}: expected at most max_tokens={self.max_tokens} tokens, got {length}")

    def _check_room(self, name: str, lengths: object) -> None:
        if isinstance(lengths, str) or not isinstance(lengths, Sequence):
            raise TypeError(f"{name}: expected a sequence of ints, got {type(lengths).__name__}")
        if len(lengths) != self.batch_size:
            raise ValueError(f"{name}: expected {self.batch_size}, one per sequence, got {len(lengths)}")
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

    def _check_state(self, state: object) -> None:
        if not isinstance(state, SequenceState):
            raise TypeError(f"state: expected a SequenceState, got {type(state).__name__}")
        self._check_capacity("state", state.length)
        config, rows = self.config, self._rows_of(state.length)
        reached = 0 if config.shared_kv else max(0, state.length - config.window_size + 1)
        if not 0 <= state.start <= reached:
            raise ValueError(f"state: expected the window's rows from {reached} on, got them from {state.start}")
        if not config.shared_kv:
            rows[2] -= state.start
        dims = config.head_dim, config.value_dim
        expected = [[(count, config.num_kv_heads, dim) for dim in dims] for count in rows]
        got = [[tuple(x.shape) for x in stream] for stream in state.streams]
        if got != expected:
            raise ValueError(f"state: expected streams of k and v {expected}, got {got}")
        waiting = state.length - config.blocks.num_compressed(state.length) * config.kernel_stride
        raw, shapes = len(state.k_raw), [tuple(x.shape) for x in (state.k_raw, state.v_raw)]
        if not waiting <= raw <= state.length or shapes != [(raw, config.num_kv_heads, dim) for dim in dims]:
            raise ValueError(
                f"state: expected {waiting} to {state.length} raw rows of {config.num_kv_heads} heads and {dims}, "
                f"got {shapes}"
            )
        for x in (x for stream in (*state.streams, (state.k_raw, state.v_raw)) for x in stream):
            if x.dtype != self.dtype:
                raise TypeError(f"state: expected dtype {self.dtype} of the cache, got {x.dtype}")
            if x.device != self.device:
                raise ValueError(f"state: expected device {self.device} of the cache, got {x.device}")


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The first tokens of a sequence, held for others to begin with: from `NSACache.share`, for `NSACache.adopt`.

    It holds its pages until `drop`, whatever becomes of the sequence that it came from.

    Fields:
        length: how many tokens.
        pages: of cmp, slc and win; none once dropped.
        start: the first position whose row of the window is there.
        k_raw, v_raw: the raw tokens before `length` of which the next compressed blocks are made; keys are rotated
            already if `rope_cmp` is "before".
    """

    config: NSAConfig
    pool: PagePool
    length: int
    pages: tuple[tuple[int, ...], ...]
    start: int
    k_raw: Tensor
    v_raw: Tensor

    def drop(self) -> None:
        """Hold the pages no longer. A second call does nothing."""
        for pages in self.pages:
            for page in pages:
                if page >= 0:
                    self.pool.drop(page)
        object.__setattr__(self, "pages", ())


@dataclass(frozen=True, eq=False)
class SequenceState:
    """One sequence outside a cache: from `NSACache.export`, for `NSACache.restore`. All rows are copies.

    Fields:
        length: how many tokens.
        streams: (k [rows, Hk, Dk], v [rows, Hk, Dv]) of cmp, slc and win; without win if slc serves the window too.
        start: position of the window's first row; those far behind are gone. 0 if slc serves the window too.
        k_raw, v_raw: the raw tokens before `length` of which the next compressed blocks are made; keys are rotated
            already if `rope_cmp` is "before".
    """

    length: int
    streams: tuple[tuple[Tensor, Tensor], ...]
    start: int
    k_raw: Tensor
    v_raw: Tensor

    def to(self, device: torch.device | str) -> "SequenceState":
        """The same on another device."""
        streams = tuple((k.to(device), v.to(device)) for k, v in self.streams)
        return SequenceState(self.length, streams, self.start, self.k_raw.to(device), self.v_raw.to(device))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pages_of(config: NSAConfig, tokens: int, chunk: int, page_size: int, rollback: int) -> int:
    """The most pages of a sequence that grows to `tokens` in steps of at most `chunk`."""
    raw = -(-tokens // page_size)
    compressed = -(-config.blocks.num_compressed(tokens) // page_size)
    if config.shared_kv:
        return raw + compressed
    # Rows of the window from the first that must stay to the last of a step, wherever in its page the first lies.
    reach = config.window_size - 1 + rollback + chunk
    return raw + compressed + min(raw, -(-(reach + page_size - 1) // page_size))


def _check_pool(
    pool: object, config: NSAConfig, page_size: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    if not isinstance(pool, PagePool):
        raise TypeError(f"pool: expected a PagePool, got {type(pool).__name__}")
    expected = [(page_size, config.num_kv_heads, dim) for dim in (config.head_dim, config.value_dim)]
    got = [tuple(pages.shape[1:]) for pages in (pool.k_pages, pool.v_pages)]
    if got != expected:
        raise ValueError(f"pool: expected pages of [rows, kv heads, dim] {expected}, got {got}")
    if dtype is not None and dtype != pool.k_pages.dtype:
        raise ValueError(f"dtype: expected None or {pool.k_pages.dtype} of the pool, got {dtype}")
    if device is not None and torch.empty(0, device=device).device != pool.k_pages.device:
        raise ValueError(f"device: expected None or {pool.k_pages.device} of the pool, got {device}")
