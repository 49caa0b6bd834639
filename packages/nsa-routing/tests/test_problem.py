"""Does a problem hold what a choice depends on, by value?"""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from nsa_routing import OPS, Problem


def test_ops_are_those_of_the_design() -> None:
    assert OPS == (
        "compress_mean",
        "compressed_attention",
        "select_blocks",
        "selected_attention",
        "window_attention",
        "combine",
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
    for name in ("needs_grad", "deterministic", "paged", "softcap", "sinks", "fp8_scales"):
        assert getattr(problem, name) is False
