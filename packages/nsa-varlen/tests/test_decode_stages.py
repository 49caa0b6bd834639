"""The parts of a decode step: together they are the step, and each can be run again."""

from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry
from nsa_varlen.decode_testing import DecodeCase, assert_equal, assert_stored_alike, decode_case
from nsa_varlen.sdpa import BACKEND

SMALL = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=32, topk=5, window_size=40)
STAGES = ["cmp", "choice", "sel", "win", "combine"]


def stages_of(case: DecodeCase) -> Any:
    return BACKEND.decode_stages(**{name: x for name, x in case.arguments.items() if name != "stored"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("new", [None, "mean", "blocks"])
def test_together_they_are_the_step(new: str | None, dtype: torch.dtype) -> None:
    """Bitwise, in what they return and in what they store; in any order, again and again."""
    case = decode_case([76, 33, 170], [3, 1, 0], SMALL, new=new)
    case = case if dtype == torch.float32 else case.double()
    whole, parts = case.copy(), case.copy()
    out, indices = whole.run(BACKEND)
    stages = stages_of(parts)
    assert list(stages) == STAGES
    for name in (*STAGES, *reversed(STAGES), *STAGES):
        found = stages[name]()
        if name == "choice":
            assert_equal("block_indices", found, indices)
        if name == "combine":
            assert_equal("out", found, out)
    if new is not None:
        assert_stored_alike(parts, whole)


def test_each_reads_its_own_pages() -> None:
    """What a stage computes is computed anew when it is called: it follows the rows that it reads, and no others."""
    case = decode_case([76, 133], [1, 1], SMALL).copy()
    stages = stages_of(case)

    def found() -> dict[str, torch.Tensor]:
        results = {name: run() for name, run in stages.items()}
        return {name: x[0] if isinstance(x, tuple) else x.clone() for name, x in results.items()}

    before = found()
    for branch, stage in (("cmp", "cmp"), ("slc", "sel"), ("win", "win")):
        case[f"v_{branch}"].pages.mul_(2)
        after = found()
        assert {name for name in STAGES if not torch.equal(after[name], before[name])} == {stage}
        before = after


def test_autocast_and_gradients_stay_outside() -> None:
    case = decode_case([76], [1], SMALL, dtype=torch.float16)
    expected, _ = case.run(BACKEND)
    leaf = case.changed(q=case["q"].clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stages = stages_of(leaf)
        out = [run() for run in stages.values()][-1]
    assert_equal("out", out, expected)
    assert not out.requires_grad


@pytest.mark.parametrize("lengths, rows", [([], 2), ([20, 3], 0)])
def test_without_a_row_there_is_no_stage(lengths: list[int], rows: int) -> None:
    assert stages_of(decode_case(lengths, [0] * len(lengths), SMALL, rows=rows)) == {}


def test_arguments_that_do_not_fit_are_told_as_by_the_step() -> None:
    with pytest.raises(ValueError, match=r"^scale: expected a finite number above 0, got -1.0$"):
        stages_of(decode_case([70], [1], SMALL).changed(scale=-1.0))
