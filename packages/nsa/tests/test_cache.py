"""Does the cache keep its promises: transactions, capacity, pages that come and go, and nothing that grows?"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa import NSACache, NSAConfig
from nsa.cache_step import CacheStep
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16)  # as `make_config` has them
WINDOW_KEPT = 12 - 1 + 8  # rows of the window that `contents` reads


def tensors(cache: NSACache) -> dict[str, Tensor]:
    """Every tensor of a cache by a name for it."""
    found = {"raw.k": cache.tail.k, "raw.v": cache.tail.v, "lengths": cache.device_lengths}
    found |= {"pool.k": cache.pool.k_pages, "pool.v": cache.pool.v_pages}
    return found | {f"{name}.table": getattr(cache, name).block_table for name in ("cmp", "slc", "win")}


def snapshot(cache: NSACache) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    return cache.lengths, {name: x.clone() for name, x in tensors(cache).items()}


def assert_unchanged(cache: NSACache, before: tuple[tuple[int, ...], dict[str, Tensor]]) -> None:
    lengths, values = snapshot(cache)
    assert lengths == before[0]
    for name, x in values.items():
        torch.testing.assert_close(x, before[1][name], rtol=0, atol=0, equal_nan=True, msg=f"{name} changed")


def pages_in_use(cache: NSACache) -> dict[str, int]:
    return {name: int((getattr(cache, name).block_table >= 0).sum()) for name in ("cmp", "slc", "win")}


def rows(count: int, config: NSAConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (
        torch.randn(count, config.num_kv_heads, dim, dtype=torch.float64, generator=generator)
        for dim in (config.head_dim, config.value_dim)
    )
    return k, v


def mean(k: Tensor, v: Tensor, positions: Tensor, layout: VarlenLayout, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the blocks' tokens, found by their positions."""
    sequence, start_sequence = layout.sequence_of_keys(), layout.sequence_of_compressed(BLOCKS)
    member = (positions >= starts[:, None]) & (positions < starts[:, None] + 8) & (sequence == start_sequence[:, None])
    assert member.sum(1).tolist() == [8] * len(starts)
    return torch.stack([k[m].mean(0) for m in member]), torch.stack([v[m].mean(0) for m in member])


def write_mean(step: CacheStep, k: Tensor, v: Tensor) -> None:
    step.write_cmp(k, v, mean)


def append(step: CacheStep, k: Tensor, v: Tensor) -> None:
    """The new tokens into every stream, blocks being their means."""
    step.write_slc(k, v)
    step.write_win(2 * k, 2 * v)
    write_mean(step, k, v)


@pytest.fixture
def config(make_config: Callable[..., NSAConfig]) -> NSAConfig:
    return make_config()


@pytest.fixture
def cache(config: NSAConfig, make_cache: Callable[..., NSACache]) -> NSACache:
    """Two sequences of 30 and 5 tokens with room for 64."""
    cache = make_cache(config, 2, 64)
    with cache.extend([30, 5]) as step:
        append(step, *rows(35, config))
    return cache


def test_starts_empty(config: NSAConfig, make_cache: Callable) -> None:
    cache = make_cache(config, 2, 64)
    assert cache.lengths == (0, 0)
    assert cache.device == torch.device("cpu")
    assert pages_in_use(cache) == {"cmp": 0, "slc": 0, "win": 0}


def test_defaults_are_those_of_torch(config: NSAConfig) -> None:
    assert NSACache(config, 1, 64).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        cache = NSACache(config, 1, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    floats = {x.dtype for x in tensors(cache).values() if x.is_floating_point()}
    assert floats == {cache.dtype} == {torch.float64}
    assert NSACache(config, 1, 64, device="meta").device.type == "meta"


def test_a_page_is_taken_when_a_row_needs_it(config: NSAConfig, make_cache: Callable) -> None:
    cache = make_cache(config, 1, 64)
    for token in range(1, 65):
        with cache.extend([1]) as step:
            append(step, *rows(1, config))
        raw, blocks = -(-token // 16), config.blocks.num_compressed(token)
        behind = max(0, token - WINDOW_KEPT) // 16
        assert pages_in_use(cache) == {"cmp": -(-blocks // 16), "slc": raw, "win": raw - behind}


def test_streams_hold_what_was_written(cache: NSACache, config: NSAConfig, contents: Callable) -> None:
    k, v = rows(35, config)
    for sequence, part in enumerate((slice(0, 30), slice(30, 35))):
        held = contents(cache)[sequence]
        assert torch.equal(held["k_slc"], k[part])
        assert torch.equal(held["v_slc"], v[part])
        assert torch.equal(held["k_win"], 2 * k[part][-WINDOW_KEPT:])
        blocks = config.blocks.num_compressed(part.stop - part.start)
        expected = [k[part][4 * i : 4 * i + 8].mean(0) for i in range(blocks)]
        assert len(held["k_cmp"]) == len(expected)
        assert all(torch.equal(row, mean) for row, mean in zip(held["k_cmp"], expected, strict=True))
        assert torch.equal(held["k_raw"], k[part][4 * blocks :])
        assert torch.equal(held["v_raw"], v[part][4 * blocks :])


def test_what_a_step_says(cache: NSACache, config: NSAConfig) -> None:
    k, v = rows(7, config, seed=1)
    with cache.extend([3, 4]) as step:
        assert step.new.cu_seqlens_q.tolist() == step.new.cu_seqlens_k.tolist() == [0, 3, 7]
        assert step.layout.cu_seqlens_q.tolist() == [0, 3, 7]
        assert step.layout.cu_seqlens_k.tolist() == [0, 33, 42]
        assert step.layout.positions().tolist() == [30, 31, 32, 5, 6, 7, 8]
        old_k, old_v = rows(35, config)

        def compress(
            k_raw: Tensor, v_raw: Tensor, positions: Tensor, raw: VarlenLayout, starts: Tensor
        ) -> tuple[Tensor, Tensor]:
            assert raw.cu_seqlens_k.tolist() == [0, 9, 18]  # 6 waiting and 3 new, 5 waiting and 4 new
            assert positions.tolist() == [*range(24, 33), *range(9)]
            assert starts.tolist() == [24, 0]
            for got, old, new in ((k_raw, old_k, k), (v_raw, old_v, v)):
                assert torch.equal(got, torch.cat([old[24:30], new[:3], old[30:35], new[3:]]))
            return rows(2, config)

        step.write_slc(k, v)
        step.write_win(k, v)
        step.write_cmp(k, v, compress)
        assert [x.lengths.tolist() for x in step.slc + step.win + step.cmp] == [[33, 9]] * 4 + [[7, 1]] * 2
        assert torch.equal(step.slc[0].rows(torch.tensor([0, 1]), torch.tensor([32, 8])), k[[2, 6]])
    assert cache.lengths == (33, 9)


def test_nothing_is_committed_inside_a_step(cache: NSACache, config: NSAConfig) -> None:
    with cache.extend([1, 1]) as step:
        append(step, *rows(2, config))
        assert cache.lengths == (30, 5)
    assert cache.lengths == (31, 6)


def test_a_shared_stream_is_written_once(make_config: Callable, make_cache: Callable) -> None:
    config = make_config(shared_kv=True)
    cache = make_cache(config, 1, 64)
    assert cache.win is cache.slc
    k, v = rows(3, config)
    with cache.extend([3]) as step:
        step.write_slc(k, v)
        step.write_win(2 * k, 2 * v)  # nothing to store
        write_mean(step, k, v)
    assert torch.equal(cache.slc.k_pages[cache.slc.block_table[0, 0], :3], k)
    assert pages_in_use(cache)["slc"] == 1


class Abandoned(Exception):
    pass


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("new", [[0, 0], [1, 0], [34, 59]])
def test_an_exception_drops_the_step(
    new: list[int], written: bool, cache: NSACache, config: NSAConfig, contents: Callable
) -> None:
    before, used, expected = contents(cache), pages_in_use(cache), copy.deepcopy(cache)

    def abandon() -> None:
        with cache.extend(new) as step:
            if written:
                append(step, *rows(sum(new), config, seed=1))
            raise Abandoned

    with pytest.raises(Abandoned):
        abandon()
    assert cache.lengths == (30, 5)
    assert pages_in_use(cache) == used
    for got, old in zip(contents(cache), before, strict=True):
        assert all(torch.equal(got[name], old[name]) for name in old)
    for each in (cache, expected):
        with each.extend([20, 30]) as step:
            append(step, *rows(50, config, seed=2))
    for got, other in zip(contents(cache), contents(expected), strict=True):
        assert all(torch.equal(got[name], other[name]) for name in other)


def test_an_exception_keeps_reserved_pages(cache: NSACache, config: NSAConfig) -> None:
    cache.reserve(20)
    reserved = {name: x.clone() for name, x in tensors(cache).items() if "table" in name}

    def abandon() -> None:
        with cache.extend([30, 1]):
            raise Abandoned

    with pytest.raises(Abandoned):
        abandon()
    for name, table in reserved.items():
        assert torch.equal(tensors(cache)[name], table)


@pytest.mark.parametrize(
    "lengths, error, message",
    [
        ([35, 0], ValueError, r"^lengths: expected at most max_tokens=64 .* got 30 \+ 35 for sequence 0$"),
        ([0, 60], ValueError, r"^lengths: expected at most max_tokens=64 .* got 5 \+ 60 for sequence 1$"),
        ([0, -1], ValueError, r"^lengths: expected at least 0, got -1 for sequence 1$"),
        ([1], ValueError, r"^lengths: expected 2, one per sequence, got 1$"),
        ([1, 1, 1], ValueError, r"^lengths: expected 2, one per sequence, got 3$"),
        ([1, 1.0], TypeError, r"^lengths: expected ints, got 1.0 of type float$"),
        ([True, 1], TypeError, r"^lengths: expected ints, got True of type bool$"),
        (1, TypeError, r"^lengths: expected a sequence of ints, got int$"),
        (torch.tensor([1, 1]), TypeError, r"^lengths: expected a sequence of ints, got Tensor$"),
    ],
)
def test_lengths_that_do_not_fit(lengths: object, error: type[Exception], message: str, cache: NSACache) -> None:
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        cache.extend(lengths)
    assert_unchanged(cache, before)


def test_full_capacity_can_be_used(cache: NSACache, config: NSAConfig, contents: Callable) -> None:
    with cache.extend([34, 59]) as step:
        append(step, *rows(93, config, seed=1))
    assert cache.lengths == (64, 64)
    assert all(x.isfinite().all() for held in contents(cache) for x in held.values())
    with cache.extend([0, 0]):
        pass
    with pytest.raises(ValueError, match="max_tokens=64"):
        cache.extend([1, 0])


def test_reserved_pages_serve_later_steps(cache: NSACache, config: NSAConfig) -> None:
    cache.reserve(34)
    assert cache.lengths == (30, 5)
    tables = {name: x.clone() for name, x in tensors(cache).items() if "table" in name}
    assert pages_in_use(cache) == {"cmp": 2, "slc": 4 + 3, "win": 4 + 3}
    for _ in range(34):
        with cache.extend([1, 1]) as step:
            append(step, *rows(2, config))
        for name, table in tables.items():
            now = tensors(cache)[name]
            assert torch.equal(now.where(now >= 0, table), table)  # none taken; those behind the window are returned


@pytest.mark.parametrize("tokens, error", [(35, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_reserving_what_does_not_fit(tokens: object, error: type[Exception], cache: NSACache) -> None:
    before = snapshot(cache)
    with pytest.raises(error, match=r"^tokens: expected"):
        cache.reserve(tokens)
    assert_unchanged(cache, before)


def test_reset_forgets_and_frees(cache: NSACache, config: NSAConfig, make_cache: Callable, contents: Callable) -> None:
    cache.reset()
    assert cache.lengths == (0, 0)
    assert pages_in_use(cache) == {"cmp": 0, "slc": 0, "win": 0}
    fresh = make_cache(config, 2, 64)
    for each in (cache, fresh):
        with each.extend([7, 20]) as step:
            append(step, *rows(27, config, seed=3))
    for got, other in zip(contents(cache), contents(fresh), strict=True):
        assert all(torch.equal(got[name], other[name]) for name in other)


def test_pages_are_taken_again_and_nothing_grows(cache: NSACache, config: NSAConfig) -> None:
    places = {name: (x.data_ptr(), x.shape) for name, x in tensors(cache).items()}
    for _ in range(5):
        cache.reset()
        for new in ([40, 1], [24, 63]):
            with cache.extend(new) as step:
                append(step, *rows(sum(new), config))
    assert {name: (x.data_ptr(), x.shape) for name, x in tensors(cache).items()} == places
    assert pages_in_use(cache) == {"cmp": 2, "slc": 8, "win": 4}


@settings(max_examples=25, deadline=None)
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("extend"), st.integers(0, 30), st.integers(0, 30)),
            st.tuples(st.just("abandon"), st.integers(0, 30), st.integers(0, 30)),
            st.tuples(st.just("reserve"), st.integers(0, 30), st.just(0)),
            st.tuples(st.just("reset"), st.just(0), st.just(0)),
        ),
        max_size=12,
    )
)
def test_any_history_holds_the_tokens_of_its_steps(
    actions: list, make_config: Callable, make_cache: Callable, contents: Callable
) -> None:
    """No page belongs to two sequences, no page is lost, and each row is the token that was appended."""
    config = make_config()
    cache, tokens = make_cache(config, 2, 64), [rows(0, config), rows(0, config)]
    for number, (action, *new) in enumerate(actions):
        fits = all(old + more <= 64 for old, more in zip(cache.lengths, new, strict=True))
        if action == "reset":
            cache.reset()
            tokens = [rows(0, config), rows(0, config)]
        elif action == "reserve" and all(old + new[0] <= 64 for old in cache.lengths):
            cache.reserve(new[0])
        elif action in ("extend", "abandon") and fits:
            k, v = rows(sum(new), config, seed=number)
            try:
                with cache.extend(new) as step:
                    append(step, k, v)
                    if action == "abandon":
                        raise Abandoned
            except Abandoned:
                continue
            parts = zip(k.split(new), v.split(new), strict=True)
            tokens = [
                (torch.cat([old_k, k_new]), torch.cat([old_v, v_new]))
                for (old_k, old_v), (k_new, v_new) in zip(tokens, parts, strict=True)
            ]
    assert cache.lengths == tuple(len(k) for k, _ in tokens)
    for held, (k, v) in zip(contents(cache), tokens, strict=True):
        assert torch.equal(held["k_slc"], k)
        assert torch.equal(held["v_win"], 2 * v[-WINDOW_KEPT:])
        means = [k[4 * i : 4 * i + 8].mean(0) for i in range(config.blocks.num_compressed(len(k)))]
        assert all(torch.equal(row, mean) for row, mean in zip(held["k_cmp"], means, strict=True))
    tables = [getattr(cache, name).block_table for name in ("cmp", "slc", "win")]
    taken = torch.cat([table[table >= 0] for table in tables]).tolist()
    assert len(set(taken)) == len(taken) == cache.pool.num_pages - cache.pool.num_free


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"batch_size": 0}, ValueError, r"^batch_size: expected at least 1, got 0$"),
        ({"max_tokens": -5}, ValueError, r"^max_tokens: expected at least 1, got -5$"),
        ({"max_tokens": 64.0}, TypeError, r"^max_tokens: expected an int, got 64.0 of type float$"),
        ({"batch_size": True}, TypeError, r"^batch_size: expected an int, got True of type bool$"),
        ({"page_size": 24}, ValueError, r"^page_size: expected a multiple of block_size=16, got 24$"),
        ({"page_size": 0}, ValueError, r"^page_size: expected at least 1, got 0$"),
        ({"dtype": torch.int32}, TypeError, r"^dtype: expected one of .*, got torch.int32$"),
        ({"config": {"topk": 3}}, TypeError, r"^config: expected an NSAConfig, got dict$"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict, error: type[Exception], message: str, config: NSAConfig) -> None:
    with pytest.raises(error, match=message):
        NSACache(**({"config": config, "batch_size": 1, "max_tokens": 64} | arguments))


@pytest.mark.parametrize(
    "write, name", [(CacheStep.write_slc, "k_slc"), (CacheStep.write_win, "k_win"), (write_mean, "k_cmp")]
)
def test_rows_that_do_not_fit(write: Callable, name: str, cache: NSACache, config: NSAConfig) -> None:
    k, v = rows(2, config)
    before = snapshot(cache)
    wrong = [
        ((k[:1], v), ValueError, rf"^{name}: expected shape \[2, 2, 8\], got \[1, 2, 8\]$"),
        ((k, k), ValueError, rf"^v{name[1:]}: expected shape \[2, 2, 6\], got \[2, 2, 8\]$"),
        ((k.float(), v), TypeError, rf"^{name}: expected dtype torch.float64 of the cache, got torch.float32$"),
        ((k, v.to("meta")), ValueError, rf"^v{name[1:]}: expected device cpu of the cache, got meta$"),
    ]

    def attempt(given: tuple[Tensor, Tensor]) -> None:
        with cache.extend([1, 1]) as step:
            write(step, *given)

    for given_rows, error, message in wrong:
        with pytest.raises(error, match=message):
            attempt(given_rows)
        assert_unchanged(cache, before)


def test_as_many_blocks_as_the_step_completes(cache: NSACache, config: NSAConfig) -> None:
    before = snapshot(cache)

    def attempt() -> None:
        with cache.extend([2, 0]) as step:  # 32 tokens: one block more
            step.write_cmp(*rows(2, config), lambda *raw: rows(2, config))

    with pytest.raises(ValueError, match=r"^compressed k: expected shape \[1, 2, 8\], got \[2, 2, 8\]$"):
        attempt()
    assert_unchanged(cache, before)


def test_a_step_takes_tokens_only_inside_its_block(cache: NSACache, config: NSAConfig) -> None:
    before, step = snapshot(cache), cache.extend([1, 1])
    for write in (CacheStep.write_slc, CacheStep.write_win, write_mean):
        with pytest.raises(RuntimeError, match=r"^step: expected to be used inside its `with` block"):
            write(step, *rows(2, config))
    assert_unchanged(cache, before)


@pytest.mark.parametrize("left_out", ["slc", "win", "cmp"])
def test_a_step_that_leaves_a_stream_out_is_dropped(left_out: str, cache: NSACache, config: NSAConfig) -> None:
    used, (k, v) = pages_in_use(cache), rows(40, config)
    writes = {"slc": CacheStep.write_slc, "win": CacheStep.write_win, "cmp": write_mean}

    def forget() -> None:
        with cache.extend([20, 20]) as step:
            for name, write in writes.items():
                if name != left_out:
                    write(step, k, v)

    message = rf"^step: expected slc, win and cmp to be written, got no \['{left_out}'\]$"
    with pytest.raises(RuntimeError, match=message):
        forget()
    assert cache.lengths == (30, 5)
    assert pages_in_use(cache) == used
    with cache.extend([20, 20]) as step:
        append(step, k, v)
    assert cache.lengths == (50, 25)


@pytest.mark.parametrize("new, called", [([0, 0], False), ([1, 2], False), ([2, 0], True), ([0, 3], True)])
def test_compression_runs_if_a_block_completes(
    new: list[int], called: bool, cache: NSACache, config: NSAConfig, contents: Callable
) -> None:
    k, v = rows(sum(new), config, seed=1)
    compress = mock.Mock(side_effect=mean)
    with cache.extend(new) as step:
        step.write_slc(k, v)
        step.write_win(k, v)
        step.write_cmp(k, v, compress)
    assert compress.called == called
    old = rows(35, config)[0]
    expected = torch.cat([old[:30], k[: new[0]]]), torch.cat([old[30:], k[new[0] :]])
    for held, tokens in zip(contents(cache), expected, strict=True):
        blocks = config.blocks.num_compressed(len(tokens))
        assert torch.equal(held["k_raw"], tokens[4 * blocks :])


def test_one_step_at_a_time(cache: NSACache, config: NSAConfig) -> None:
    first, second = cache.extend([1, 1]), cache.extend([1, 1])
    with first:
        with pytest.raises(RuntimeError, match=r"^cache: expected one open step at a time"):
            second.__enter__()
        append(first, *rows(2, config))
    assert cache.lengths == (31, 6)
    for stale in (first, second):
        with pytest.raises(RuntimeError, match=r"^cache: expected lengths \[30, 5\] .*, got \(31, 6\)$"):
            stale.__enter__()
    assert cache.lengths == (31, 6)


def test_no_reset_inside_a_step(cache: NSACache, config: NSAConfig) -> None:
    lengths = cache.lengths
    with pytest.raises(RuntimeError, match="cache: expected no open step, got one"), cache.extend([1] * len(lengths)):
        cache.reset()
    assert cache.lengths == lengths


def test_a_copy_goes_its_own_way(cache: NSACache, config: NSAConfig, contents: Callable) -> None:
    before, other = contents(cache), copy.deepcopy(cache)
    with other.extend([10, 10]) as step:
        append(step, *rows(20, config, seed=4))
    assert (cache.lengths, other.lengths) == ((30, 5), (40, 15))
    for got, old in zip(contents(cache), before, strict=True):
        assert all(torch.equal(got[name], old[name]) for name in old)


@pytest.mark.parametrize("left_out", ["slc", "win", "cmp"])
def test_a_step_writes_every_stream(left_out: str, cache: NSACache, config: NSAConfig) -> None:
    before = snapshot(cache)
    writes = {"slc": CacheStep.write_slc, "win": CacheStep.write_win, "cmp": write_mean}

    def attempt() -> None:
        with cache.extend([1, 1]) as step:
            for name, write in writes.items():
                if name != left_out:
                    write(step, *rows(2, config))

    with pytest.raises(RuntimeError, match=rf"^step: expected slc, win and cmp .*, got no \['{left_out}'\]$"):
        attempt()
    assert cache.lengths == before[0]


def test_a_default_device_moves_nothing_that_the_host_computes(make_cache: Callable, config: NSAConfig) -> None:
    """Nothing on the device "meta" has contents: page numbers made there would not come back."""
    lengths = [[30, 5], [1, 1], [4, 9]]
    new = [rows(sum(step), config, seed) for seed, step in enumerate(lengths)]
    found = []
    for surroundings in (nullcontext(), torch.device("meta")):
        cache = make_cache(config, 2, 64, device="cpu")
        parts: list[Tensor] = []
        for counts, (k, v) in zip(lengths, new, strict=True):
            with surroundings, cache.extend(counts) as step:
                step.write_slc(k, v)
                step.write_win(k, v)
                step.write_cmp(k, v, lambda k, v, positions, layout, starts: (k[: len(starts)], v[: len(starts)]))
                parts += [step.layout.positions(), *(x.lengths for x in (*step.cmp, *step.slc))]
        found.append([*parts, *tensors(cache).values()])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
