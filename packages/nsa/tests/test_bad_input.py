"""Does every wrong argument raise, naming itself, what was expected and what came, and write nothing?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa import NSAAttention, NSACache, NSAConfig, PagePool, nsa_attention, ops
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12)
LAYOUT = VarlenLayout.from_lengths([20, 3])


def arguments() -> dict[str, Any]:
    """Right ones: 4 query heads, 2 kv heads, Dk=8, Dv=6, 23 tokens, 4 compressed blocks."""
    x = {"q": torch.randn(23, 4, 8), "gates": torch.rand(23, 4, 3)}
    x |= {f"{side}_cmp": torch.randn(4, 2, dim) for side, dim in (("k", 8), ("v", 6))}
    x |= {
        f"{side}_{branch}": torch.randn(23, 2, dim) for side, dim in (("k", 8), ("v", 6)) for branch in ("slc", "win")
    }
    return x | {"layout": LAYOUT, "blocks": BLOCKS}


NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates", "layout", "blocks")


def whole(**changes: Any) -> None:
    x = arguments() | {name: changes.pop(name) for name in list(changes) if name in NAMES}
    nsa_attention(*(x[name] for name in NAMES), **changes)


def test_the_arguments_are_right_until_changed() -> None:
    whole()


OTHER_LAYOUT = VarlenLayout.from_lengths([20, 4])
MORE_KEYS = VarlenLayout.from_lengths([20, 3], [20, 5])
LONG_KEYS = {name: torch.randn(4, 1, dim) for name, dim in (("k_cmp", 8), ("v_cmp", 6))}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"q": torch.randn(23, 4, 8).int()}, TypeError, "q: expected a floating dtype, got torch.int32"),
        ({"q": torch.randn(22, 4, 8)}, ValueError, r"q: expected shape \[23, heads, head_dim\], got \[22, 4, 8\]"),
        ({"q": torch.randn(23, 32)}, ValueError, r"q: expected shape \[23, heads, head_dim\], got \[23, 32\]"),
        ({"q": torch.randn(23, 4, 8, device="meta")}, ValueError, "q: expected device cpu of the layout, got meta"),
        (
            {"q": torch.randn(23, 4, 8).double()},
            TypeError,
            "k_cmp: expected dtype torch.float64 of q, got torch.float32",
        ),
        ({"q": torch.randn(23, 5, 8)}, ValueError, "k_cmp: expected kv heads that divide q's 5 heads, got 2"),
        ({"q": torch.randn(23, 4, 10)}, ValueError, "k_cmp: expected head_dim 10 of q, got 8"),
        ({"k_cmp": torch.randn(5, 2, 8)}, ValueError, r"k_cmp: expected shape \[4, heads, head_dim\], got \[5, 2, 8\]"),
        ({"v_cmp": torch.randn(4, 1, 6)}, ValueError, "v_cmp: expected 2 heads of k_cmp, got 1"),
        (
            {"v_cmp": torch.randn(4, 2, 6).half()},
            TypeError,
            "v_cmp: expected dtype torch.float32 of q, got torch.float16",
        ),
        ({"k_slc": torch.randn(23, 2, 6)}, ValueError, "k_slc: expected head_dim 8 of q, got 6"),
        ({"k_slc": torch.randn(23, 3, 8)}, ValueError, "k_slc: expected kv heads that divide q's 4 heads, got 3"),
        (
            {"v_slc": torch.randn(22, 2, 6)},
            ValueError,
            r"v_slc: expected shape \[23, heads, head_dim\], got \[22, 2, 6\]",
        ),
        ({"k_win": None}, TypeError, "k_win: expected a tensor, got NoneType"),
        ({"v_win": None}, TypeError, "v_win: expected a tensor, got NoneType"),
        (
            {"v_win": torch.randn(23, 2, 6, device="meta")},
            ValueError,
            "v_win: expected device cpu of the layout, got meta",
        ),
        (
            {"v_win": torch.randn(23, 2, 5)},
            ValueError,
            "v_cmp, v_slc, v_win: expected the same head_dim, got .*'v_win': 5",
        ),
        (
            LONG_KEYS,
            ValueError,
            "k_cmp, k_slc, k_win: expected the same number of kv heads, got {'k_cmp': 1, 'k_slc': 2",
        ),
        ({"gates": torch.rand(23, 4, 2)}, ValueError, r"gates: expected shape \[23, 4, 3\], got \[23, 4, 2\]"),
        ({"gates": torch.rand(23, 2, 3)}, ValueError, r"gates: expected shape \[23, 4, 3\], got \[23, 2, 3\]"),
        ({"gates": torch.rand(23, 12)}, ValueError, r"gates: expected 3 dimensions, got shape \[23, 12\]"),
        ({"gates": torch.ones(23, 4, 3).int()}, TypeError, "gates: expected a floating dtype, got torch.int32"),
        ({"gates": torch.rand(23, 4, 3, device="meta")}, ValueError, "gates: expected device cpu, got meta"),
        ({"layout": OTHER_LAYOUT}, ValueError, r"q: expected shape \[24, heads, head_dim\], got \[23, 4, 8\]"),
        ({"layout": MORE_KEYS}, ValueError, r"k_slc: expected shape \[25, heads, head_dim\], got \[23, 2, 8\]"),
        ({"layout": torch.tensor([0, 20, 23])}, TypeError, "layout: expected a VarlenLayout, got Tensor"),
        ({"blocks": {"topk": 4}}, TypeError, "blocks: expected a BlockGeometry, got dict"),
        (
            {"q_cmp": torch.randn(23, 2, 8)},
            ValueError,
            r"q_cmp: expected torch.float32 \[23, 4, 8\] of q, got .* \[23, 2, 8\]",
        ),
        (
            {"q_cmp": torch.randn(23, 4, 8).double()},
            ValueError,
            "q_cmp: expected torch.float32 .* of q, got torch.float64",
        ),
        (
            {"q_cmp": torch.randn(22, 4, 8)},
            ValueError,
            r"q_cmp: expected shape \[23, heads, head_dim\], got \[22, 4, 8\]",
        ),
        ({"scale": 0.0}, ValueError, "scale: expected a finite number above 0, got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number above 0, got nan"),
        ({"scale": "1"}, TypeError, "scale: expected a float or None, got str"),
        (
            {"block_indices": torch.zeros(23, 2, 4)},
            TypeError,
            "block_indices: expected dtype torch.int32, got torch.float32",
        ),
        (
            {"block_indices": torch.zeros(23, 4, 4, dtype=torch.int32)},
            ValueError,
            r"block_indices: expected shape \[23, 2, N\], got \[23, 4, 4\]",
        ),
        (
            {"block_indices": torch.zeros(23, 2, 4, dtype=torch.int32, device="meta")},
            ValueError,
            "block_indices: expected device cpu of the layout, got meta",
        ),
        ({"backend": "none-such"}, ValueError, "backend: expected one of .*, got 'none-such'"),
    ],
)
def test_nsa_attention(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{message}"):
        whole(**changes)


def test_arguments_are_checked_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("an operation ran")

    monkeypatch.setattr(ops, "dispatch", refuse)
    last = {
        "gates": torch.rand(23, 4, 2),
        "v_win": torch.randn(23, 2, 5),
        "block_indices": torch.zeros(23, 2, 4),
        "q_cmp": torch.randn(23, 2, 8),
    }
    for name, value in last.items():
        with pytest.raises((TypeError, ValueError), match=name):
            whole(**{name: value})


@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
@pytest.mark.parametrize("deterministic, kind", [("yes", "str"), (1, "int")])
def test_deterministic_is_a_bool(deterministic: object, kind: str, op: str) -> None:
    x = arguments()
    keys, values = (x["k_cmp"], x["v_cmp"]) if op == "compressed_attention" else (x["k_slc"], x["v_slc"])
    extra = (torch.zeros(23, 2, 4, dtype=torch.int32),) if op == "selected_attention" else ()
    with pytest.raises(TypeError, match=rf"^deterministic: expected a bool or None, got {kind}$"):
        getattr(ops, op)(x["q"], keys, values, *extra, LAYOUT, BLOCKS, deterministic=deterministic)


@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
def test_each_attention_names_its_arguments(op: str) -> None:
    x = arguments()
    k, v = ("k_cmp", "v_cmp") if op == "compressed_attention" else ("k", "v")
    keys, values = (x["k_cmp"], x["v_cmp"]) if op == "compressed_attention" else (x["k_slc"], x["v_slc"])
    extra = (torch.zeros(23, 2, 4, dtype=torch.int32),) if op == "selected_attention" else ()
    run = getattr(ops, op)
    run(x["q"], keys, values, *extra, LAYOUT, BLOCKS)
    for wrong, error, message in [
        ((x["q"][:5], keys, values), ValueError, "^q: expected shape"),
        ((x["q"], keys[:2], values), ValueError, f"^{k}: expected shape"),
        ((x["q"], keys, values.double()), TypeError, f"^{v}: expected dtype torch.float32 of q, got torch.float64"),
        ((x["q"], keys, "v"), TypeError, f"^{v}: expected a tensor, got str"),
    ]:
        with pytest.raises(error, match=message):
            run(*wrong, *extra, LAYOUT, BLOCKS)


@pytest.mark.parametrize(
    "lse, error, message",
    [
        (torch.zeros(4, 22), ValueError, r"^lse: expected shape \[4, 23\], got \[4, 22\]$"),
        (torch.zeros(23, 4), ValueError, r"^lse: expected shape \[4, 23\], got \[23, 4\]$"),
        (torch.zeros(4, 23).half(), TypeError, r"^lse: expected dtype torch.float32, got torch.float16$"),
        (None, TypeError, r"^lse: expected a tensor, got NoneType$"),
    ],
)
def test_select_blocks(lse: object, error: type[Exception], message: str) -> None:
    x = arguments()
    with pytest.raises(error, match=message):
        ops.select_blocks(x["q"], x["k_cmp"], lse, LAYOUT, BLOCKS)


def test_compress_mean_and_combine() -> None:
    with pytest.raises(ValueError, match=r"^x: expected shape \[23, heads, head_dim\], got \[22, 2, 8\]$"):
        ops.compress_mean(torch.randn(22, 2, 8), LAYOUT, BLOCKS)
    with pytest.raises(TypeError, match=r"^x: expected a floating dtype, got torch.int64$"):
        ops.compress_mean(torch.ones(23, 2, 8).long(), LAYOUT, BLOCKS)
    gates, o = torch.rand(23, 4, 3), torch.randn(23, 4, 6)
    with pytest.raises(ValueError, match=r"^o_win: expected \[23, 4, 6\] .* as o_cmp, got \[23, 4, 5\]"):
        ops.combine(gates, o, o, o[..., :5])
    with pytest.raises(TypeError, match=r"^o_slc: expected a tensor, got NoneType$"):
        ops.combine(gates, o, None, o)


def pages(x: Tensor, batch_size: int = 2, **options: Any) -> PagedKV:
    table = torch.zeros(batch_size, 2, dtype=torch.int32, device=x.device)
    lengths = torch.tensor([20, 3, 0][:batch_size], dtype=torch.int32, device=x.device)
    return PagedKV(x, table, lengths, **options)


@pytest.mark.parametrize(
    "k, error, message",
    [
        (pages(torch.zeros(4, 16, 2, 8), 3), ValueError, "k: expected 2 sequences, got 3 in block_table"),
        (pages(torch.zeros(4, 16, 2, 8, device="meta")), ValueError, "k: expected device cpu of the layout, got meta"),
        (pages(torch.zeros(4, 16, 2, 8).half()), TypeError, "k: expected dtype torch.float32 of q, got torch.float16"),
        (pages(torch.zeros(4, 16, 3, 8)), ValueError, "k: expected kv heads that divide q's 4 heads, got 3"),
        (pages(torch.zeros(4, 16, 2, 8), k_scale=torch.ones(1)), ValueError, "k: expected pages without k_scale"),
    ],
)
def test_pages(k: PagedKV, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{message}"):
        ops.window_attention(torch.randn(23, 4, 8), k, pages(torch.zeros(4, 16, 2, 6)), LAYOUT, BLOCKS)


@pytest.mark.parametrize("op", ["window_attention", "selected_attention"])
def test_gradients_through_pages_are_refused(op: str) -> None:
    """By the route: no backend accepts, and the message says why."""
    q, kv = torch.randn(23, 4, 8, requires_grad=True), pages(torch.zeros(4, 16, 2, 8))
    extra = (torch.zeros(23, 2, 4, dtype=torch.int32),) if op == "selected_attention" else ()
    with pytest.raises(RuntimeError, match=r"sdpa +rejected: records no gradients through paged keys and values"):
        getattr(ops, op)(q, kv, kv, *extra, LAYOUT, BLOCKS)


X = torch.randn(2, 5, 24, dtype=torch.float64)
PACKED = X.flatten(0, 1)
TEN = VarlenLayout.from_lengths([5, 5])


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.float()}, TypeError, "x: expected dtype torch.float64 of the layer, got torch.float32"),
        ({"x": X.long()}, TypeError, "x: expected dtype torch.float64 of the layer, got torch.int64"),
        ({"x": X.to("meta")}, ValueError, "x: expected device cpu of the layer, got meta"),
        ({"x": X.to("meta").half()}, (TypeError, ValueError), "x: expected"),
        ({"x": X[..., :20]}, ValueError, r"x: expected shape \[B, S, 24\] or packed \[T, 24\], got \[2, 5, 20\]"),
        ({"x": X[0, 0]}, ValueError, r"x: expected shape \[B, S, 24\] or packed \[T, 24\], got \[24\]"),
        ({"x": PACKED}, ValueError, "layout: expected one for packed x .*, and no padding_mask, got None$"),
        ({"x": PACKED, "layout": [5, 5]}, TypeError, "layout: expected a VarlenLayout, got list"),
        ({"x": X, "layout": [5, 5]}, (TypeError, ValueError), "layout: expected"),
        ({"x": X, "layout": TEN}, ValueError, "layout: expected None for x"),
        ({"x": PACKED[:9], "layout": TEN}, ValueError, "layout: expected total_q=9 on cpu, got 10 on cpu"),
        ({"x": PACKED, "layout": TEN.to("meta")}, ValueError, "layout: expected total_q=10 on cpu, got 10 on meta"),
        (
            {"x": PACKED, "layout": VarlenLayout.from_lengths([5, 5], [6, 5])},
            ValueError,
            r"layout: expected as many keys as queries .*, got cu_seqlens_k=\[0, 6, 11\]",
        ),
        (
            {"x": PACKED, "layout": TEN, "padding_mask": torch.ones(2, 5, dtype=torch.bool)},
            ValueError,
            "layout: expected one for packed x .*, and no padding_mask, got a padding_mask$",
        ),
        ({"x": X, "padding_mask": torch.ones(2, 5)}, TypeError, "mask: expected a bool tensor .*, got torch.float32"),
        ({"x": X, "padding_mask": torch.ones(2, 4) > 0}, ValueError, r"mask: expected shape \[2, 5\] .*, got \[2, 4\]"),
        (
            {"x": X, "padding_mask": (torch.ones(2, 5) > 0).to("meta")},
            ValueError,
            "mask: expected device cpu of x, got meta",
        ),
        ({"x": X, "cache": {}}, TypeError, "cache: expected an NSACache, got dict"),
    ],
)
@torch.no_grad()
def test_layer(call: dict, error: Any, message: str, make_layer: Callable) -> None:
    with pytest.raises(error, match=rf"^(padding_)?{message}"):
        make_layer()(**call)


def state(cache: NSACache) -> list[Any]:
    parts = (cache.pool, cache.tail, cache.cmp, cache.slc, cache.win)
    held = [value for part in parts for value in vars(part).values() if not isinstance(value, PagePool)]
    return [x.clone() if isinstance(x, Tensor) else repr(x) for x in [*held, cache.device_lengths]] + [cache.lengths]


def assert_untouched(cache: NSACache, before: list[Any]) -> None:
    for now, then in zip(state(cache), before, strict=True):
        assert torch.allclose(now, then, rtol=0, atol=0, equal_nan=True) if isinstance(now, Tensor) else now == then


@pytest.fixture
def started(make_layer: Callable, make_cache: Callable) -> tuple[NSAAttention, NSACache]:
    """A layer and a cache for two sequences of at most 32 tokens, which hold 11 and 3."""
    layer = make_layer()
    cache = make_cache(layer.config, 2, 32)
    with torch.no_grad():
        layer(torch.randn(14, 24, dtype=torch.float64), layout=VarlenLayout.from_lengths([11, 3]), cache=cache)
    return layer, cache


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            {"x": torch.zeros(2, 22, 24)},
            ValueError,
            r"lengths: expected at most max_tokens=32 .*, got 11 \+ 22 for sequence 0",
        ),
        ({"x": torch.zeros(3, 1, 24)}, ValueError, "cache: expected batch_size 3, got 2"),
        (
            {"x": torch.zeros(3, 24), "layout": VarlenLayout.from_lengths([1, 1, 1])},
            ValueError,
            "cache: expected batch_size 3, got 2",
        ),
        (
            {"x": torch.zeros(31, 24), "layout": VarlenLayout.from_lengths([1, 30])},
            ValueError,
            r"lengths: expected at most max_tokens=32 .*, got 3 \+ 30 for sequence 1",
        ),
        ({"x": torch.zeros(2, 1, 23)}, ValueError, "x: expected shape"),
    ],
)
def test_calls_that_raise_write_nothing(
    call: dict, error: type[Exception], message: str, started: tuple[NSAAttention, NSACache]
) -> None:
    layer, cache = started
    before = state(cache)
    with torch.no_grad(), pytest.raises(error, match=rf"^{message}"):
        layer(**(call | {"x": call["x"].double()}), cache=cache)
    assert_untouched(cache, before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None,), "cache: expected an NSACache, got NoneType$"),
        (({},), "cache: expected an NSACache, got dict$"),
        (("the cache", [1, 1]), r"counts: expected a torch.int32 tensor \[2\] or None, got list$"),
        (("the cache", 1), r"counts: expected a torch.int32 tensor \[2\] or None, got int$"),
    ],
)
@torch.no_grad()
def test_decode_steps_that_raise_write_nothing(
    arguments: tuple, message: str, started: tuple[NSAAttention, NSACache]
) -> None:
    layer, cache = started
    cache.reserve(1)
    before = state(cache)
    with pytest.raises(TypeError, match=rf"^{message}"):
        layer.decode(X[:, :1], *(cache if each == "the cache" else each for each in arguments))
    assert_untouched(cache, before)


def test_a_layer_that_records_gradients_is_refused(started: tuple[NSAAttention, NSACache]) -> None:
    layer, cache = started
    before = state(cache)
    x = torch.randn(2, 1, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^cache: expected no gradient to be recorded, got grad mode on"):
        layer(x, cache=cache)
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^cache: expected no gradient to be recorded, got grad mode on"):
        layer(x.clone().requires_grad_(), cache=cache)
    assert_untouched(cache, before)
    layer(x, cache=cache)  # nothing that needs a gradient: grad mode alone does no harm
    assert cache.lengths == (12, 4)


def other_caches(config: NSAConfig, make_config: Callable) -> list[tuple[NSACache, type[Exception], str]]:
    options = {"page_size": 16, "dtype": torch.float64}
    return [
        (
            NSACache(make_config(topk=5), 2, 32, **options),
            ValueError,
            r"cache: expected one made for NSAConfig\(.*topk=5",
        ),
        (
            NSACache(make_config(shared_kv=True), 2, 32, **options),
            ValueError,
            r"cache: expected one made for NSAConfig",
        ),
        (NSACache(config, 2, 32, device="meta", **options), ValueError, "cache: expected device cpu of x, got meta"),
        (NSACache(config, 2, 32, page_size=16), TypeError, "cache: expected dtype torch.float64 .*, got torch.float32"),
    ]


@torch.no_grad()
def test_another_cache_is_refused(make_layer: Callable, make_config: Callable) -> None:
    layer, x = make_layer(), torch.randn(2, 9, 24, dtype=torch.float64)
    for cache, error, message in other_caches(layer.config, make_config):
        before = state(cache) if cache.device.type == "cpu" else None
        with pytest.raises(error, match=rf"^{message}"):
            layer(x, cache=cache)
        assert cache.lengths == (0, 0)
        if before is not None:
            assert_untouched(cache, before)


@torch.no_grad()
def test_the_dtype_of_a_cache_under_autocast_is_that_of_the_projections(make_config: Callable) -> None:
    layer, x = NSAAttention(make_config()), torch.randn(2, 9, 24)
    cache = NSACache(layer.config, 2, 32, page_size=16)
    before = state(cache)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"^cache: expected dtype torch.bfloat16 of the projections, got torch.float32$"),
    ):
        layer(x, cache=cache)
    assert_untouched(cache, before)


@torch.no_grad()
def test_a_failure_on_the_way_leaves_the_cache_usable(
    started: tuple[NSAAttention, NSACache], make_cache: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation that fails after the new rows were stored: they are behind the lengths, and overwritten."""
    layer, cache = started
    twin = make_cache(layer.config, 2, 32)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.manual_seed(7)
    history = torch.randn(14, 24, dtype=torch.float64)
    cache.reset()
    for each in (cache, twin):
        layer(history, layout=VarlenLayout.from_lengths([11, 3]), cache=each)

    class Broken(Exception):
        pass

    def fail(*args: object, **kwargs: object) -> None:
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(ops, "window_attention", fail)
        with pytest.raises(Broken):
            layer(x + 1, cache=cache)
    assert cache.lengths == twin.lengths
    assert torch.equal(layer(x, cache=cache), layer(x, cache=twin))


@pytest.mark.usefixtures("fresh_routes")
def test_no_backend_for_the_problem_shows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_BACKEND", "window_attention=none-such")
    x = arguments()
    with pytest.raises(RuntimeError, match=r"requested: none-such(.|\n)*none-such +rejected: not installed"):
        ops.window_attention(x["q"], x["k_win"], x["v_win"], LAYOUT, BLOCKS)


@pytest.mark.usefixtures("fresh_routes")  # flags are read when the first operation runs
def test_an_unknown_flag_stops_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_BAKCEND", "sdpa")
    with pytest.raises(ValueError, match=r"^NSA_BAKCEND: expected one of the variables"):
        whole()
