"""Is every page accounted for through 10,000 steps in which sequences join, grow, roll back, split and leave?

The pool is too small for all at their capacity, so it runs out again and again, and someone must leave.
"""

import random
from collections import Counter

import pytest
import torch
from nsa import CacheFull, NSACache, NSAConfig, PagePool
from nsa.cache import SharedPrefix
from nsa_varlen import VarlenLayout
from torch import Tensor

CONFIG = NSAConfig(
    hidden_size=4,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    v_head_dim=1,
    kernel_size=4,
    kernel_stride=2,
    block_size=4,
    topk=4,
    window_size=6,
    rope_theta=None,
)
PAGE, ROLLBACK, CAPACITY, BATCH, NUM_PAGES = 4, 3, 48, 4, 40  # four sequences at their capacity: 4 * (12 + 6 + 4) pages
STREAMS = ("cmp", "slc", "win")
STEPS = 10_000


def rows_of(tokens: list[int], stream: str) -> tuple[Tensor, Tensor]:
    """Keys [T, 1, 2] and values [T, 1, 1] of tokens: integers, so that means over 4 are exact."""
    x = 6 * torch.tensor(tokens, dtype=torch.float64) + STREAMS.index(stream)
    return torch.stack([x, -x], -1)[:, None], x[:, None, None] + 3


def mean(k: Tensor, v: Tensor, positions: Tensor, layout: VarlenLayout, starts: Tensor) -> tuple[Tensor, Tensor]:
    first = layout.cu_seqlens_k[:-1].long()[layout.sequence_of_compressed(CONFIG.blocks)]
    rows = (first + starts - positions[first])[:, None] + torch.arange(4)
    return k[rows].mean(1), v[rows].mean(1)


class Soak:
    """A cache under random use, and the tokens that it should hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool = PagePool.for_config(CONFIG, NUM_PAGES, page_size=PAGE, dtype=torch.float64)
        for pages in (self.pool.k_pages, self.pool.v_pages):
            pages.fill_(torch.nan)
        self.cache = NSACache(CONFIG, BATCH, CAPACITY, page_size=PAGE, rollback=ROLLBACK, pool=self.pool)
        self.tokens: list[list[int]] = [[] for _ in range(BATCH)]
        self.prefix: SharedPrefix | None = None
        self.shared: list[int] = []  # the prefix's tokens
        self.done = Counter[str]()
        self.next = 0

    def step(self) -> None:
        """Mostly tokens; now and then something else."""
        action = self.random.choices((self.append, self.rollback, self.join, self.leave, self.share), (80, 6, 6, 3, 5))
        try:
            action[0]()
        except CacheFull:
            self.done["full"] += 1
            before = self.pool.num_free
            self.drop_prefix()
            self.leave()
            assert self.pool.num_free >= before
        else:
            self.done[action[0].__name__] += 1

    def append(self) -> None:
        longest = 20 if self.random.random() < 0.05 else 3
        lengths = [min(self.random.randint(0, longest), CAPACITY - len(x)) for x in self.tokens]
        first = [self.next + sum(lengths[:b]) for b in range(BATCH)]
        new = [list(range(at, at + n)) for at, n in zip(first, lengths, strict=True)]
        flat = [token for tokens in new for token in tokens]
        with self.cache.extend(lengths) as step:
            step.write_slc(*rows_of(flat, "slc"))
            step.write_win(*rows_of(flat, "win"))
            step.write_cmp(*rows_of(flat, "cmp"), mean)
        self.next += len(flat)
        for old, more in zip(self.tokens, new, strict=True):
            old += more

    def rollback(self) -> None:
        b = self.random.randrange(BATCH)
        length = self.random.randint(self.cache.shortest(b), len(self.tokens[b]))
        self.cache.truncate(b, length)
        del self.tokens[b][length:]

    def join(self) -> None:
        """Into the place of an empty sequence: a fork of another, or the prefix, or a sequence carried elsewhere."""
        target, source = self.random.sample(range(BATCH), 2)
        self.cache.free(target)
        self.tokens[target] = []
        kind = self.random.randrange(3)
        if kind == 0 and self.prefix is not None:
            self.cache.adopt(target, self.prefix)
            self.tokens[target] = list(self.shared)
        elif kind == 1:
            self.cache.restore(target, self.cache.export(source))
            self.tokens[target] = list(self.tokens[source])
        else:
            length = self.random.randint(self.cache.shortest(source), len(self.tokens[source]))
            self.cache.fork(source, target, length)
            self.tokens[target] = self.tokens[source][:length]

    def leave(self) -> None:
        b = self.random.randrange(BATCH)
        self.cache.free(b)
        self.tokens[b] = []

    def share(self) -> None:
        self.drop_prefix()
        b = self.random.randrange(BATCH)
        self.prefix, self.shared = self.cache.share(b), list(self.tokens[b])

    def drop_prefix(self) -> None:
        if self.prefix is not None:
            self.prefix.drop()
        self.prefix = None

    def check_pages(self) -> None:
        """Each page has as many holders as places, each sequence the pages of its rows, and none is lost."""
        assert self.cache.lengths == tuple(map(len, self.tokens))
        places = Counter[int]()
        for name in STREAMS:
            stream = getattr(self.cache, name)
            for b, length in enumerate(self.cache.lengths):
                pages = stream.pages(b)
                rows = CONFIG.blocks.num_compressed(length) if name == "cmp" else length
                assert len(pages) == -(-rows // PAGE)
                if name == "win":
                    gone = sum(page < 0 for page in pages)
                    assert pages[:gone] == [-1] * gone
                    behind = max(0, length - (CONFIG.window_size - 1 + ROLLBACK)) // PAGE
                    reached = max(0, length - CONFIG.window_size + 1) // PAGE
                    assert behind <= gone <= reached
                    pages = pages[gone:]
                places.update(pages)
        if self.prefix is not None:
            places.update(page for pages in self.prefix.pages for page in pages if page >= 0)
        assert [self.pool.holders(page) for page in range(NUM_PAGES)] == [places[page] for page in range(NUM_PAGES)]
        assert self.pool.num_free == NUM_PAGES - len(places)

    def check_rows(self) -> None:
        """The device's table, and every row, are those of the tokens."""
        assert self.cache.device_lengths.tolist() == list(self.cache.lengths)
        for b, tokens in enumerate(self.tokens):
            for name in STREAMS:
                stream, expected, first = getattr(self.cache, name), rows_of(tokens, name), 0
                pages = stream.pages(b)
                table = stream.block_table[b].tolist()
                assert table == pages + [-1] * (len(table) - len(pages))
                if name == "cmp":
                    span = torch.arange(CONFIG.blocks.num_compressed(len(tokens)))[:, None] * 2 + torch.arange(4)
                    expected = tuple(x[span].mean(1) for x in expected)
                elif name == "win":
                    first = max(0, len(tokens) - CONFIG.window_size + 1)
                for stored, x in zip((self.pool.k_pages, self.pool.v_pages), expected, strict=True):
                    assert torch.equal(stored[pages].flatten(0, 1)[first : len(x)], x[first:])
            waiting = torch.arange(CONFIG.blocks.num_compressed(len(tokens)) * 2, len(tokens))
            raw = self.cache.tail.read(torch.full_like(waiting, b), waiting)
            for got, x in zip(raw, rows_of(tokens, "cmp"), strict=True):
                assert torch.equal(got, x[waiting])


@pytest.mark.once
def test_ten_thousand_steps() -> None:
    soak = Soak(seed=1)
    for number in range(STEPS):
        soak.step()
        soak.check_pages()
        if number % 50 == 0:
            soak.check_rows()
    # All of it happened, the pool ran out many times, and each time room came back.
    assert sum(soak.done.values()) == STEPS
    assert min(soak.done[name] for name in ("append", "rollback", "join", "leave", "share", "full")) > STEPS // 100
    soak.drop_prefix()
    soak.cache.reset()
    assert soak.pool.num_free == NUM_PAGES


@pytest.mark.parametrize("chunk", [1, 2, 7, 48])
def test_a_sequence_fits_where_pages_for_says_so(chunk: int) -> None:
    """Grown in chunks into a pool of so many pages: one sequence, from its first token to its last."""
    needed = NSACache(CONFIG, 1, CAPACITY, page_size=PAGE, rollback=ROLLBACK).pages_for(CAPACITY, chunk)
    pool = PagePool.for_config(CONFIG, needed, page_size=PAGE, dtype=torch.float64)
    cache, most = NSACache(CONFIG, 1, CAPACITY, page_size=PAGE, rollback=ROLLBACK, pool=pool), 0
    while cache.lengths[0] < CAPACITY:
        new = min(chunk, CAPACITY - cache.lengths[0])
        with cache.extend([new]) as step:
            most = max(most, needed - pool.num_free)
            for name, write in (("slc", step.write_slc), ("win", step.write_win)):
                write(*rows_of([0] * new, name))
            step.write_cmp(*rows_of([0] * new, "cmp"), mean)
    assert needed - 1 <= most <= needed  # where in its page a step ends may spare one


def test_a_full_pool_recovers() -> None:
    """The step that did not fit left everything as it was; once others left, it fits."""
    soak = Soak(seed=2)

    def fill() -> None:
        while True:
            soak.append()

    for _ in range(20):
        with pytest.raises(CacheFull, match=rf"^pages: needed \d+, got \d+ free of {NUM_PAGES}$"):
            fill()
        soak.check_pages()
        soak.check_rows()
        for b in soak.random.sample(range(BATCH), 3):
            soak.cache.free(b)
            soak.tokens[b] = []
        soak.append()
        soak.check_pages()
        soak.check_rows()
