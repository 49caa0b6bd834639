"""A decode step at lengths that only the device knows: is it what one pass over the whole sequence gives?"""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa import NSAAttention, NSACache
from nsa.compression import MeanCompression, Pool
from nsa.config import COMPRESSIONS
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS = (90, 33, 65)
PREFILLED = (50, 0, 64)
ATOL = 1e-12  # as in test_layer_decode.py: sums are ordered differently; selections are certified


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 24, dtype=torch.float64, generator=generator) for length in LENGTHS]


@torch.no_grad()
def prefill(layer: NSAAttention, cache: NSACache, lengths: tuple[int, ...] = PREFILLED) -> None:
    x = torch.cat([rows[:length] for rows, length in zip(sequences(), lengths, strict=True)])
    layer(x, layout=VarlenLayout.from_lengths(list(lengths)), cache=cache)


@torch.no_grad()
def decode(layer: NSAAttention, cache: NSACache, counts: list[int], rows: int) -> list[Tensor]:
    """The next counts[b] tokens of each sequence, in a batch of `rows` whose padding is NaN; their outputs."""
    x = torch.full((len(counts), rows, 24), torch.nan, dtype=torch.float64)
    for row, tokens, start, count in zip(x, sequences(), cache.lengths, counts, strict=True):
        row[:count] = tokens[start : start + count]
    cache.reserve(counts)
    told = torch.tensor(counts, dtype=torch.int32)
    out = layer.decode(x, cache, told)
    cache.advance(counts)
    assert cache.device_lengths.tolist() == list(cache.lengths)
    return [y[:count] for y, count in zip(out, counts, strict=True)]


@pytest.fixture(scope="module")
def whole(once_each: Callable) -> Callable[..., tuple[NSAAttention, list[Tensor]]]:
    """(layer, the outputs of one pass) of a variant, computed once."""
    return once_each(sequences())


def assert_is(outputs: list[list[Tensor]], expected: list[Tensor], start: tuple[int, ...] = PREFILLED) -> None:
    for parts, out, first in zip(outputs, expected, start, strict=True):
        got = torch.cat(parts)
        torch.testing.assert_close(got, out[first : first + len(got)], rtol=0, atol=ATOL)


def test_token_by_token(variant: dict, whole: Callable, make_cache: Callable) -> None:
    layer, expected = whole(variant)
    cache = make_cache(layer.config, 3)
    prefill(layer, cache)
    outputs: list[list[Tensor]] = [[], [], []]
    while cache.lengths != LENGTHS:
        counts = [int(now < length) for now, length in zip(cache.lengths, LENGTHS, strict=True)]
        for kept, part in zip(outputs, decode(layer, cache, counts, 1), strict=True):
            kept.append(part)
    assert_is(outputs, expected)


SIZES = st.tuples(*[st.integers(0, 20)] * 3)


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), SIZES), min_size=1, max_size=12))
def test_steps_of_any_size_and_prefill_between_them(steps: list, whole: Callable, make_cache: Callable) -> None:
    layer, expected = whole({"compression": "mlp", "rope_cmp": "before"})
    cache = make_cache(layer.config, 3)
    outputs: list[list[Tensor]] = [[x[:0]] for x in expected]
    for decoded, sizes in steps:
        left = [length - now for length, now in zip(LENGTHS, cache.lengths, strict=True)]
        counts = [min(size, most) for size, most in zip(sizes, left, strict=True)]
        if decoded:
            parts = decode(layer, cache, [min(count, 8) for count in counts], 8)
        else:
            x = [rows[now : now + new] for rows, now, new in zip(sequences(), cache.lengths, counts, strict=True)]
            with torch.no_grad():
                parts = layer(torch.cat(x), layout=VarlenLayout.from_lengths(counts), cache=cache).split(counts)
        for kept, part in zip(outputs, parts, strict=True):
            kept.append(part)
    assert_is(outputs, expected, (0, 0, 0))


def test_a_step_taken_back_leaves_no_trace(whole: Callable, make_cache: Callable) -> None:
    """Speculative decoding: tokens that turn out wrong, a truncation, the right ones."""
    layer, expected = whole({"compression": "linear"})
    cache = make_cache(layer.config, 3)
    prefill(layer, cache)
    outputs: list[list[Tensor]] = [[], [], []]
    for _ in range(4):
        lengths = cache.lengths
        cache.reserve([8, 8, 0])
        with torch.no_grad():
            layer.decode(torch.randn(3, 8, 24, dtype=torch.float64), cache, torch.tensor([8, 8, 0], dtype=torch.int32))
        cache.advance([8, 8, 0])
        cache.truncate(0, lengths[0])
        cache.truncate(1, lengths[1])
        assert cache.lengths == lengths
        for kept, part in zip(outputs, decode(layer, cache, [7, 8, 0], 8), strict=True):
            kept.append(part)
    assert_is(outputs, expected)


def test_padding_leaves_what_a_rollback_needs(whole: Callable, make_cache: Callable) -> None:
    """As far back as it goes: the next block begins with the earliest raw token that is kept, 44 of 59."""
    layer, expected = whole({"compression": "linear"})
    cache = make_cache(layer.config, 3)
    prefill(layer, cache, (58, 0, 0))
    decode(layer, cache, [1, 0, 0], 8)
    cache.truncate(0, 59 - cache.rollback)
    assert cache.shortest(0) == 48
    outputs = [decode(layer, cache, [1, 0, 0], 8)[0] for _ in range(20)]
    torch.testing.assert_close(torch.cat(outputs), expected[0][51:71], rtol=0, atol=ATOL)


def test_a_prefix_is_shared_until_someone_writes(whole: Callable, make_cache: Callable) -> None:
    """Two sequences of one prefix, continued alike and otherwise, by decode steps that write to its last page."""
    layer, expected = whole({"rope_cmp": "none", "shared_kv": True, "bias": True})
    cache = make_cache(layer.config, 3)
    prefill(layer, cache, (50, 0, 0))
    cache.fork(0, 1)
    used = cache.pool.num_pages - cache.pool.num_free
    cache.fork(0, 2)
    assert cache.pool.num_pages - cache.pool.num_free == used
    tokens, noise = sequences()[0], torch.randn(40, 24, dtype=torch.float64)
    for place in range(40):
        x = torch.stack([tokens[50 + place], noise[place], tokens[50 + place]])[:, None]
        cache.reserve(1)
        with torch.no_grad():
            out = layer.decode(x, cache)
        cache.advance(1)
        torch.testing.assert_close(out[0], out[2], rtol=0, atol=ATOL)
        torch.testing.assert_close(out[0, 0], expected[0][50 + place], rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_nothing_is_read_from_the_device(kind: str, make_layer: Callable) -> None:
    """On "meta" nothing could be: shapes alone carry a step through, as they must in a graph."""
    layer = make_layer(compression=kind).to("meta")
    cache = NSACache(layer.config, 2, 128, page_size=16, device="meta", dtype=torch.float64)
    x, counts = torch.empty(2, 8, 24, device="meta", dtype=torch.float64), torch.empty(2, device="meta").int()
    with torch.no_grad():
        out = layer.decode(x, cache, counts)
    assert out.shape == (2, 8, 24)


def test_the_host_must_be_told(make_layer: Callable, make_cache: Callable) -> None:
    layer = make_layer()
    cache, x = make_cache(layer.config, 2), torch.randn(2, 1, 24, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(
            RuntimeError, match=r"^cache: expected pages for \[1, 1\] more tokens, got too few: reserve "
        ):
            layer.decode(x, cache)
        cache.reserve(1)
        layer.decode(x, cache)
    for attempt in (
        lambda: cache.decode(1),
        lambda: cache.extend([1, 1]),
        lambda: cache.reserve(1),
        lambda: cache.truncate(0, 0),
        lambda: cache.share(0),
        cache.reset,
    ):
        with pytest.raises(RuntimeError, match=r"^cache: expected advance\(\) after a decode step, got none$"):
            attempt()
    cache.advance(1)
    assert cache.lengths == (1, 1)


@pytest.mark.parametrize("counts", [[1, 1], [0, 1]])
def test_tokens_without_pages_are_not_lost_silently(
    counts: list[int], make_layer: Callable, make_cache: Callable
) -> None:
    """The second sequence shares its page, which a decode must not write to."""
    layer = make_layer()
    cache, x = make_cache(layer.config, 2), torch.randn(2, 1, 24, dtype=torch.float64)
    with torch.no_grad():
        layer(x[0], layout=VarlenLayout.from_lengths([1, 0]), cache=cache)
    cache.fork(0, 1)
    with pytest.raises(RuntimeError, match=r"^cache: expected pages for .* more tokens, got too few: reserve comes"):
        cache.decode(1, torch.tensor(counts, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"^cache: expected pages for .* more tokens, got too few: reserve comes"):
        cache.advance(counts)
    cache.reserve(counts)
    cache.decode(1, torch.tensor(counts, dtype=torch.int32))


@pytest.mark.parametrize(
    "rows, counts, error, message",
    [
        (9, None, ValueError, r"^rows: expected at most 8 \(rollback=8\), got 9$"),
        (0, None, ValueError, r"^rows: expected at least 1, got 0$"),
        (1.0, None, TypeError, r"^rows: expected an int, got 1.0 of type float$"),
        (1, torch.zeros(2), ValueError, r"^counts: expected torch.int32 \[2\] on cpu, got torch.float32 \[2\] on cpu$"),
        (1, torch.zeros(3).int(), ValueError, r"^counts: expected torch.int32 \[2\] on cpu, got torch.int32 \[3\] on"),
    ],
)
def test_arguments_that_do_not_fit(
    rows: object,
    counts: Tensor | None,
    error: type[Exception],
    message: str,
    make_config: Callable,
    make_cache: Callable,
) -> None:
    with pytest.raises(error, match=message):
        make_cache(make_config(), 2).decode(rows, counts)


def test_raw_rows_that_do_not_fit(make_config: Callable, make_cache: Callable) -> None:
    """They are kept before the operation could look at them; everything else is the operation's to check."""
    cache = make_cache(make_config(compression="linear"), 2)
    cache.reserve(1)
    step, before = cache.decode(1), cache.tail.k.clone()
    k, v = torch.zeros(2, 1, 2, 8, dtype=torch.float64), torch.zeros(2, 1, 2, 6, dtype=torch.float64)
    for cmp, error, message in (
        ((k, k), ValueError, r"^v_cmp: expected shape \[2, 1, 2, 6\], got \[2, 1, 2, 8\]$"),
        ((k.float(), v), TypeError, r"^k_cmp: expected dtype torch.float64 of the cache, got torch.float32$"),
    ):
        with pytest.raises(error, match=message):
            step.new_tokens((k, v), (k, v), cmp, lambda k, v, *_: (k, v))
    assert torch.equal(cache.tail.k, before)


class Launches(TorchDispatchMode):
    """Counts what is computed: no views, no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::detach")):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", [{}, {"compression": "weighted_pool"}, {"rope_cmp": "before"}, {"shared_kv": True}])
def test_a_pooled_step_launches_next_to_nothing_of_its_own(
    variant: dict, make_config: Callable, make_cache: Callable
) -> None:
    """Lengths, positions and the commit; all else is the operation's, where a kernel can do it at once."""
    config = make_config(**variant)
    cache, counts = make_cache(config, 2), torch.ones(2, dtype=torch.int32)
    k, v = torch.zeros(2, 1, 2, 8, dtype=torch.float64), torch.zeros(2, 1, 2, 6, dtype=torch.float64)
    cache.reserve(1)
    with Launches() as launches:
        step = cache.decode(1, counts)
        new = step.new_tokens((k, v), (k, v), (k, v), Pool(None, None))
        assert (step.cmp, step.slc, step.win, new) is not None
        step.commit()
    assert sorted(launches.names) == ["aten::add.Tensor", "aten::add.Tensor", "aten::copy_"]


def test_layers_share_the_table_that_rotates_their_blocks(make_config: Callable, make_cache: Callable) -> None:
    config = make_config()
    first, second = make_cache(config, 2), make_cache(config, 3)
    assert first.rotation is second.rotation
    assert first.rotation.shape == (2, 32, 4)  # two pages of 16, for the 31 blocks of 128 tokens
    for changes in ({"rope_theta": 500.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}):
        assert not torch.equal(make_cache(make_config(**changes)).rotation, first.rotation)
    for changes in ({"rope_theta": None}, {"rope_cmp": "none"}, {"rope_cmp": "before"}, {"compression": "mlp"}):
        assert make_cache(make_config(**changes)).rotation is None
    assert make_cache(config, dtype=torch.bfloat16).rotation.dtype == torch.float32


def test_a_table_is_there_while_a_cache_has_it(make_config: Callable, make_cache: Callable) -> None:
    cache = make_cache(make_config(rope_theta=123.0))
    held = weakref.ref(cache.rotation)
    gc.collect()
    assert held() is not None
    del cache
    gc.collect()
    assert held() is None


def test_other_modules_in_the_place_of_compressions_are_called(make_layer: Callable, make_cache: Callable) -> None:
    """Only what is known to be a weighted sum is left to the operation."""

    class Negated(MeanCompression):
        def forward(self, x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
            return -super().forward(x, layout, blocks)

    layer = make_layer(rope_cmp="none")
    layer.compress_k = Negated()
    cache, generator = make_cache(layer.config, 1), torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 24, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        layer(x[:, :7], cache=cache)
        cache.reserve(5)
        out = layer.decode(x[:, 7:], cache)
        torch.testing.assert_close(out, layer(x)[:, 7:], rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("how", ["converted", "autocast"])
def test_bfloat16(how: str, kind: str, make_layer: Callable, make_cache: Callable) -> None:
    """As in test_layer_decode.py: all blocks are selected, the bound is test_layer.py's."""
    layer, x = make_layer(compression=kind), sequences()[0][None, :50]
    exact = layer(x).detach()
    layer, x = (layer.bfloat16(), x.bfloat16()) if how == "converted" else (layer.float(), x.float())
    cache = make_cache(layer.config, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        parts = [layer(x[:, :10], cache=cache)]
        for part in x[:, 10:].split(4, 1):
            cache.reserve(4)
            parts.append(layer.decode(part, cache))
            cache.advance(4)
    error = (torch.cat(parts, 1).double() - exact).square().mean().sqrt()
    assert error < 30 * torch.finfo(torch.bfloat16).eps * exact.square().mean().sqrt()


def test_only_sequences_that_may_need_a_page_are_planned(
    make_config: Callable, make_cache: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once pages are a sequence's own, its steps ask nothing more, until it leaves them or shares one."""
    config = make_config()
    cache = make_cache(config, 3, max_tokens=256)
    planned: list[int] = []
    plan = cache._plans

    def noted(lengths: Sequence[int], sequences: Sequence[int]) -> Any:
        planned.extend(sequences)
        return plan(lengths, sequences)

    monkeypatch.setattr(cache, "_plans", noted)

    def step(tokens: list[int]) -> list[int]:
        planned.clear()
        cache.reserve(tokens)
        cache.advance(tokens)
        return planned.copy()

    assert step([20, 10, 0]) == [0, 1]
    assert step([1, 1, 0]) == []
    assert step([1, 6, 1]) == [1, 2], "16 rows are a page, and a sequence begins"
    cache.free(2)
    cache.fork(0, 2)
    assert step([1, 1, 0]) == [0], "its page has two holders now"
    assert step([1, 1, 1]) == [0, 2], "a block completes, in a page with two holders"
    assert step([1, 1, 1]) == []
    cache.truncate(0, cache.lengths[0] - 2)
    assert step([1, 1, 1]) == [0]
    with pytest.raises(RuntimeError, match=r"reserve comes first$"):
        cache.advance([40, 0, 0])
