"""Does a problem hold what a choice depends on, by value?"""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from nsa_routing import OPS, Problem
from nsa_routing.problem import LENGTHS, STATIC, describe, device_name


def test_ops_are_those_of_the_design() -> None:
    assert OPS == (
        "compress_mean",
        "compressed_attention",
        "select_blocks",
        "selected_attention",
        "window_attention",
        "combine",
        "decode_attention",
    )


@pytest.mark.parametrize("op", ["", "attention", "Combine", None])
def test_unknown_ops(op: str) -> None:
    with pytest.raises(ValueError, match=rf"^op: expected one of \['compress_mean', .*\], got {op!r}$"):
        Problem(op, "cpu", torch.float32, 64, 64, 1)


def test_is_frozen_and_equal_by_value(problem: Problem) -> None:
    assert problem == replace(problem)
    assert hash(problem) == hash(replace(problem))
    with pytest.raises(FrozenInstanceError):
        problem.op = "combine"


@pytest.mark.parametrize("name", [field.name for field in fields(Problem)])
def test_every_field_tells_problems_apart(name: str, problem: Problem) -> None:
    """Plans are remembered by problem: a field that did not count would serve the wrong plan."""
    old = getattr(problem, name)
    new = {"op": "combine", "device": "cuda", "dtype": torch.float16}.get(name, not old if old is False else 7)
    assert replace(problem, **{name: new}) != problem


def test_nothing_special_is_asked_for_by_default(problem: Problem) -> None:
    for name in ("needs_grad", "paged", "softcap", "sinks", "fp8_scales", "uniform"):
        assert getattr(problem, name) is False
    assert problem.deterministic is None, "left to the flag, or to torch"
    assert (problem.device_index, *(getattr(problem, name) for name in LENGTHS)) == (0, 0, 0, 0)


def test_all_but_the_lengths_is_static() -> None:
    """Routes are remembered by all static fields, and by lengths only between thresholds."""
    assert LENGTHS == ("total_q", "max_seqlen_q", "max_seqlen_k")
    assert (*STATIC, *LENGTHS) == tuple(field.name for field in fields(Problem))


@pytest.mark.parametrize(
    "device, index, name", [("cpu", 0, "cpu"), ("cpu", 3, "cpu"), ("cuda", 0, "cuda:0"), ("xpu", 2, "xpu:2")]
)
def test_devices_are_named_as_torch_names_them(device: str, index: int, name: str, problem: Problem) -> None:
    asked = replace(problem, device=device, device_index=index)
    assert device_name(asked) == name
    assert torch.device(name).type == device


def test_a_problem_on_one_line(problem: Problem) -> None:
    assert describe(problem) == "window_attention on cpu, torch.float32, head_dim 64/32, group size 4"
    asked = replace(problem, device="cuda", device_index=1, total_q=7, max_seqlen_q=5, max_seqlen_k=9)
    assert describe(replace(asked, needs_grad=True, deterministic=True, paged=True, uniform=True)) == (
        "window_attention on cuda:1, torch.float32, head_dim 64/32, group size 4, total_q 7, max_seqlen_q 5, "
        "max_seqlen_k 9, needs_grad, deterministic, paged, uniform"
    )


@pytest.mark.parametrize("feature", ["softcap", "sinks", "fp8_scales"])
def test_reserved_features_are_stated(feature: str, problem: Problem) -> None:
    """They are what a backend refuses by: the table must show them."""
    assert describe(replace(problem, **{feature: True})).endswith(f"group size 4, {feature}")


def test_a_dtype_is_torchs() -> None:
    with pytest.raises(TypeError, match=r"^dtype: expected a torch.dtype, got 'float32' of type str$"):
        Problem("combine", "cpu", "float32", 64, 64, 4)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(
    "length, error, message",
    [
        (-1, ValueError, "expected at least 0, got -1"),
        (8.0, TypeError, "expected an int, got 8.0 of type float"),
        (True, TypeError, "expected an int, got True of type bool"),
        (None, TypeError, "expected an int, got None of type NoneType"),
    ],
)
def test_lengths_are_numbers_of_tokens(
    length: object, error: type[Exception], message: str, name: str, problem: Problem
) -> None:
    with pytest.raises(error, match=rf"^{name}: {message}$"):
        replace(problem, **{name: length})
