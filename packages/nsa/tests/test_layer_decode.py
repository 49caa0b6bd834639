"""Does a layer with a cache give, in any steps, the outputs and the cache of one pass over the whole?

Every cache here starts with NaN in its pages (`make_cache`), so a row that is read before it is written shows.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from unittest import mock

import nsa.layer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa import NSAAttention, NSACache, ops
from nsa_varlen import VarlenLayout
from torch import Tensor

WINDOW_KEPT = 12 - 1 + 8  # rows of the window that `contents` reads
LENGTHS = (73, 9, 40)  # past the first choice of blocks, past the first compressed block, within the window's reach
FP64 = {"rtol": 0, "atol": 1e-12}  # as in test_layer.py: tilings differ, so sums are ordered differently


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(length, 24, dtype=torch.float64, generator=generator) for length in LENGTHS]


def assert_same(got: Sequence, expected: Sequence) -> None:
    """Lists of tensors, or of mappings of tensors, agree to rounding; NaN agrees with nothing."""
    for one, other in zip(got, expected, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, **FP64)
        else:
            assert one.keys() == other.keys()
            for name, x in one.items():
                torch.testing.assert_close(x, other[name], **FP64, msg=lambda text, name=name: f"{name}: {text}")


def whole(layer: NSAAttention, certify: Callable) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What one pass without a cache gives: outputs, and the rows that a cache should come to hold, per sequence."""
    layout, blocks = VarlenLayout.from_lengths(list(LENGTHS)), layer.config.blocks
    raw: dict[str, Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        module = getattr(layer, f"compress_{name}")
        return module.register_forward_pre_hook(lambda _, args: raw.update({name: args[0]}))

    handles = [watch("k"), watch("v")]
    with mock.patch.object(nsa.layer, "nsa_attention", wraps=nsa.layer.nsa_attention) as attention:
        out = certify(layer, torch.cat(sequences()), layout).split(LENGTHS)
    for handle in handles:
        handle.remove()
    rows = dict(zip(("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"), attention.call_args.args[1:7], strict=True))
    counts = [blocks.num_compressed(length) for length in LENGTHS]
    split = {name: x.split(counts if "cmp" in name else LENGTHS) for name, x in (rows | raw).items()}
    held = []
    for sequence, count in enumerate(counts):
        held.append({name: split[name][sequence][-WINDOW_KEPT if "win" in name else 0 :] for name in rows})
        for name in "kv":
            held[-1][f"{name}_raw"] = split[name][sequence][count * blocks.kernel_stride :]
    return list(out), held


@pytest.fixture(scope="module")
def layers(make_layer: Callable, certify: Callable) -> Callable[..., tuple]:
    """(layer, outputs, contents) of a variant, computed once."""
    made: dict[str, tuple] = {}

    def get(variant: dict) -> tuple:
        if repr(variant) not in made:
            layer = make_layer(**variant)
            made[repr(variant)] = (layer, *whole(layer, certify))
        return made[repr(variant)]

    return get


def test_prefill_in_one_step(
    variant: dict, layers: Callable, make_cache: Callable, feed: Callable, contents: Callable
) -> None:
    layer, out, held = layers(variant)
    cache = make_cache(layer.config, 3)
    assert_same(feed(layer, cache, sequences(), [LENGTHS]), out)
    assert cache.lengths == LENGTHS
    assert_same(contents(cache), held)


def test_token_by_token(
    variant: dict, layers: Callable, make_cache: Callable, feed: Callable, contents: Callable
) -> None:
    """Also with sequences that get no token in a step: each ends at its own time."""
    layer, out, _ = layers(variant)
    cache, at_once = make_cache(layer.config, 3), make_cache(layer.config, 3)
    steps = [[int(step < length) for length in LENGTHS] for step in range(max(LENGTHS))]
    assert_same(feed(layer, cache, sequences(), steps), out)
    feed(layer, at_once, sequences(), [LENGTHS])
    assert_same(contents(cache), contents(at_once))


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """LENGTHS cut into steps; each sequence at its own places, with steps that bring it nothing."""
    count = draw(st.integers(1, 6))
    cuts = [sorted(draw(st.lists(st.integers(0, n), min_size=count, max_size=count))) for n in LENGTHS]
    chunks = [[b - a for a, b in pairwise([0, *at, n])] for at, n in zip(cuts, LENGTHS, strict=True)]
    return [list(step) for step in zip(*chunks, strict=True)]


@settings(max_examples=8, deadline=None)
@given(steps=splits())
def test_any_split(
    steps: list[list[int]],
    variant: dict,
    layers: Callable,
    make_cache: Callable,
    feed: Callable,
    contents: Callable,
) -> None:
    layer, out, _ = layers(variant)
    cache, at_once = make_cache(layer.config, 3), make_cache(layer.config, 3)
    assert_same(feed(layer, cache, sequences(), steps), out)
    feed(layer, at_once, sequences(), [LENGTHS])
    assert cache.lengths == at_once.lengths
    assert_same(contents(cache), contents(at_once))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(steps=splits())
def test_any_split_at_length(
    steps: list[list[int]],
    variant: dict,
    layers: Callable,
    make_cache: Callable,
    feed: Callable,
    contents: Callable,
) -> None:
    test_any_split.hypothesis.inner_test(steps, variant, layers, make_cache, feed, contents)


@pytest.mark.parametrize("kind", ["mean", "weighted_pool", "linear", "mlp"])
def test_a_block_is_emitted_when_its_last_token_arrives(kind: str, layers: Callable, make_cache: Callable) -> None:
    """Exactly when S >= l and (S - l) % d == 0, and the token that completes it sees it."""
    layer = layers({"compression": kind, "rope_cmp": "after"})[0]
    cache, x, emitted = make_cache(layer.config), sequences()[0], 0
    with mock.patch.object(ops, "compressed_attention", wraps=ops.compressed_attention) as attend, torch.no_grad():
        for token in range(1, 41):
            with mock.patch.object(ops, "select_blocks", wraps=ops.select_blocks) as select:
                layer(x[None, None, token - 1], cache=cache)
            emitted += token >= 8 and (token - 8) % 4 == 0
            k_cmp, v_cmp = attend.call_args.args[1:3]
            assert (k_cmp.lengths.tolist(), v_cmp.lengths.tolist()) == ([emitted], [emitted])
            lse = select.call_args.args[2]
            assert lse.isfinite().all() == (emitted > 0)
    assert emitted == layer.config.blocks.num_compressed(40) == 9


def test_a_new_block_is_visible_in_its_own_step(layers: Callable, make_cache: Callable) -> None:
    """Token 8 completes the first block: with the window and selected gates shut, its output is W_o gate v_cmp."""
    layer = layers({"compression": "mean", "rope_cmp": "after"})[0]
    gate = torch.zeros(1, 4, 3, dtype=torch.float64)
    gate[..., 0] = 1
    cache, x = make_cache(layer.config), sequences()[0]
    with torch.no_grad():
        layer(x[None, :7], cache=cache)
        with mock.patch.object(layer.gates, "forward", return_value=gate):
            out = layer(x[None, 7:8], cache=cache)
        v = layer.v_proj(x[:8]).unflatten(-1, (3, 2, 6))[:, 0].mean(0).repeat_interleave(2, 0)
        expected = layer.o_proj(v.flatten())
    torch.testing.assert_close(out[0, 0], expected, **FP64)


@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padded_steps(side: str, layers: Callable, make_cache: Callable, feed: Callable, contents: Callable) -> None:
    """A padded prefill, then padded chunks, are the packed steps."""
    layer, *_ = layers({"shared_kv": True})
    steps = [[60, 9, 0], [1, 0, 8], [12, 0, 32]]
    cache, packed = make_cache(layer.config, 3), make_cache(layer.config, 3)
    expected = feed(layer, packed, sequences(), steps)
    done, outputs = [0, 0, 0], [[], [], []]
    for step in steps:
        width = max(step) + 3
        x = torch.full((3, width, 24), torch.nan, dtype=torch.float64)
        mask = torch.zeros(3, width, dtype=torch.bool)
        for b, new in enumerate(step):
            at = {"left": range(width - new, width), "right": range(new), "interior": range(1, new + 1)}[side]
            mask[b, list(at)] = True
            x[b, list(at)] = sequences()[b][done[b] : done[b] + new]
            done[b] += new
        with torch.no_grad():
            out = layer(x, padding_mask=mask, cache=cache)
        assert (out[~mask] == 0).all()
        for b in range(3):
            outputs[b].append(out[b, mask[b]])
    assert_same([torch.cat(parts) for parts in outputs], expected)
    assert_same(contents(cache), contents(packed))


def test_a_full_batch_of_steps(layers: Callable, make_cache: Callable) -> None:
    layer = layers({"shared_kv": True})[0]
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    cache = make_cache(layer.config, 2)
    with torch.no_grad():
        out = torch.cat([layer(part, cache=cache) for part in x.split([20, 1, 9], 1)], 1)
        torch.testing.assert_close(out, layer(x), **FP64)


def test_a_step_without_tokens(layers: Callable, make_cache: Callable, contents: Callable) -> None:
    layer = layers({"shared_kv": True})[0]
    cache = make_cache(layer.config, 2)
    empty = torch.zeros(2, 0, 24, dtype=torch.float64)
    with torch.no_grad():
        assert layer(empty, cache=cache).shape == (2, 0, 24)
        layer(torch.randn(2, 11, 24, dtype=torch.float64), cache=cache)
        before = contents(cache)
        assert layer(empty, cache=cache).shape == (2, 0, 24)
    assert cache.lengths == (11, 11)
    assert_same(contents(cache), before)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_page_sizes(page_size: int, layers: Callable, make_cache: Callable, feed: Callable) -> None:
    layer, out, _ = layers({"shared_kv": True})
    cache = make_cache(layer.config, 3, page_size=page_size)
    assert_same(feed(layer, cache, sequences(), [[33, 9, 0], [1, 0, 40], [39, 0, 0]]), out)


@pytest.mark.parametrize("max_tokens", [1, 7, 8, 16, 17])
def test_small_capacities(max_tokens: int, layers: Callable, make_cache: Callable) -> None:
    """Also where no compressed block ever fits."""
    layer = layers({"shared_kv": True})[0]
    cache, x = make_cache(layer.config, 1, max_tokens), sequences()[0][None, :max_tokens]
    with torch.no_grad():
        out = torch.cat([layer(token, cache=cache) for token in x.split(1, 1)], 1)
        torch.testing.assert_close(out, layer(x), **FP64)


@pytest.mark.parametrize("kernel_size, kernel_stride", [(1, 1), (4, 1), (8, 8), (16, 2)])
def test_other_blocks(
    kernel_size: int, kernel_stride: int, make_layer: Callable, make_cache: Callable, feed: Callable, certify: Callable
) -> None:
    """No waiting token, a block per token, blocks that do not overlap, and blocks of a whole selection block."""
    layer = make_layer(kernel_size=kernel_size, kernel_stride=kernel_stride, compression="weighted_pool")
    out = certify(layer, torch.cat(sequences()), VarlenLayout.from_lengths(list(LENGTHS))).split(LENGTHS)
    steps = [[int(step < length) for length in LENGTHS] for step in range(max(LENGTHS))]
    assert_same(feed(layer, make_cache(layer.config, 3), sequences(), steps), out)


def test_inference_mode_and_no_grad_mix(layers: Callable, make_cache: Callable) -> None:
    layer, out, _ = layers({"shared_kv": True})
    cache, x = make_cache(layer.config), sequences()[0]
    with torch.inference_mode():
        first = layer(x[None, :50], cache=cache)
    with torch.no_grad():
        second = layer(x[None, 50:60], cache=cache)
    with torch.inference_mode():
        third = layer(x[None, 60:], cache=cache)
    assert_same([torch.cat([first, second, third], 1)[0]], [out[0]])


@pytest.mark.parametrize("kind", ["mean", "weighted_pool", "linear", "mlp"])
@pytest.mark.parametrize("how", ["converted", "autocast"])
def test_bfloat16(how: str, kind: str, make_layer: Callable, make_cache: Callable) -> None:
    """The first 50 tokens are 4 blocks: all are selected, and only rounding separates a cache from one pass."""
    layer, x = make_layer(compression=kind), sequences()[0][None, :50]
    exact = layer(x).detach()
    layer, x = (layer.bfloat16(), x.bfloat16()) if how == "converted" else (layer.float(), x.float())
    cache = make_cache(layer.config, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = torch.cat([layer(part, cache=cache) for part in x.split([20, 1, 1, 28], 1)], 1)
    error = (out.double() - exact).square().mean().sqrt()
    # The bound of test_layer.py's lower precisions, derived there.
    assert error < 30 * torch.finfo(torch.bfloat16).eps * exact.square().mean().sqrt()


def test_a_cache_made_for_an_equal_configuration_serves(layers: Callable, make_config: Callable) -> None:
    layer = layers({"shared_kv": True})[0]
    cache = NSACache(make_config(shared_kv=True), 1, 16, page_size=16, dtype=torch.float64)
    with torch.no_grad():
        layer(torch.randn(1, 3, 24, dtype=torch.float64), cache=cache)
    assert cache.lengths == (3,)
