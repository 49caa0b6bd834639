"""Does a layer whose cache shares, rolls back and carries sequences give the outputs of one pass over each alone?

Three sequences begin alike: the second leaves the first's tokens at 37, the third at 48. Wherever one begins with
another's pages, its outputs are those of the whole. Pages start as NaN (`make_cache`).
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa import NSAAttention, NSACache
from nsa_varlen import VarlenLayout
from torch import Tensor

COMMON = (80, 37, 48)  # with the first; the second and the third have 37 in common
LENGTHS = (80, 70, 66)  # all leave blocks out: from 65 tokens on
ROLLBACK = 8
FP64 = {"rtol": 0, "atol": 1e-12}  # as in test_layer.py: tilings differ, so sums are ordered differently


def noise(seed: int, count: int) -> Tensor:
    return torch.randn(count, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sequences() -> list[Tensor]:
    trunk = noise(21, 80)
    return [
        torch.cat([trunk[:shared], noise(22 + shared, length - shared)])
        for shared, length in zip(COMMON, LENGTHS, strict=True)
    ]


@pytest.fixture(scope="module")
def layers(once_each: Callable) -> Callable[..., tuple[NSAAttention, list[Tensor]]]:
    """(layer, outputs of one pass over each sequence) of a variant, computed once."""
    return once_each(sequences())


def attend(layer: NSAAttention, cache: NSACache, rows: list[Tensor]) -> list[Tensor]:
    """One step: these rows of each sequence."""
    lengths = [len(x) for x in rows]
    with torch.no_grad():
        return list(layer(torch.cat(rows), layout=VarlenLayout.from_lengths(lengths), cache=cache).split(lengths))


def poison_unused(cache: NSACache) -> int:
    """Fill the rows that are no sequence's with NaN: of pages that nobody holds, before the first row that a window
    still has, behind the end. How many of them lie in pages that are held.
    """
    pool, blocks = cache.pool, cache.config.blocks
    used = torch.zeros(pool.num_pages, pool.page_size, dtype=torch.bool)
    for sequence, length in enumerate(cache.lengths):
        for stream in (cache.cmp, cache.slc, cache.win):
            first, end = 0, blocks.num_compressed(length) if stream is cache.cmp else length
            if stream is cache.win:
                first = stream.first_row(sequence)
            position = torch.arange(first, end)
            kv, _ = stream.views(cache.device_lengths)
            used.view(-1)[kv.slots(torch.full_like(position, sequence), position)] = True
    for pages in (pool.k_pages, pool.v_pages):
        pages[~used] = torch.nan
    held = torch.tensor([pool.holders(page) > 0 for page in range(pool.num_pages)])
    return int((held[:, None] & ~used).sum())


class Decoder:
    """Sequence b in place b of one of two caches; each output is compared as it comes."""

    def __init__(self, layer: NSAAttention, expected: list[Tensor], caches: list[NSACache]) -> None:
        self.layer, self.expected, self.caches = layer, expected, caches
        self.home = [0, 0, 0]  # of each sequence
        self.checked = 0

    def length(self, b: int) -> int:
        return self.caches[self.home[b]].lengths[b]

    def extend(self, new: list[int]) -> None:
        for number, cache in enumerate(self.caches):
            poison_unused(cache)
            rows = []
            for b, x in enumerate(sequences()):
                at = cache.lengths[b]
                rows.append(x[at : at + new[b] * (self.home[b] == number)])
            first = cache.lengths
            for b, out in enumerate(attend(self.layer, cache, rows)):
                torch.testing.assert_close(out, self.expected[b][first[b] : first[b] + len(out)], **FP64)
                self.checked += len(out)

    def guess(self, b: int, count: int, seed: int) -> None:
        """Tokens that are rejected: what comes later knows nothing of them."""
        cache, length = self.caches[self.home[b]], self.length(b)
        attend(self.layer, cache, [noise(seed, count if b == other else 0) for other in range(3)])
        cache.truncate(b, length)

    def fork(self, source: int, target: int, back: int) -> bool:
        """Begin `target` with what it has in common with `source`, or with `back` tokens less; False if it cannot."""
        cache = self.caches[self.home[source]]
        common = min(COMMON[source], COMMON[target]) if source != target else 0
        length = min(self.length(source), common) - back
        if self.length(target) or length < max(1, cache.shortest(source)):
            return False
        self.home[target] = self.home[source]
        cache.fork(source, target, length)
        return True

    def carry(self, b: int) -> None:
        """To the other cache."""
        state = self.caches[self.home[b]].export(b)
        self.caches[self.home[b]].free(b)
        self.home[b] = 1 - self.home[b]
        self.caches[self.home[b]].restore(b, state)

    def finish(self) -> None:
        self.extend(list(LENGTHS))
        assert [self.length(b) for b in range(3)] == list(LENGTHS)


@pytest.fixture
def decoder(variant: dict, layers: Callable, make_cache: Callable) -> Decoder:
    layer, expected = layers(variant)
    return Decoder(layer, expected, [make_cache(layer.config, 3, rollback=ROLLBACK, page_size=p) for p in (16, 32)])


# On and off the edges of pages (16) and of compressed blocks (8/4), and before the first block.
@pytest.mark.parametrize("at, ahead", [(7, 0), (12, 5), pytest.param(16, 0, marks=pytest.mark.slow), (31, 3), (32, 8)])
def test_sequences_that_begin_with_shared_pages(at: int, ahead: int, decoder: Decoder) -> None:
    """Also if the first is ahead by then; all write to the pages that they share."""
    decoder.extend([at + ahead, 0, 0])
    assert decoder.fork(0, 1, min(at + ahead, 37) - at)
    assert decoder.fork(1, 2, 0)
    assert [decoder.length(b) for b in range(3)] == [at + ahead, at, at]
    for new in ([1, 0, 2], [0, 9, 1], [1, 1, 1], [0, 0, 17]):
        decoder.extend(new)
    decoder.finish()
    assert decoder.checked == sum(LENGTHS) - 2 * at


@pytest.mark.parametrize("count", [pytest.param(3, marks=pytest.mark.slow), ROLLBACK])
def test_rejected_tokens_leave_nothing(count: int, decoder: Decoder) -> None:
    """Speculative decoding: a guess at every length, and any number of its tokens taken."""
    accepted = 0
    while decoder.length(0) < LENGTHS[0]:
        for b in (0, 2):
            decoder.guess(b, count, seed=accepted)
        decoder.extend([1 + accepted % 8, 0, 5])
        accepted += 1
    decoder.finish()


@pytest.mark.parametrize("at", [8, 33, 64])
def test_a_sequence_carried_elsewhere_goes_on(at: int, decoder: Decoder) -> None:
    """To a cache of other pages, and back; the others stay."""
    decoder.extend([at, at // 2, 0])
    decoder.carry(0)
    decoder.extend([2, 2, 2])
    decoder.carry(0)
    decoder.carry(1)
    decoder.guess(0, 3, seed=1)
    decoder.finish()
    assert decoder.checked == sum(LENGTHS)


def test_rows_of_a_page_that_were_never_written(decoder: Decoder) -> None:
    """Carried to larger pages, a sequence begins in the middle of its window's first page, and so does one beside it:
    short enough to be computed together.
    """
    for new in ([17, 0, 0], [18, 0, 0]):
        decoder.extend(new)
    assert decoder.fork(0, 1, 0)
    decoder.carry(0)
    decoder.carry(1)
    assert poison_unused(decoder.caches[1])
    decoder.finish()


@pytest.mark.parametrize("at", [20, 35, 70])
def test_decode_steps_read_no_row_that_is_nobodys(at: int, decoder: Decoder) -> None:
    """After a carry to larger pages."""
    decoder.extend([at, min(at, 60), 0])
    decoder.carry(0)
    decoder.carry(1)
    cache, (x, y, _) = decoder.caches[1], sequences()
    poison_unused(cache)
    for step in range(6):
        rows = torch.stack([x[at + step], y[min(at, 60) + step], torch.zeros(24).double()])[:, None]
        counts = torch.tensor([1, 1, 0], dtype=torch.int32)
        with torch.no_grad():
            cache.reserve([1, 1, 0])
            out = decoder.layer.decode(rows, cache, counts)
        cache.advance([1, 1, 0])
        for b, first in enumerate((at, min(at, 60))):
            torch.testing.assert_close(out[b, 0], decoder.expected[b][first + step], rtol=0, atol=1e-5)  # fp32 lse


few, place = st.integers(0, 3), st.integers(0, 2)
ACTIONS = st.one_of(
    st.tuples(st.just("extend"), st.tuples(st.integers(0, 30), few, st.integers(0, 9))),
    st.tuples(st.just("extend"), st.tuples(few, few, few)),
    st.tuples(st.just("guess"), place, st.integers(1, ROLLBACK), st.integers(0, 99)),
    st.tuples(st.just("fork"), place, place, st.sampled_from([0, 0, 1, 5])),
    st.tuples(st.just("carry"), place),
)


@settings(max_examples=5, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=3, max_size=10))
def test_any_interleaving(actions: list, variant: dict, layers: Callable, make_cache: Callable) -> None:
    """The second and third sequence wait for a fork, and begin by themselves if none comes."""
    layer, expected = layers(variant)
    caches = [make_cache(layer.config, 3, rollback=ROLLBACK, page_size=size) for size in (16, 32)]
    decoder = Decoder(layer, expected, caches)
    for name, *arguments in actions:
        if name == "extend":
            new = [n if b == 0 or decoder.length(b) else 0 for b, n in enumerate(arguments[0])]
            decoder.extend([min(n, LENGTHS[b] - decoder.length(b)) for b, n in enumerate(new)])
        elif name != "guess":
            getattr(decoder, name)(*arguments)
        elif decoder.length(arguments[0]):
            decoder.guess(*arguments)
    decoder.finish()
    for cache in caches:
        cache.reset()
        assert cache.pool.num_free == cache.pool.num_pages


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=3, max_size=30))
def test_any_interleaving_at_length(actions: list, variant: dict, layers: Callable, make_cache: Callable) -> None:
    test_any_interleaving.hypothesis.inner_test(actions, variant, layers, make_cache)
