"""Is a wrong argument of every method of the cache named, with what was expected and what came, and nothing written?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa import CacheFull, DecodeGraph, NSACache, NSAConfig, PagePool
from nsa.cache import SequenceState, SharedPrefix
from nsa.reads import ReadCounters
from nsa_varlen import VarlenLayout
from torch import Tensor


def tensors(cache: NSACache) -> list[Tensor]:
    return [
        *(cache.pool.k_pages, cache.pool.v_pages, cache.tail.k, cache.tail.v, cache.device_lengths),
        *(getattr(cache, name).block_table for name in ("cmp", "slc", "win")),
    ]


def snapshot(cache: NSACache) -> tuple[list[Any], list[bytes]]:
    """All that a cache is, to the bit."""
    pool, batch = cache.pool, range(cache.batch_size)
    host = [cache.lengths, pool.num_free, [pool.holders(page) for page in range(pool.num_pages)]]
    host += [getattr(cache, name).pages(b) for name in ("cmp", "slc", "win") for b in batch]
    host += [cache.shortest(b) for b in batch]
    return host, [x.clone().numpy().tobytes() for x in tensors(cache)]


def block(count: int, cache: NSACache) -> tuple[Tensor, Tensor]:
    config = cache.config
    k, v = (
        torch.randn(count, config.num_kv_heads, dim, dtype=cache.dtype) for dim in (config.head_dim, config.value_dim)
    )
    return k, v


def extend(cache: NSACache, lengths: list[int]) -> None:
    """Any rows: here no one looks at them."""

    def first_rows(k: Tensor, v: Tensor, positions: Tensor, layout: VarlenLayout, starts: Tensor) -> tuple:
        return k[: len(starts)], v[: len(starts)]

    with cache.extend(lengths) as step:
        step.write_slc(*block(sum(lengths), cache))
        step.write_win(*block(sum(lengths), cache))
        step.write_cmp(*block(sum(lengths), cache), first_rows)


@pytest.fixture
def config(make_config: Callable[..., NSAConfig]) -> NSAConfig:
    return make_config()


@pytest.fixture
def cache(config: NSAConfig, make_cache: Callable[..., NSACache]) -> NSACache:
    """Three sequences of 60, 5 and no tokens, with room for 64; for the last, pages are reserved."""
    cache = make_cache(config, 3, 64)
    extend(cache, [60, 5, 0])
    cache.reserve([0, 0, 20])
    return cache


@pytest.mark.parametrize(
    "method, arguments, error, message",
    [
        ("shortest", (3,), ValueError, r"sequence: expected one of 3, got 3"),
        ("shortest", ("0",), TypeError, r"sequence: expected an int, got '0' of type str"),
        ("truncate", (3, 0), ValueError, r"sequence: expected one of 3, got 3"),
        ("truncate", (-1, 0), ValueError, r"sequence: expected at least 0, got -1"),
        ("truncate", (True, 0), TypeError, r"sequence: expected an int, got True of type bool"),
        ("truncate", (0, 61), ValueError, r"length: expected at most 60, the tokens of sequence 0, got 61"),
        ("truncate", (0, -1), ValueError, r"length: expected at least 0, got -1"),
        ("truncate", (0, 1.0), TypeError, r"length: expected an int, got 1.0 of type float"),
        ("truncate", (0, None), TypeError, r"length: expected an int, got None of type NoneType"),
        ("truncate", (0, 30), ValueError, r"length: expected 0 or at least \d+ for sequence 0 \(rollback=8\), got 30"),
        ("free", (3,), ValueError, r"sequence: expected one of 3, got 3"),
        ("free", (None,), TypeError, r"sequence: expected an int, got None of type NoneType"),
        ("share", (3,), ValueError, r"sequence: expected one of 3, got 3"),
        ("share", (1, 6), ValueError, r"length: expected at most 5, the tokens of sequence 1, got 6"),
        ("share", (0, 30), ValueError, r"length: expected 0 or at least \d+ for sequence 0 \(rollback=8\), got 30"),
        ("share", (0, "1"), TypeError, r"length: expected an int, got '1' of type str"),
        ("adopt", (2, "prefix"), TypeError, r"prefix: expected a SharedPrefix, got str"),
        ("fork", (0, 1), ValueError, r"target: expected an empty one, got 1 with 5 tokens"),
        ("fork", (0, 3), ValueError, r"target: expected one of 3, got 3"),
        ("fork", (3, 2), ValueError, r"source: expected one of 3, got 3"),
        ("fork", (0.0, 2), TypeError, r"source: expected an int, got 0.0 of type float"),
        ("fork", (0, 2, 61), ValueError, r"length: expected at most 60, the tokens of sequence 0, got 61"),
        ("fork", (0, 2, 30), ValueError, r"length: expected 0 or at least \d+ for sequence 0 \(rollback=8\), got 30"),
        ("export", (3,), ValueError, r"sequence: expected one of 3, got 3"),
        ("export", ("a",), TypeError, r"sequence: expected an int, got 'a' of type str"),
        ("restore", (2, None), TypeError, r"state: expected a SequenceState, got NoneType"),
        ("pages_for", (-1,), ValueError, r"tokens: expected at least 0, got -1"),
        ("pages_for", (8, 0), ValueError, r"chunk: expected at least 1, got 0"),
        ("pages_for", (8.0,), TypeError, r"tokens: expected an int, got 8.0 of type float"),
        ("reserve", ([0, 0],), ValueError, r"tokens: expected 3, one per sequence, got 2"),
        ("reserve", ([5, 0, 0],), ValueError, r"tokens: expected at most max_tokens=64 .* got 60 \+ 5 for sequence 0"),
        ("reserve", ([0, 0, "1"],), TypeError, r"tokens: expected ints, got '1' of type str"),
    ],
)
def test_arguments(method: str, arguments: tuple, error: type[Exception], message: str, cache: NSACache) -> None:
    before = snapshot(cache)
    with pytest.raises(error, match=rf"^{message}$" if ".*" not in message else rf"^{message}"):
        getattr(cache, method)(*arguments)
    assert snapshot(cache) == before


@pytest.mark.parametrize("b", [1, 3, -1, "2"])
def test_a_sequence_begins_only_where_none_is(b: Any, cache: NSACache) -> None:
    prefix, state = cache.share(0), cache.export(0)
    before = snapshot(cache)
    for begin, given in ((cache.adopt, prefix), (cache.restore, state)):
        with pytest.raises((TypeError, ValueError), match=r"^sequence: expected "):
            begin(b, given)
        assert snapshot(cache) == before


def other_prefixes(cache: NSACache, make_config: Callable) -> list[tuple[SharedPrefix, str]]:
    config = cache.config
    another = NSACache(config, 1, 64, page_size=16, dtype=torch.float64)
    wider = NSACache(make_config(window_size=16), 1, 64, page_size=16, pool=cache.pool)
    larger = NSACache(config, 1, 128, page_size=16, pool=cache.pool)
    extend(larger, [65])
    dropped = cache.share(0)
    dropped.drop()
    return [
        (another.share(0), "expected one of this cache's pool and configuration, got another's$"),
        (wider.share(0), "expected one of this cache's pool and configuration, got another's$"),
        (larger.share(0), "expected at most max_tokens=64 tokens, got 65$"),
        (dropped, "expected one that is held, got one that was dropped$"),
    ]


def test_prefixes_that_do_not_fit(cache: NSACache, make_config: Callable) -> None:
    given = other_prefixes(cache, make_config)
    before = snapshot(cache)
    for prefix, message in given:
        with pytest.raises(ValueError, match=rf"^prefix: {message}"):
            cache.adopt(2, prefix)
        assert snapshot(cache) == before


def with_stream(state: SequenceState, which: int, **changes: Callable[[Tensor], Tensor]) -> SequenceState:
    k, v = state.streams[which]
    changed = changes.get("k", lambda x: x)(k), changes.get("v", lambda x: x)(v)
    return replace(state, streams=(*state.streams[:which], changed, *state.streams[which + 1 :]))


STATES = {
    "too long": (lambda s: replace(s, length=65), ValueError, "expected at most max_tokens=64 tokens, got 65"),
    "two streams": (lambda s: replace(s, streams=s.streams[:2]), ValueError, "expected streams of k and v"),
    "k too short": (lambda s: with_stream(s, 0, k=lambda x: x[1:]), ValueError, "expected streams of k and v"),
    "v too short": (lambda s: with_stream(s, 1, v=lambda x: x[1:]), ValueError, "expected streams of k and v"),
    "v too long": (lambda s: with_stream(s, 2, v=lambda x: x.repeat(2, 1, 1)), ValueError, "expected streams of k"),
    "fewer heads": (lambda s: with_stream(s, 1, v=lambda x: x[:, :1]), ValueError, "expected streams of k and v"),
    "narrower": (lambda s: with_stream(s, 2, k=lambda x: x[..., 1:]), ValueError, "expected streams of k and v"),
    "dtype": (lambda s: with_stream(s, 1, v=Tensor.float), TypeError, "expected dtype torch.float64 of the cache, got"),
    "device": (lambda s: s.to("meta"), ValueError, "expected device cpu of the cache, got meta"),
    "starts too late": (lambda s: replace(s, start=50), ValueError, "expected the window's rows from 49 on, got .* 50"),
    "starts nowhere": (lambda s: replace(s, start=-1), ValueError, "expected the window's rows from 49 on, got .* -1"),
    "few raw rows": (
        lambda s: replace(s, k_raw=s.k_raw[-3:], v_raw=s.v_raw[-3:]),
        ValueError,
        r"expected 4 to 60 raw rows of 2 heads and \(8, 6\), got \[\(3, 2, 8\), \(3, 2, 6\)\]",
    ),
    "raw rows that differ": (lambda s: replace(s, v_raw=s.v_raw[1:]), ValueError, "expected 4 to 60 raw rows"),
    "more raw rows than tokens": (
        lambda s: replace(s, k_raw=s.k_raw.repeat(5, 1, 1), v_raw=s.v_raw.repeat(5, 1, 1)),
        ValueError,
        "expected 4 to 60 raw rows",
    ),
    "raw dtype": (lambda s: replace(s, k_raw=s.k_raw.half()), TypeError, "expected dtype torch.float64 of the cache"),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_do_not_fit(name: str, cache: NSACache) -> None:
    change, error, message = STATES[name]
    state = cache.export(0)
    before = snapshot(cache)
    with pytest.raises(error, match=rf"^state: {message}"):
        cache.restore(2, change(state))
    assert snapshot(cache) == before
    cache.restore(2, state)  # as it was exported, it fits
    assert cache.lengths == (60, 5, 60)


CALLS = {
    "truncate": lambda cache, prefix, state: cache.truncate(1, 3),
    "free": lambda cache, prefix, state: cache.free(1),
    "share": lambda cache, prefix, state: cache.share(1),
    "adopt": lambda cache, prefix, state: cache.adopt(2, prefix),
    "fork": lambda cache, prefix, state: cache.fork(1, 2),
    "export": lambda cache, prefix, state: cache.export(1),
    "restore": lambda cache, prefix, state: cache.restore(2, state),
    "reset": lambda cache, prefix, state: cache.reset(),
    "reserve": lambda cache, prefix, state: cache.reserve(1),
    "decode": lambda cache, prefix, state: cache.decode(1, torch.zeros(3, dtype=torch.int32)),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_else_while_a_step_is_open(name: str, cache: NSACache) -> None:
    prefix, state = cache.share(0), cache.export(0)
    with cache.extend([0, 0, 0]):
        before = snapshot(cache)
        with pytest.raises(RuntimeError, match=r"^cache: expected no open step, got one$"):
            CALLS[name](cache, prefix, state)
        assert snapshot(cache) == before
    CALLS[name](cache, prefix, state)


@pytest.fixture
def crowded(config: NSAConfig) -> tuple[NSACache, SequenceState]:
    """A cache with 3 free pages, two sequences of 20 tokens in the same 5, and 5 reserved for an empty one; and a state
    that needs 9.
    """
    elsewhere = NSACache(config, 1, 64, page_size=16, rollback=64, dtype=torch.float64)
    extend(elsewhere, [60])
    pool = PagePool.for_config(config, 13, page_size=16, dtype=torch.float64)
    for pages in (pool.k_pages, pool.v_pages):
        pages.fill_(torch.nan)
    cache = NSACache(config, 3, 64, page_size=16, pool=pool)
    extend(cache, [20, 0, 0])
    cache.fork(0, 1)
    cache.reserve([0, 0, 30])
    assert pool.num_free == 3
    return cache, elsewhere.export(0)


TOO_MUCH = {
    "extend": lambda cache, state: extend(cache, [30, 0, 0]),
    "reserve": lambda cache, state: cache.reserve([0, 0, 64]),
    "restore": lambda cache, state: cache.restore(2, state),
    "copies and more": lambda cache, state: extend(cache, [12, 13, 30]),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_too_few_pages_change_nothing(what: str, crowded: tuple[NSACache, SequenceState]) -> None:
    """Neither lengths nor pages, those that were reserved included; and what fits, still fits."""
    cache, state = crowded
    before = snapshot(cache)
    with pytest.raises(CacheFull, match=r"^pages: needed \d+, got 3 free of 13$"):
        TOO_MUCH[what](cache, state)
    assert snapshot(cache) == before
    extend(cache, [4, 4, 30])  # one sequence needs copies of three pages, then the other has its own
    assert cache.pool.num_free == 0


def test_reserved_pages_make_room_for_a_restored_sequence(crowded: tuple[NSACache, SequenceState]) -> None:
    """3 free and 5 reserved: the 8 that are needed, one of cmp, four of slc and three of win."""
    cache, state = crowded
    k, v = state.streams[2]
    later = replace(state, start=16, streams=(*state.streams[:2], (k[16:], v[16:])))
    cache.restore(2, later)
    assert cache.lengths == (20, 20, 60)
    assert cache.pool.num_free == 1  # a page of win lay behind this cache's window


def test_a_window_that_begins_within_a_page(config: NSAConfig, make_cache: Callable[..., NSACache]) -> None:
    """Rows from 16 on, in a page of 32: what was not there before does not seem to be there now."""
    small, large = (make_cache(config, 1, 64, page_size=size) for size in (16, 32))
    extend(small, [35])
    large.restore(0, small.export(0))
    assert small.win.first_row(0) == large.win.first_row(0) == large.export(0).start == 16
    assert small.shortest(0) == large.shortest(0) == 16 + config.window_size - 1
    large.truncate(0, large.shortest(0))
    prefix = large.share(0)
    large.free(0)
    large.adopt(0, prefix)
    assert large.win.first_row(0) == 16


def test_a_prefix_of_no_tokens_begins_a_whole_sequence(cache: NSACache) -> None:
    """Whatever its source holds no longer, the new sequence lacks nothing."""
    assert cache.win.first_row(0) > 0
    cache.fork(0, 2, 0)
    extend(cache, [0, 0, 20])
    assert cache.shortest(2) <= 20 - cache.rollback
    extend(cache, [0, 0, 40])
    assert cache.shortest(2) <= 60 - cache.rollback
    cache.truncate(2, 60 - cache.rollback)
    state = cache.export(2)
    cache.free(2)
    cache.restore(2, state)
    assert cache.lengths == (60, 5, 52)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"num_pages": 0}, ValueError, "num_pages: expected at least 1, got 0"),
        ({"page_size": 16.0}, TypeError, "page_size: expected an int, got 16.0 of type float"),
        ({"num_heads": True}, TypeError, "num_heads: expected an int, got True of type bool"),
        ({"dims": (8, 0)}, ValueError, "dims: expected at least 1, got 0"),
        ({"dtype": torch.int8}, TypeError, r"dtype: expected None or one of \[.*\], got torch.int8"),
    ],
)
def test_a_pool(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{message}$"):
        PagePool(**({"num_pages": 4, "page_size": 16, "num_heads": 2, "dims": (8, 6)} | arguments))


@pytest.mark.parametrize("config, kind", [({"num_kv_heads": 2}, "dict"), (None, "NoneType")])
def test_a_pool_for_no_configuration(config: object, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"^config: expected an NSAConfig, got {kind}$"):
        PagePool.for_config(config, 1)


@pytest.mark.parametrize(
    "counters, error, message",
    [
        (ReadCounters(2), ValueError, "expected batch_size 3 on cpu, got 2 on cpu"),
        (ReadCounters(4), ValueError, "expected batch_size 3 on cpu, got 4 on cpu"),
        (ReadCounters(3, "meta"), ValueError, "expected batch_size 3 on cpu, got 3 on meta"),
        (torch.zeros(3, 4), TypeError, "expected a ReadCounters or None, got Tensor"),
    ],
)
def test_counters(counters: object, error: type[Exception], message: str, cache: NSACache) -> None:
    """Where they are assigned: a step would find out when it has stored its tokens."""
    cache.counters = before = ReadCounters(3)
    with pytest.raises(error, match=rf"^counters: {message}$"):
        cache.counters = counters
    assert cache.counters is before
    cache.counters = None
    assert cache.counters is None


@pytest.mark.parametrize(
    "caches, error, message",
    [
        (lambda cache: cache, TypeError, "expected a sequence of NSACaches, got NSACache"),
        (lambda cache: {"first": cache}, TypeError, "expected a sequence of NSACaches, got dict"),
        (lambda cache: None, TypeError, "expected a sequence of NSACaches, got NoneType"),
        (lambda cache: [cache, None], TypeError, "expected NSACaches, got NoneType"),
        (lambda cache: [], ValueError, "expected at least one, got none"),
    ],
)
def test_the_caches_of_a_graph(caches: Callable, error: type[Exception], message: str, cache: NSACache) -> None:
    before = snapshot(cache)
    with pytest.raises(error, match=rf"^caches: {message}$"):
        DecodeGraph(lambda x, counts: x, caches(cache), torch.zeros(3, 1, 24))
    assert snapshot(cache) == before


def test_the_input_of_a_graph(cache: NSACache) -> None:
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got list$"):
        DecodeGraph(lambda x, counts: x, [cache], [[[1.0]]])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"pool": "pool"}, TypeError, "pool: expected a PagePool, got str"),
        ({"page_size": 32}, ValueError, r"pool: expected pages of \[rows, kv heads, dim\] \[\(32, 2, 8\), .*16, 2, 8"),
        ({"dtype": torch.float32}, ValueError, "dtype: expected None or torch.float64 of the pool, got torch.float32"),
        ({"device": "meta"}, ValueError, "device: expected None or cpu of the pool, got meta"),
        ({"rollback": -1}, ValueError, "rollback: expected at least 0, got -1"),
        ({"rollback": 1.0}, TypeError, "rollback: expected an int, got 1.0 of type float"),
    ],
)
def test_a_cache_of_a_pool(options: dict, error: type[Exception], message: str, config: NSAConfig) -> None:
    pool = PagePool.for_config(config, 4, page_size=16, dtype=torch.float64)
    with pytest.raises(error, match=rf"^{message}"):
        NSACache(config, 1, 64, **({"pool": pool, "page_size": 16} | options))
    assert pool.num_free == 4
