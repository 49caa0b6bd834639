"""The kernels of a decode step apart, interpreted: together they are the step, and each can be run again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.configurations import overridden
from nsa_kernels_triton.contracts import interpreted
from nsa_kernels_triton.ops import decode, decode_plan
from nsa_varlen import BlockGeometry
from nsa_varlen.decode_testing import DecodeCase, assert_equal, assert_stored_alike, decode_case
from nsa_varlen.testing import poisoned_empty

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1"),
]

BLOCKS = BlockGeometry(kernel_size=32, kernel_stride=16, block_size=32, topk=8, window_size=40)
SMALL = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=32, topk=5, window_size=40)

ORGANISATIONS = {
    "alone": {
        "compressed": {"splits": 1, "values": 1, "early": 0},
        "choice": {"chunk": 128, "alone": 1},
        "selected": {"splits": 1},
    },
    "apart": {
        "compressed": {"splits": 4, "programs": 256, "values": 1, "early": 1},
        "choice": {"chunk": 16, "value_splits": 2, "value_programs": 256, "alone": 0},
        "selected": {"splits": 4, "programs": 256},
    },
}
KERNELS = {  # of each stage
    "alone": {"cmp": 1, "slc_win": 1},
    "apart": {"cmp": 2, "slc_win": 1, "combine": 1},
}


@contextmanager
def organised(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for kernel, numbers in ORGANISATIONS[name].items():
            stack.enter_context(overridden(f"decode_{kernel}", keys=32, **numbers))
        yield


def stages_of(case: DecodeCase) -> Any:
    return BACKEND.decode_stages(**case.arguments)


@pytest.mark.parametrize("new", [None, "mean", "blocks"])
@pytest.mark.parametrize("name", ORGANISATIONS)
def test_together_they_are_the_step(name: str, new: str | None) -> None:
    """Bitwise, in what they return and in what they store, from scratch memory that holds nothing."""
    blocks, lengths = (BLOCKS, [1170, 540]) if new is None and name == "apart" else (SMALL, [76, 33])
    case = decode_case(lengths, [1, 1], blocks, heads=2, kv_heads=1, new=new)
    whole, parts = case.copy(), case.copy()
    with organised(name):
        expected = whole.run(BACKEND)
        stages = stages_of(parts)
    assert {stage: len(found.launches) for stage, found in stages.items()} == KERNELS[name]
    results = stages["cmp"].results
    scratch = stages["cmp"].launches[0][1][1]
    for x in (*results, scratch):
        x.fill_(torch.nan if x.is_floating_point() else -7)
    for stage in stages.values():
        found = stage()
    for got, x in zip(found, expected, strict=True):
        assert_equal("result", got, x)
    if new is not None:
        assert_stored_alike(parts, whole)


@pytest.mark.parametrize("name", ORGANISATIONS)
def test_in_any_order(name: str) -> None:
    """After the step they are each other's inputs, whichever runs first, and however often."""
    case = decode_case([76, 33], [3, 1], SMALL, heads=2, kv_heads=1, new="weights", rotated="halves").copy()
    with organised(name), poisoned_empty():
        stages = stages_of(case)
        expected = [x.clone() for x in stages["cmp"].results]
    out, indices = stages["cmp"].results
    assert bool(out.isfinite().all())
    for stage in (*reversed(stages.values()), *stages.values()):
        for got, x in zip(stage(), expected, strict=True):
            assert_equal("result", got, x)
    indices.fill_(-7)
    stages["cmp"]()
    assert_equal("indices", indices, expected[1])
    out.fill_(torch.nan)
    list(stages.values())[-1]()  # the gated sum is its work, alone
    assert_equal("out", out, expected[0])


def test_lengths_of_compressed_values_are_written_too() -> None:
    """Where they are a tensor of their own: with the kernel that writes those of the keys."""
    case = decode_case([76, 36], [3, 1], SMALL, heads=2, kv_heads=1, new="mean").copy()
    v_cmp = type(case["v_cmp"])(case["v_cmp"].pages, case["v_cmp"].block_table, torch.full((2,), 99).int())
    stages = stages_of(case.changed(v_cmp=v_cmp))
    v_cmp.lengths.fill_(99)
    stages["cmp"]()
    assert v_cmp.lengths.tolist() == [18, 8]


def test_many_candidates_are_thinned_out_where_blocks_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_plan, "MOST_CANDIDATES", 4)
    decode_plan.decode_plan.cache_clear()
    try:
        case = decode_case([2700], [1], replace(BLOCKS, topk=7, kernel_stride=32), heads=2, kv_heads=1)
        with organised("apart"):
            expected = case.run(BACKEND)
            stages = stages_of(case)
    finally:
        decode_plan.decode_plan.cache_clear()
    assert len(stages["cmp"].launches) > KERNELS["apart"]["cmp"]
    for stage in stages.values():
        found = stage()
    for got, x in zip(found, expected, strict=True):
        assert_equal("result", got, x)


def test_sequences_that_take_turns_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SCRATCH_BYTES", 1)
    with pytest.raises(ValueError, match=r"^q: expected at most 1 sequences, which scratch memory suffices for, got 2"):
        stages_of(decode_case([70, 33], [1, 1], SMALL, heads=2, kv_heads=1))


def test_gradients_and_arguments_are_refused_as_by_the_step() -> None:
    case = decode_case([40], [1], SMALL, heads=2, kv_heads=1)
    with pytest.raises(ValueError, match=r"records no gradients through paged keys and values$"):
        stages_of(case.changed(q=case["q"].clone().requires_grad_()))
    with pytest.raises(TypeError, match=r"^k_slc: expected a PagedKV, got Tensor$"):
        stages_of(case.changed(k_slc=torch.zeros(3, 2, 8)))


@pytest.mark.parametrize("lengths, rows", [([], 2), ([20, 3], 0)], ids=str)
def test_without_a_row_there_is_no_stage(lengths: list[int], rows: int) -> None:
    case = decode_case(lengths, [0] * len(lengths), SMALL, rows=rows, heads=2, kv_heads=1)
    assert stages_of(case) == {}
