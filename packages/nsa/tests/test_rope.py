"""Is the rotation the formula, per head, at any distance, in any dtype, under every scaling?"""

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from nsa.rope import RotaryEmbedding
from torch import Tensor

THETA = 10_000.0
EPS = 2.0**-52


def rotated_by_hand(x: Tensor, positions: list[int], frequencies: list[float], interleaved: bool) -> Tensor:
    """Each pair as a complex number times exp(i * position * frequency), one Python float at a time."""
    out = x.clone()
    half = x.shape[-1] // 2
    for t, position in enumerate(positions):
        for head in range(x.shape[1]):
            for i, frequency in enumerate(frequencies):
                a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                turned = complex(x[t, head, a], x[t, head, b]) * cmath.exp(1j * position * frequency)
                out[t, head, a], out[t, head, b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [[0, 1, 2, 65_535], [2**24 + 1, 10**7, 3, 2**24]], ids=["near", "far"])
def test_rotates_pairs_by_position_times_frequency(positions: list[int], interleaved: bool) -> None:
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    frequencies = [THETA ** (-2 * i / 8) for i in range(4)]
    expected = rotated_by_hand(x, positions, frequencies, interleaved)
    got = RotaryEmbedding(8, THETA, interleaved)(x, torch.tensor(positions))
    # A frequency may differ by one unit in the last place between pow implementations, and the product rounds once.
    atol = 4 * x.abs().max().item() * (max(positions) + 1) * EPS
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("interleaved", [False, True])
def test_far_positions_are_as_exact_as_near_ones_in_fp32(interleaved: bool) -> None:
    x, positions = torch.randn(4, 2, 8), [2**24 + 1, 2**24, 10**7, 5]
    expected = rotated_by_hand(x.double(), positions, [THETA ** (-2 * i / 8) for i in range(4)], interleaved)
    got = RotaryEmbedding(8, THETA, interleaved)(x, torch.tensor(positions))
    # cos and sin round to fp32, then two products and a sum: 4 roundings of at most |x| * 2^-24 each.
    assert (got.double() - expected).abs().max() < 4 * x.abs().max() * 2**-24


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_table_has_the_very_turns_of_its_positions(dtype: torch.dtype, scaling: dict | None) -> None:
    rope, x = RotaryEmbedding(8, THETA, scaling=scaling), torch.randn(50, 1, 8).to(dtype)
    cos, sin = rope.table(50, 16, x.device, dtype)[:, :, None]
    first, second = x.chunk(2, -1)
    by_table = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(dtype)
    assert torch.equal(by_table, rope(x, torch.arange(0, 800, 16)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_dot_products_depend_on_the_distance_only(interleaved: bool) -> None:
    rope = RotaryEmbedding(8, THETA, interleaved)
    q, k = torch.randn(2, 6, 1, 8, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 8, 100, 4000])

    def dots(shift: int) -> Tensor:
        at = positions + shift
        return torch.einsum("qhd,khd->qk", rope(q, at), rope(k, at))

    for shift in (1, 64, 100_000):
        # The angle of a shifted position rounds by shift * eps; a dot product moves by that times |q| |k|.
        bound = 8 * (shift + 4000) * EPS * q.norm(dim=-1).max() * k.norm(dim=-1).max()
        assert (dots(shift) - dots(0)).abs().max() < bound
    moved = torch.einsum("qhd,khd->qk", rope(q, positions + 1), rope(k, positions))
    assert (moved - dots(0)).abs().max() > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_rotate_alike_and_apart(interleaved: bool) -> None:
    rope, x = RotaryEmbedding(8, THETA, interleaved), torch.randn(5, 4, 8)
    positions, order = torch.arange(5) * 100, torch.tensor([2, 0, 3, 1])
    assert torch.equal(rope(x[:, order], positions), rope(x, positions)[:, order])
    for head in range(4):
        assert torch.equal(rope(x[:, [head]], positions), rope(x, positions)[:, [head]])


def test_the_pairings_differ_by_a_permutation_of_dimensions() -> None:
    x, positions = torch.randn(5, 2, 8), torch.arange(5)
    halves = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    split, interleaved = RotaryEmbedding(8, THETA), RotaryEmbedding(8, THETA, interleaved=True)
    assert torch.equal(split(x[..., halves], positions), interleaved(x, positions)[..., halves])
    assert not torch.equal(split(x, positions), interleaved(x, positions))


def test_keeps_lengths_and_leaves_position_zero_alone() -> None:
    rope, x = RotaryEmbedding(8, THETA), torch.randn(3, 2, 8, dtype=torch.float64)
    assert torch.equal(rope(x, torch.zeros(3, dtype=torch.int64)), x)
    turned = rope(x, torch.tensor([1, 999, 10**6]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.float])
def test_conversions_keep_the_frequencies(convert: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    rope, same = RotaryEmbedding(64, THETA), RotaryEmbedding(64, THETA)
    converted = convert(torch.nn.Sequential(rope))[0]
    assert converted.frequency.dtype == torch.float64
    assert torch.equal(converted.frequency, same.frequency)


def test_to_a_dtype_keeps_the_frequencies_and_to_a_device_moves_them() -> None:
    rope, same = RotaryEmbedding(64, THETA), RotaryEmbedding(64, THETA)
    assert torch.equal(rope.to(torch.float16).frequency, same.frequency)
    assert rope.to("meta", torch.float16).frequency.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    rope, x, positions = RotaryEmbedding(8, THETA), torch.randn(5, 2, 8).to(dtype), torch.arange(5) * 1000
    got = rope(x, positions)
    assert got.dtype == dtype
    assert torch.equal(got, rope(x.float(), positions).to(dtype))


def test_frequencies_are_no_part_of_a_checkpoint() -> None:
    assert not RotaryEmbedding(8, THETA).state_dict()


# Scalings. What transformers 5.23.0 gives: `ROPE_INIT_FUNCTIONS[rope_type](config, "cpu")` of a LlamaConfig with
# head_dim 16, with the mapping below and rope_theta 10_000 as its rope_parameters: (mapping, inv_freq, factor).
TRANSFORMERS = [
    (
        {"rope_type": "linear", "factor": 4.0},
        [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.0,
    ),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        [1.0, 0.316227764, 0.100000001, 0.0184966773, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05],
        1.0,
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        [1.0, 0.316227764, 0.100000001, 0.025693506, 0.00624999963, 0.00138349656, 0.000250000012, 7.90569466e-05],
        1.138629436111989,
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
        },
        [1.0, 0.316227764, 0.100000001, 0.0316227786, 0.00674999924, 0.00110679714, 2.49999994e-05, 7.90569447e-06],
        0.9210423553163399,
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
            "attention_factor": 1.25,
        },
        [1.0, 0.316227764, 0.100000001, 0.0286136102, 0.006556971, 0.00128563191, 0.000250000012, 7.90569466e-05],
        1.25,
    ),
]


@pytest.mark.parametrize("scaling, frequencies, factor", TRANSFORMERS)
def test_scaled_frequencies_are_those_of_transformers(scaling: dict, frequencies: list, factor: float) -> None:
    rope = RotaryEmbedding(16, THETA, scaling=scaling)
    # transformers computes in fp32: a power, a few products and a blend, 8 roundings of 2^-24 at most.
    torch.testing.assert_close(rope.frequency, torch.tensor(frequencies).double(), rtol=8 * 2**-24, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_linear_scaling_divides_positions() -> None:
    x, positions = torch.randn(4, 2, 8, dtype=torch.float64), torch.tensor([0, 4, 8, 400])
    scaled = RotaryEmbedding(8, THETA, scaling={"rope_type": "linear", "factor": 4.0})
    plain = RotaryEmbedding(8, THETA)
    torch.testing.assert_close(scaled(x, positions), plain(x, positions // 4), rtol=0, atol=400 * 8 * EPS)


def test_llama3_keeps_short_wavelengths_and_divides_long_ones() -> None:
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    scaling |= {"rope_type": "llama3", "original_max_position_embeddings": original}
    got, kinds = RotaryEmbedding(64, 500_000.0, scaling=scaling).frequency.tolist(), set()
    for i, frequency in enumerate(got):
        plain = 500_000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / plain
        if wavelength < original / high:
            expected, kind = plain, "kept"
        elif wavelength > original / low:
            expected, kind = plain / factor, "divided"
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected, kind = (1 - smooth) * plain / factor + smooth * plain, "blended"
        kinds.add(kind)
        assert frequency == pytest.approx(expected, rel=1e-14)  # a dozen fp64 roundings
    assert kinds == {"kept", "divided", "blended"}


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_blends_between_two_numbers_of_turns(truncate: bool) -> None:
    dim, theta, factor, original, fast, slow = 64, 10_000.0, 16.0, 4096, 32.0, 1.0
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    rope = RotaryEmbedding(dim, theta, scaling=scaling | {"truncate": truncate})

    def pair_that_turns(turns: float) -> float:  # solves original * theta^(-2i/dim) = 2 pi turns for i
        return dim / 2 * math.log(original / (2 * math.pi * turns), theta)

    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    for i, frequency in enumerate(rope.frequency.tolist()):
        plain = theta ** (-2 * i / dim)
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        expected = plain * (1 - interpolated) + plain / factor * interpolated
        assert frequency == pytest.approx(expected, rel=1e-12)  # the ramp cancels a few digits
    assert 0 < low < high < dim / 2
    assert rope.attention_factor == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-15)


def test_yarn_scales_the_rotated_rows() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    turned = RotaryEmbedding(8, THETA, scaling=scaling)(x, torch.tensor([0, 5, 500]))
    torch.testing.assert_close(turned.norm(dim=-1), 1.5 * x.norm(dim=-1), rtol=8 * EPS, atol=0)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "expected rope_type to be one of .*, got 'dynamic'"),
        ({"rope_type": "longrope"}, "expected rope_type to be one of .*, got 'longrope'"),
        ({"factor": 2.0}, "expected rope_type to be one of .*, got None"),
        ({"rope_type": "linear"}, "expected factor to be a number above 0, got None"),
        ({"rope_type": "linear", "factor": 0}, "expected factor to be a number above 0, got 0"),
        ({"rope_type": "linear", "factor": -2.0}, "expected factor to be a number above 0, got -2.0"),
        ({"rope_type": "linear", "factor": float("nan")}, "expected factor to be a number above 0, got nan"),
        ({"rope_type": "linear", "factor": float("inf")}, "expected factor to be a number above 0, got inf"),
        ({"rope_type": "linear", "factor": "4"}, "expected factor to be a number above 0, got '4'"),
        ({"rope_type": "linear", "factor": True}, "expected factor to be a number above 0, got True"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, r"expected no other keys .*, got \['beta_fast'\]"),
        ({"rope_type": "default", "factor": 2.0}, r"expected no other keys .*, got \['factor'\]"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "expected high_freq_factor above low_freq_factor=4.0, got 4.0"),
        (LLAMA3 | {"original_max_position_embeddings": None}, "expected original_max_position_embeddings"),
        ({key: YARN[key] for key in ("rope_type", "factor")}, "expected original_max_position_embeddings"),
        (YARN | {"beta_fast": "many"}, "expected beta_fast to be a number above 0, got 'many'"),
        (YARN | {"beta_fast": 1.0, "beta_slow": 32.0}, "expected beta_fast above beta_slow=32.0, got 1.0"),
        (YARN | {"attention_factor": "x"}, "expected attention_factor to be a number above 0, got 'x'"),
        (YARN | {"attention_factor": 0.0}, "expected attention_factor to be a number above 0, got 0.0"),
        (YARN | {"mscale": "x", "mscale_all_dim": 1.0}, "expected mscale to be a number"),
        (YARN | {"truncate": "no"}, "expected truncate to be a bool, got 'no'"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "expected rope_theta to be 10000.0, got 500000.0"),
    ],
)
def test_scalings_that_cannot_be_used(scaling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^rope_scaling: {message}"):
        RotaryEmbedding(8, THETA, scaling=scaling)


def test_spellings_of_no_scaling() -> None:
    plain = RotaryEmbedding(8, THETA).frequency
    for scaling in ({}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": "default", "rope_theta": THETA}):
        assert torch.equal(RotaryEmbedding(8, THETA, scaling=scaling).frequency, plain)


def test_the_mapping_is_not_used_up() -> None:
    scaling = dict(YARN)
    RotaryEmbedding(8, THETA, scaling=scaling)
    assert scaling == YARN


def test_odd_heads() -> None:
    with pytest.raises(ValueError, match=r"^head_dim: expected an even number, got 7$"):
        RotaryEmbedding(7, THETA)
