"""Does the cache, after any history, hold what plain lists of tokens say, in as many pages as they say?

The model keeps a list of tokens per sequence and, per stream, a list of page numbers of its own. How many hold a page
it never counts along: it looks through all lists. Two caches take their pages from one pool that is too small for them.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from nsa import CacheFull, NSACache, NSAConfig, PagePool
from nsa.cache import SequenceState, SharedPrefix
from nsa_varlen import VarlenLayout
from torch import Tensor

PAGE = 8
WINDOW = 12
NUM_PAGES = 26
SIZES = ((3, 56, 3), (2, 40, 1))  # batch size, tokens at most and rollback of each cache: 41 pages in all
GEOMETRIES = {
    "overlap": {"kernel_size": 8, "kernel_stride": 4},
    "one-per-token": {"kernel_size": 1, "kernel_stride": 1},
    "side-by-side": {"kernel_size": 8, "kernel_stride": 8},
    "shared-kv": {"kernel_size": 8, "kernel_stride": 4, "shared_kv": True},
}


def config_of(**options: object) -> NSAConfig:
    sizes = {"hidden_size": 4, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "v_head_dim": 1}
    return NSAConfig(**sizes, block_size=8, topk=4, window_size=WINDOW, rope_theta=None, **options)


@dataclass
class Listed:
    """A sequence, or a shared prefix, as lists; None is a page that is no longer needed."""

    tokens: list[int] = field(default_factory=list)
    pages: list[list[int | None]] = field(default_factory=lambda: [[], [], []])
    floor: int = 0  # `truncate` can go back to here at least

    def copy(self, length: int, rows: list[int]) -> "Listed":
        pages = [list(held[: -(-count // PAGE)]) for held, count in zip(self.pages, rows, strict=True)]
        return Listed(self.tokens[:length], pages, self.floor if length else 0)


class Model:
    def __init__(self, config: NSAConfig) -> None:
        self.config = config
        self.streams = 2 if config.shared_kv else 3
        self.batches = [[self.empty() for _ in range(size)] for size, _, _ in SIZES]
        self.prefixes: list[Listed] = []
        self.numbers = 0

    def empty(self) -> Listed:
        return Listed(pages=[[] for _ in range(self.streams)])

    def rows(self, length: int) -> list[int]:
        return [self.config.blocks.num_compressed(length), length, length][: self.streams]

    def holders(self) -> Counter[int]:
        everyone = [*self.prefixes, *(listed for batch in self.batches for listed in batch)]
        return Counter(page for listed in everyone for held in listed.pages for page in held if page is not None)

    def new_page(self) -> int:
        self.numbers += 1
        return self.numbers

    def grow(self, batch: list[Listed], lengths: list[int]) -> bool:
        """Pages of their own for rows up to these lengths; False, and nothing, if they do not fit."""
        before = [[list(held) for held in listed.pages] for listed in batch]
        for listed, length in zip(batch, lengths, strict=True):
            ranges = zip(listed.pages, self.rows(len(listed.tokens)), self.rows(length), strict=True)
            for held, old, new in ranges:
                for row in range(old, new):
                    if row // PAGE == len(held):
                        held.append(self.new_page())
                    elif (row == old or row % PAGE == 0) and self.holders()[held[row // PAGE]] > 1:
                        held[row // PAGE] = self.new_page()
        if len(self.holders()) <= NUM_PAGES:
            return True
        for listed, pages in zip(batch, before, strict=True):
            listed.pages = pages
        return False

    def cut(self, listed: Listed) -> None:
        """Only the pages that its tokens need."""
        for held, count in zip(listed.pages, self.rows(len(listed.tokens)), strict=True):
            del held[-(-count // PAGE) :]

    def settle(self, number: int) -> None:
        """What follows from new lengths: how far back one can go, and window pages that nobody needs."""
        rollback = SIZES[number][2]
        for listed in self.batches[number]:
            length = len(listed.tokens)
            listed.floor = max(listed.floor, length - rollback) if length else 0
            if self.streams == 3:
                for place in range(len(listed.pages[2])):
                    if (place + 1) * PAGE <= length - (WINDOW - 1 + rollback):
                        listed.pages[2][place] = None


def rows_of(tokens: list[int], stream: str, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """Keys [T, 1, 2] and values [T, 1, 1] of tokens: integers, so that means over 8 are exact."""
    kind = 0 if config.shared_kv else ("cmp", "slc", "win").index(stream)
    x = 6 * torch.tensor(tokens, dtype=torch.float64) + kind
    return torch.stack([x, -x], -1)[:, None], x[:, None, None] + 3


def blocks_of(tokens: list[int], config: NSAConfig) -> tuple[Tensor, ...]:
    """Means of each block's tokens."""
    count = config.blocks.num_compressed(len(tokens))
    starts = torch.arange(count)[:, None] * config.kernel_stride
    return tuple(x[starts + torch.arange(config.kernel_size)].mean(1) for x in rows_of(tokens, "cmp", config))


class Abandoned(Exception):
    pass


class CacheMachine(RuleBasedStateMachine):
    options: dict[str, object]

    def __init__(self) -> None:
        super().__init__()
        self.config = config_of(**self.options)
        self.pool = PagePool.for_config(self.config, NUM_PAGES, page_size=PAGE, dtype=torch.float64)
        for pages in (self.pool.k_pages, self.pool.v_pages):
            pages.fill_(torch.nan)  # a row that is read before it is written shows
        self.caches = [
            NSACache(self.config, size, tokens, page_size=PAGE, rollback=rollback, pool=self.pool)
            for size, tokens, rollback in SIZES
        ]
        self.model = Model(self.config)
        self.prefixes: list[SharedPrefix] = []
        self.states: list[tuple[SequenceState, Listed]] = []
        self.tokens = 0

    # What the rules share

    def fresh(self, count: int) -> list[int]:
        self.tokens += count
        return list(range(self.tokens - count, self.tokens))

    def streams(self, cache: NSACache) -> dict[str, object]:
        return {name: getattr(cache, name) for name in ("cmp", "slc", "win")[: self.model.streams]}

    def snapshot(self) -> list[object]:
        """Everything, to the bit."""
        found: list[object] = [self.pool.num_free, [self.pool.holders(page) for page in range(NUM_PAGES)]]
        tensors = [self.pool.k_pages, self.pool.v_pages]
        for cache in self.caches:
            found += [cache.lengths, [cache.shortest(b) for b in range(cache.batch_size)]]
            found += [[s.pages(b) for b in range(cache.batch_size)] for s in self.streams(cache).values()]
            tensors += [cache.device_lengths, cache.tail.k, cache.tail.v]
            tensors += [s.block_table for s in self.streams(cache).values()]
        return found + [x.clone().view(torch.uint8).flatten().numpy().tobytes() for x in tensors]

    def refused(self, error: type[Exception], message: str, call: object, *args: object) -> None:
        before = self.snapshot()
        with pytest.raises(error, match=message):
            call(*args)
        assert self.snapshot() == before

    def where(self, which: int) -> tuple[int, NSACache, int, Listed]:
        """One of all the sequences."""
        places = [(number, b) for number, (size, _, _) in enumerate(SIZES) for b in range(size)]
        number, b = places[which % len(places)]
        return number, self.caches[number], b, self.model.batches[number][b]

    def allowed(self, cache: NSACache, b: int, length: int) -> bool:
        return length <= cache.lengths[b] and (length == 0 or length >= cache.shortest(b))

    def compress(
        self, k: Tensor, v: Tensor, positions: Tensor, layout: VarlenLayout, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        first = layout.cu_seqlens_k[:-1].long()[layout.sequence_of_compressed(self.config.blocks)]
        span = torch.arange(self.config.kernel_size)
        rows = (first + starts - positions[first])[:, None] + span
        assert torch.equal(positions[rows], starts[:, None] + span)
        return k[rows].mean(1), v[rows].mean(1)

    def append(self, number: int, lengths: list[int], stop: int | None) -> None:
        """A step; `stop` abandons it after so many streams were written."""
        cache, batch = self.caches[number], self.model.batches[number]
        lengths = [min(n, SIZES[number][1] - len(x.tokens)) for n, x in zip(lengths, batch, strict=False)]
        grown = [x.tokens + self.fresh(n) for n, x in zip(lengths, batch, strict=True)]
        held = [[len(pages) for pages in x.pages] for x in batch]
        fits = self.model.grow(batch, [len(x) for x in grown])
        new = [token for tokens, n in zip(grown, lengths, strict=True) for token in tokens[len(tokens) - n :]]

        def step() -> None:
            with cache.extend(lengths) as step:
                writes = [
                    lambda: step.write_slc(*rows_of(new, "slc", self.config)),
                    lambda: step.write_win(*rows_of(new, "win", self.config)),
                    lambda: step.write_cmp(*rows_of(new, "cmp", self.config), self.compress),
                ]
                for write in writes[:stop]:
                    write()
                if stop is not None:
                    raise Abandoned
                for b, tokens in enumerate(grown):  # what the step completes, it sees
                    for got, expected in zip(step.cmp, blocks_of(tokens, self.config), strict=True):
                        assert got.lengths[b] == len(expected)
                        assert torch.equal(got.span(b, 0, len(expected)), expected)

        if not fits:
            self.refused(CacheFull, "^pages: needed", step)
        elif stop is not None:
            with pytest.raises(Abandoned):
                step()
            for listed, counts in zip(batch, held, strict=True):
                for pages, count in zip(listed.pages, counts, strict=True):
                    del pages[count:]  # copies in place of shared pages stay
        else:
            step()
            for listed, tokens in zip(batch, grown, strict=True):
                listed.tokens = tokens
            self.model.settle(number)

    # Rules

    few = st.lists(st.integers(0, 4), min_size=3, max_size=3)
    many = st.lists(st.integers(0, 40), min_size=3, max_size=3)
    number = st.integers(0, 1)
    place = st.integers(0, 4)
    back = st.one_of(st.just(0), st.integers(0, 4), st.integers(-1, 60))  # from the end; -1 is a token too many

    @rule(number=number, lengths=few)
    def decode(self, number: int, lengths: list[int]) -> None:
        self.append(number, lengths, None)

    @rule(number=number, lengths=many)
    def prefill(self, number: int, lengths: list[int]) -> None:
        self.append(number, lengths, None)

    @rule(number=number, lengths=st.one_of(few, many), stop=st.integers(0, 3))
    def abandon(self, number: int, lengths: list[int], stop: int) -> None:
        self.append(number, lengths, stop)

    @rule(number=number, lengths=many)
    def reserve(self, number: int, lengths: list[int]) -> None:
        cache, batch = self.caches[number], self.model.batches[number]
        lengths = [min(n, SIZES[number][1] - len(x.tokens)) for n, x in zip(lengths, batch, strict=False)]
        if self.model.grow(batch, [len(x.tokens) + n for n, x in zip(lengths, batch, strict=True)]):
            cache.reserve(lengths)
        else:
            self.refused(CacheFull, "^pages: needed", cache.reserve, lengths)

    @rule(which=place, back=back)
    def truncate(self, which: int, back: int) -> None:
        number, cache, b, listed = self.where(which)
        length = max(0, len(listed.tokens) - back)
        if self.allowed(cache, b, length):
            cache.truncate(b, length)
            del listed.tokens[length:]
            self.model.cut(listed)
            self.model.settle(number)
        else:
            self.refused(ValueError, "^length: expected", cache.truncate, b, length)

    @rule(which=place)
    def free(self, which: int) -> None:
        _, cache, b, listed = self.where(which)
        self.end(cache, b, listed)

    def end(self, cache: NSACache, b: int, listed: Listed) -> None:
        cache.free(b)
        listed.tokens.clear()
        self.model.cut(listed)
        listed.floor = 0

    @rule(which=place, back=back)
    def share(self, which: int, back: int) -> None:
        _, cache, b, listed = self.where(which)
        length = max(0, len(listed.tokens) - back)
        if self.allowed(cache, b, length):
            self.prefixes.append(cache.share(b, length if back else None))
            self.model.prefixes.append(listed.copy(length, self.model.rows(length)))
        else:
            self.refused(ValueError, "^length: expected", cache.share, b, length)

    @precondition(lambda self: self.prefixes)
    @rule(which=st.integers(0, 100))
    def drop(self, which: int) -> None:
        prefix = self.prefixes.pop(which % len(self.prefixes))
        self.model.prefixes.pop(which % (len(self.prefixes) + 1))
        prefix.drop()
        self.refused(ValueError, "^(prefix|sequence): expected", self.caches[0].adopt, 0, prefix)
        prefix.drop()  # a second time does nothing

    def begin(self, number: int, listed: Listed, source: Listed) -> None:
        copy = source.copy(len(source.tokens), self.model.rows(len(source.tokens)))
        listed.tokens, listed.pages, listed.floor = copy.tokens, copy.pages, copy.floor
        self.model.settle(number)

    @precondition(lambda self: self.prefixes)
    @rule(which=place, prefix=st.integers(0, 100), clear=st.booleans())
    def adopt(self, which: int, prefix: int, clear: bool) -> None:
        number, cache, b, listed = self.where(which)
        if clear:
            self.end(cache, b, listed)
        prefix %= len(self.prefixes)
        if listed.tokens or len(self.model.prefixes[prefix].tokens) > SIZES[number][1]:
            self.refused(ValueError, "^(sequence|prefix): expected", cache.adopt, b, self.prefixes[prefix])
        else:
            cache.adopt(b, self.prefixes[prefix])
            self.begin(number, listed, self.model.prefixes[prefix])

    @rule(number=number, source=st.integers(0, 2), into=st.integers(0, 2), back=back, clear=st.booleans())
    def fork(self, number: int, source: int, into: int, back: int, clear: bool) -> None:
        cache, batch = self.caches[number], self.model.batches[number]
        source, target = source % len(batch), into % len(batch)
        if clear and source != target:
            self.end(cache, target, batch[target])
        length = max(0, len(batch[source].tokens) - back)
        if batch[target].tokens or not self.allowed(cache, source, length):
            self.refused(ValueError, "^(target|length): expected", cache.fork, source, target, length)
        else:
            cache.fork(source, target, length)
            self.begin(number, batch[target], batch[source].copy(length, self.model.rows(length)))

    @rule(which=place)
    def export(self, which: int) -> None:
        _, cache, b, listed = self.where(which)
        self.states.append((cache.export(b), listed.copy(len(listed.tokens), self.model.rows(len(listed.tokens)))))

    @precondition(lambda self: self.states)
    @rule(which=place, state=st.integers(0, 100), clear=st.booleans())
    def restore(self, which: int, state: int, clear: bool) -> None:
        number, cache, b, listed = self.where(which)
        if clear:
            self.end(cache, b, listed)
        exported, source = self.states[state % len(self.states)]
        length = len(source.tokens)
        if listed.tokens or length > SIZES[number][1]:
            self.refused(ValueError, "^(sequence|state): expected", cache.restore, b, exported)
            return
        reserved = listed.pages
        listed.pages = [[self.model.new_page() for _ in range(-(-n // PAGE))] for n in self.model.rows(length)]
        if self.model.streams == 3:
            gone = exported.start // PAGE  # rows before are no longer there, nor are their pages taken
            listed.pages[2][:gone] = [None] * gone
        if len(self.model.holders()) > NUM_PAGES:
            listed.pages = reserved
            self.refused(CacheFull, "^pages: needed", cache.restore, b, exported)
        else:
            cache.restore(b, exported)
            listed.tokens, listed.floor = list(source.tokens), source.floor
            self.model.settle(number)

    @rule(number=number)
    def reset(self, number: int) -> None:
        self.caches[number].reset()
        self.model.batches[number] = [self.model.empty() for _ in range(SIZES[number][0])]

    # What always holds

    @invariant()
    def pages_are_those_of_the_model(self) -> None:
        """The same places share a page, and each page has as many holders as places."""
        pairs: set[tuple[int, int]] = set()
        expected: list[int | None]
        for cache, batch in zip(self.caches, self.model.batches, strict=True):
            for stream, held in enumerate(self.streams(cache).values()):
                for b, row in enumerate(held.block_table.tolist()):
                    expected = batch[b].pages[stream]
                    assert row == held.pages(b) + [-1] * (len(row) - len(expected))
                    assert [page < 0 for page in row[: len(expected)]] == [page is None for page in expected]
                    pairs |= {(x, y) for x, y in zip(expected, row, strict=False) if x is not None}
        for listed, prefix in zip(self.model.prefixes, self.prefixes, strict=True):
            for expected, pages in zip(listed.pages, prefix.pages, strict=True):
                assert [page < 0 for page in pages] == [page is None for page in expected]
                pairs |= {(x, y) for x, y in zip(expected, pages, strict=True) if x is not None}
        assert len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})
        holders = self.model.holders()
        counts = {page: holders[x] for x, page in pairs}
        assert [self.pool.holders(page) for page in range(NUM_PAGES)] == [counts.get(p, 0) for p in range(NUM_PAGES)]
        assert self.pool.num_free + len(pairs) == NUM_PAGES

    def check_rows(
        self, tokens: list[int], pages: list[list[int]], first_win: int, raw: tuple[Tensor, Tensor], first_raw: int
    ) -> None:
        """Rows in these pages, those of the window and the raw ones from a position on."""
        expected = {"cmp": blocks_of(tokens, self.config)}
        expected |= {name: rows_of(tokens, name, self.config) for name in ("slc", "win")[: self.model.streams - 1]}
        for (name, rows), held in zip(expected.items(), pages, strict=True):
            first = first_win if name == "win" else 0
            for stored, x in zip((self.pool.k_pages, self.pool.v_pages), rows, strict=True):
                assert torch.equal(stored[held].flatten(0, 1)[first : len(x)], x[first:]), name
        for got, x in zip(raw, rows_of(tokens, "cmp", self.config), strict=True):
            assert torch.equal(got, x[first_raw:])

    @invariant()
    def rows_are_those_of_the_tokens(self) -> None:
        """All rows that a query behind any length could need to which `truncate` can go back."""
        for cache, batch in zip(self.caches, self.model.batches, strict=True):
            lengths = tuple(len(listed.tokens) for listed in batch)
            assert cache.lengths == tuple(cache.device_lengths.tolist()) == lengths
            for b, listed in enumerate(batch):
                shortest = cache.shortest(b)
                assert shortest <= min(listed.floor, len(listed.tokens))
                least = min(max(1, shortest), len(listed.tokens))  # 0 tokens need no row
                first_raw = self.config.blocks.num_compressed(least) * self.config.kernel_stride
                positions = torch.arange(first_raw, len(listed.tokens))
                raw = cache.tail.read(torch.full_like(positions, b), positions)
                pages = [stream.pages(b) for stream in self.streams(cache).values()]
                self.check_rows(listed.tokens, pages, max(0, least - WINDOW + 1), raw, first_raw)

    @invariant()
    def prefixes_hold_what_they_held(self) -> None:
        for listed, prefix in zip(self.model.prefixes, self.prefixes, strict=True):
            length = len(listed.tokens)
            assert prefix.length == length
            waiting = length - self.config.blocks.num_compressed(length) * self.config.kernel_stride
            first_raw = length - len(prefix.k_raw)
            assert waiting <= len(prefix.k_raw)
            reached = max(0, length - WINDOW + 1)
            assert prefix.start <= reached
            pages = [list(held) for held in prefix.pages]
            self.check_rows(listed.tokens, pages, reached, (prefix.k_raw, prefix.v_raw), first_raw)

    def teardown(self) -> None:
        for prefix in self.prefixes:
            prefix.drop()
        for cache in self.caches:
            cache.reset()
        assert self.pool.num_free == NUM_PAGES


@pytest.fixture(params=GEOMETRIES)
def machine(request: pytest.FixtureRequest) -> type[CacheMachine]:
    return type("Machine", (CacheMachine,), {"options": GEOMETRIES[request.param]})


@pytest.mark.once
def test_any_history(machine: type[CacheMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=50, stateful_step_count=30, deadline=None))


@pytest.mark.slow
def test_any_history_at_length(machine: type[CacheMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=100, stateful_step_count=60, deadline=None))
