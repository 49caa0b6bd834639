"""Pages of keys and values: the pool that owns them, and streams of sequences that take, share and return them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from nsa_varlen import PagedKV
from nsa_varlen.arguments import FLOATS
from nsa_varlen.keeping import outside_inference
from nsa_varlen.paged import page_slots
from nsa_varlen.transfer import to_device
from torch import Tensor

from nsa.config import NSAConfig
from nsa.sizes import check_size


class CacheFull(RuntimeError):
    """The pool has fewer free pages than are needed. Nothing was taken, and no cache has changed."""


class PagePool:
    """Pages of keys [page_size, H, Dk] and values [page_size, H, Dv], allocated once, and how many hold each.

    One pool serves the three streams of a cache, and the caches of as many layers as are given it: their rows have the
    same shape. A page returns when its last holder drops it.

    Args:
        num_pages, page_size: pages, and rows of a page.
        num_heads, dims: kv heads, (Dk, Dv).
        device, dtype: of the pages; None are torch's defaults.

    Raises:
        TypeError, ValueError: sizes that are no ints of at least 1, a dtype that is not floating point.

    Example:
        >>> pool = PagePool(num_pages=8, page_size=64, num_heads=2, dims=(16, 16))
        >>> pages = pool.take(3)
        >>> pool.share(pages[0])
        >>> for page in pages:
        ...     pool.drop(page)
        >>> pool.num_free, tuple(pool.k_pages.shape)
        (7, (8, 64, 2, 16))
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_heads: int,
        dims: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size), ("num_heads", num_heads)):
            check_size(name, value)
        for value in dims:
            check_size("dims", value)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype: expected None or one of {[str(x) for x in FLOATS]}, got {dtype}")
        self.page_size = page_size
        make = outside_inference(torch.empty)
        self.k_pages, self.v_pages = (
            make(num_pages, page_size, num_heads, dim, device=device, dtype=dtype) for dim in dims
        )
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @classmethod
    def for_config(
        cls,
        config: NSAConfig,
        num_pages: int,
        *,
        page_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A pool whose rows are those of layers of `config`; `NSACache.pages_for` says how many a sequence needs."""
        if not isinstance(config, NSAConfig):
            raise TypeError(f"config: expected an NSAConfig, got {type(config).__name__}")
        dims = config.head_dim, config.value_dim
        return cls(num_pages, page_size, config.num_kv_heads, dims, device=device, dtype=dtype)

    @property
    def num_pages(self) -> int:
        """Pages, free or held."""
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Free pages, held once from now on.

        Raises:
            CacheFull: there are fewer; none was taken.
        """
        self.check_room(count)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def check_room(self, count: int) -> None:
        """Raise CacheFull unless `count` pages are free."""
        if count > self.num_free:
            raise CacheFull(f"pages: needed {count}, got {self.num_free} free of {self.num_pages}")

    def share(self, page: int) -> None:
        """One more holder of a page."""
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """One holder of a page less; the last one returns it."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store rows k [T, H, Dk], v [T, H, Dv] as rows `slots` int64 [T] of all pages."""
        for pages, x in ((self.k_pages, k), (self.v_pages, v)):
            pages.flatten(0, 1)[slots] = x

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole pages, keys and values."""
        if source:
            old, new = (to_device(torch.tensor(x, device="cpu"), self.k_pages.device) for x in (source, target))
            for pages in (self.k_pages, self.v_pages):
                pages[new] = pages[old]


class Change(NamedTuple):
    """A page that a sequence is to get: one more, or in place of one that others hold too."""

    sequence: int
    place: int
    shared: int | None


class PagedStream:
    """Keys and values of a batch of sequences, in pages of a pool.

    Row p of sequence b lies in page `block_table[b, p // page_size]`; -1 is no page. Which sequence holds how many rows
    is its owner's business: every call says it. Pages may have several holders, and only one with a single holder is
    written: `plan` finds those that must be replaced by a copy first.
    """

    def __init__(self, pool: PagePool, batch_size: int, max_rows: int) -> None:
        self.pool = pool
        most = -(-max_rows // pool.page_size)
        self.block_table = outside_inference(torch.full)(
            (batch_size, most), -1, device=pool.k_pages.device, dtype=torch.int32
        )
        self._held: list[list[int]] = [[] for _ in range(batch_size)]
        self._start = [0] * batch_size  # rows before were never written here
        self._gone = [0] * batch_size  # pages that were dropped, from the first on

    @property
    def page_size(self) -> int:
        """Rows of a page."""
        return self.pool.page_size

    @property
    def k_pages(self) -> Tensor:
        """Pages of keys, of the whole pool."""
        return self.pool.k_pages

    @property
    def v_pages(self) -> Tensor:
        """Pages of values, of the whole pool."""
        return self.pool.v_pages

    def pages(self, sequence: int) -> list[int]:
        """The pages of a sequence, in order; -1 where it needs one no longer."""
        return list(self._held[sequence])

    def plan(self, spans: Iterable[tuple[int, int, int]]) -> list[Change]:
        """What it takes to write rows [first, end) of sequences, by (sequence, first, end): a page a change."""
        changes, dropped = [], Counter[int]()
        for sequence, first, end in spans:
            held = self._held[sequence]
            touched = range(first // self.page_size, -(-end // self.page_size)) if first < end else ()
            for index in touched:
                if index >= len(held):
                    changes.append(Change(sequence, index, None))
                elif self.pool.holders(held[index]) - dropped[held[index]] > 1:
                    changes.append(Change(sequence, index, held[index]))
                    dropped[held[index]] += 1
        return changes

    def carry_out(self, changes: Sequence[Change]) -> None:
        """Take a page for each change, with the rows of the page that it replaces."""
        pages = self.pool.take(len(changes))
        copies = {page: c.shared for c, page in zip(changes, pages, strict=True) if c.shared is not None}
        self.pool.copy([*copies.values()], [*copies])
        for change, page in zip(changes, pages, strict=True):
            held = self._held[change.sequence]
            if change.shared is None:
                held.append(page)
            else:
                held[change.place] = page
                self.pool.drop(change.shared)
        self._tell([(change.sequence, change.place, page) for change, page in zip(changes, pages, strict=True)])

    def own_rows(self, sequence: int, first: int) -> int:
        """Up to which row a sequence has pages that nobody else holds, from row `first` on; `first` if it has none."""
        held, place = self._held[sequence], first // self.page_size
        while place < len(held) and self.pool.holders(held[place]) == 1:
            place += 1
        return max(first, place * self.page_size)

    def held(self) -> list[int]:
        """Rows up to which each sequence has pages."""
        return [len(held) * self.page_size for held in self._held]

    def first_row(self, sequence: int) -> int:
        """The first row that is still there."""
        return max(self._start[sequence], self._gone[sequence] * self.page_size)

    def release(self, rows: Sequence[int]) -> None:
        """Drop the pages of each sequence that its first rows[b] rows do not need."""
        told = []
        for sequence, (held, count) in enumerate(zip(self._held, rows, strict=True)):
            keep = -(-count // self.page_size)
            for page in reversed(held[keep:]):
                if page >= 0:
                    self.pool.drop(page)
            told += [(sequence, index, -1) for index in range(keep, len(held))]
            del held[keep:]
            self._gone[sequence] = min(self._gone[sequence], len(held))
            if not held:
                self._start[sequence] = 0
        self._tell(told)

    def release_before(self, rows: Sequence[int]) -> None:
        """Drop the pages of each sequence that lie wholly before its row rows[b]."""
        size, told = self.page_size, []
        for sequence, (row, gone) in enumerate(zip(rows, self._gone, strict=True)):
            if row < (gone + 1) * size:
                continue
            held = self._held[sequence]
            last = min(row // size, len(held))
            for index in range(gone, last):
                self.pool.drop(held[index])
                held[index] = -1
                told.append((sequence, index, -1))
            self._gone[sequence] = max(gone, last)
        self._tell(told)

    def share(self, sequence: int, rows: int) -> list[int]:
        """The pages of a sequence's first rows, held once more."""
        pages = self._held[sequence][: -(-rows // self.page_size)]
        for page in pages:
            if page >= 0:
                self.pool.share(page)
        return list(pages)

    def adopt(self, sequence: int, pages: Iterable[int], first_row: int) -> None:
        """Hold shared pages as those of a sequence that has none; rows before `first_row` are not there."""
        self._held[sequence] = list(pages)
        self._start[sequence] = first_row
        held = self._held[sequence]
        self._gone[sequence] = next((i for i, page in enumerate(held) if page >= 0), len(held))
        for page in held:
            if page >= 0:
                self.pool.share(page)
        self._tell([(sequence, index, page) for index, page in enumerate(self._held[sequence])])

    def write(self, k: Tensor, v: Tensor, sequence: Tensor, position: Tensor) -> None:
        """Store packed rows k [T, H, Dk], v [T, H, Dv] at (sequence, position), int64 [T] each."""
        self.pool.write(k, v, page_slots(self.block_table, self.page_size, sequence, position))

    def views(self, lengths: Tensor) -> tuple[PagedKV, PagedKV]:
        """Keys and values as the operations take them; `lengths` int32 [B] rows per sequence."""
        return PagedKV(self.k_pages, self.block_table, lengths), PagedKV(self.v_pages, self.block_table, lengths)

    def _tell(self, entries: list[tuple[int, int, int]]) -> None:
        """Write (sequence, index, page) into the table."""
        if entries:
            where = to_device(torch.tensor(entries, dtype=torch.int32, device="cpu"), self.block_table.device)
            sequence, index, page = where.unbind(1)
            self.block_table[sequence.long(), index.long()] = page
