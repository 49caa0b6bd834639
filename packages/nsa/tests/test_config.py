"""Does a configuration refuse to exist wrong, and say why?"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from nsa import NSAConfig
from nsa_varlen import BlockGeometry

LEAST = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def test_block_sizes_default_to_the_geometry() -> None:
    assert NSAConfig(**LEAST).blocks == BlockGeometry()


@pytest.mark.parametrize("name", [field.name for field in fields(BlockGeometry)])
def test_every_block_size_reaches_the_geometry(name: str) -> None:
    changed = {"kernel_size": 16, "kernel_stride": 8, "block_size": 128, "topk": 9}.get(name, 3)
    assert getattr(NSAConfig(**LEAST, **{name: changed}).blocks, name) == changed


def test_derived_sizes() -> None:
    config = NSAConfig(**LEAST)
    assert (config.group_size, config.value_dim) == (2, 16)
    assert replace(config, v_head_dim=24).value_dim == 24
    assert replace(config, num_kv_heads=4).group_size == 1


def test_is_frozen_equal_by_value_and_hashable() -> None:
    config = NSAConfig(**LEAST)
    with pytest.raises(FrozenInstanceError):
        config.topk = 3
    assert config == NSAConfig(**LEAST)
    assert config != replace(config, topk=17)
    assert hash(config) == hash(NSAConfig(**LEAST))


SCALING = {"rope_type": "linear", "factor": 4.0}


def test_a_rope_scaling_is_kept_by_value() -> None:
    scaling = dict(SCALING)
    config = NSAConfig(**LEAST, rope_scaling=scaling)
    scaling["factor"] = 8.0
    assert dict(config.rope_scaling) == SCALING
    assert config == NSAConfig(**LEAST, rope_scaling=SCALING)
    assert hash(config) == hash(NSAConfig(**LEAST, rope_scaling=dict(SCALING)))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "scaled"])
def test_copies_are_equal(duplicate: Callable[[NSAConfig], NSAConfig], scaling: dict | None) -> None:
    config = NSAConfig(**LEAST, v_head_dim=8, compression="mlp", rope_scaling=scaling)
    again = duplicate(config)
    assert again == config
    assert again.blocks == config.blocks


SIZES = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "compression_hidden_size")
SIZES += ("gate_hidden_size", "kernel_size", "kernel_stride", "block_size", "topk", "local_blocks", "window_size")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_one(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 1, got {value}$"):
        NSAConfig(**(LEAST | {name: value}))


def test_negative_init_blocks() -> None:
    assert NSAConfig(**LEAST, init_blocks=0).blocks.init_blocks == 0
    with pytest.raises(ValueError, match=r"^init_blocks: expected at least 0, got -1$"):
        NSAConfig(**LEAST, init_blocks=-1)


@pytest.mark.parametrize("value", [2.0, "2", True])
@pytest.mark.parametrize("name", [*SIZES, "init_blocks"])
def test_sizes_that_are_no_ints(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected an int, got {value!r} of type"):
        NSAConfig(**(LEAST | {name: value}))


@pytest.mark.parametrize("name", ["shared_kv", "rope_interleaved", "bias"])
def test_switches_that_are_no_bools(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected a bool, got 1$"):
        NSAConfig(**LEAST, **{name: 1})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 6, "num_kv_heads": 4}, r"^num_kv_heads: expected a divisor of num_heads=6, got 4$"),
        ({"kernel_stride": 12}, r"^kernel_stride: .*kernel_size=32, kernel_stride=12"),
        ({"kernel_size": 24, "kernel_stride": 12}, r"^kernel_stride: .*block_size=64, kernel_stride=12"),
        ({"kernel_size": 128}, r"^kernel_size: .*kernel_size=128, block_size=64"),
        ({"topk": 2}, r"^topk: .*topk=2, init_blocks=1, local_blocks=2"),
        ({"compression": "max"}, r"^compression: expected one of \['mean', .*'mlp'\], got 'max'$"),
        ({"compression": None}, r"^compression: expected one of .*, got None$"),
        ({"rope_cmp": "during"}, r"^rope_cmp: expected one of \['after', 'before', 'none'\], got 'during'$"),
        ({"rope_theta": 0.0}, r"^rope_theta: expected .* above 0, got 0.0$"),
        ({"rope_theta": float("nan")}, r"^rope_theta: expected .* above 0, got nan$"),
        ({"rope_theta": float("inf")}, r"^rope_theta: expected .* above 0, got inf$"),
        ({"head_dim": 15}, r"^head_dim: expected an even number for rotary embedding, got 15$"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"^rope_scaling: expected rope_type .*'dynamic'$"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"^rope_scaling: expected factor .*, got None$"),
        ({"rope_theta": None, "rope_scaling": SCALING}, r"^rope_scaling: expected None .*rope_theta=None, got"),
    ],
)
def test_values_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NSAConfig(**(LEAST | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_theta": "10000"}, r"^rope_theta: expected a float or None, got '10000'$"),
        ({"rope_theta": True}, r"^rope_theta: expected a float or None, got True$"),
        ({"rope_scaling": "linear"}, r"^rope_scaling: expected a mapping or None, got 'linear'$"),
    ],
)
def test_types_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        NSAConfig(**(LEAST | changes))


def test_a_layer_without_positions_may_have_odd_heads() -> None:
    assert NSAConfig(**(LEAST | {"head_dim": 15}), rope_theta=None).head_dim == 15
