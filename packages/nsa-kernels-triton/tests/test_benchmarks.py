"""The operations of backend triton as workloads, interpreted: do they run, do their checks see what is wrong?"""

from typing import Any

import pytest
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.benchmarks import workloads
from nsa_kernels_triton.contracts import OPS, interpreted
from nsa_varlen.benchmarks.operations import OF_NEIGHBOURS, WITHOUT_GRADIENTS, op_workloads
from nsa_varlen.benchmarks.trying import TINY, FaultyBackend, off_by_a_little, tried

pytestmark = pytest.mark.once

SMALL = TINY | {
    **{"S": 70, "batch": 1, "num_kv_heads": 1},
    **{"block_size": 32, "topk": 2, "init_blocks": 0, "local_blocks": 1},
}
WORKLOADS = {workload.name: workload for workload in workloads()}
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


def test_names_and_defaults() -> None:
    assert set(WORKLOADS) == {f"triton.{op}" for op in OPS}
    assert {workload.parameters["dtype"] for workload in WORKLOADS.values()} == {"bfloat16"}


@needs_interpreter
@pytest.mark.parametrize(
    "op, direction",
    [*((op, "forward") for op in OPS), *((op, "backward") for op in OPS if op not in WITHOUT_GRADIENTS)],
)
def test_runs_and_is_right(op: str, direction: str) -> None:
    assert tried(WORKLOADS[f"triton.{op}"], **SMALL | {"pass": direction})


@needs_interpreter
@pytest.mark.parametrize("op", OF_NEIGHBOURS)
def test_half_precision_and_smooth_inputs(op: str) -> None:
    assert tried(WORKLOADS[f"triton.{op}"], **SMALL | {"dtype": "float16", "inputs": "smooth"})


@needs_interpreter
@pytest.mark.parametrize("op", ["compress_mean", "window_attention", "combine", "decode_attention"])
def test_a_planted_fault_is_seen(op: str) -> None:
    (workload,) = op_workloads(FaultyBackend(BACKEND, op, off_by_a_little), [op])
    with pytest.raises(AssertionError, match=" of "):
        tried(workload, **SMALL)


@needs_interpreter
def test_a_decode_step_has_the_parts_that_its_kernels_are() -> None:
    workload = WORKLOADS["triton.decode_attention"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **SMALL})
    out, indices = workload.call(state, 0)
    parts = workload.parts(state)
    assert set(parts) <= {"cmp", "slc_win", "combine"}
    for part in parts.values():
        found = part(0)
    assert out.equal(found[0])
    assert indices.equal(found[1])


@pytest.mark.parametrize(
    "op, changes, words",
    [
        ("selected_attention", {"block_size": 48}, "needs block_size 32, 64 or 128, got 48"),
        ("decode_attention", {"topk": 100}, "needs topk up to 64 beside the 3 forced blocks, got 100"),
        ("combine", {"dtype": "float64"}, "takes float16, bfloat16 and float32, not float64"),
        ("select_blocks", {"pass": "backward"}, "select_blocks has no gradients"),
        ("window_attention", {"num_heads": 130}, "needs at most 64 query heads a kv head, got 65"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused(op: str, changes: dict[str, Any], words: str) -> None:
    workload = WORKLOADS[f"triton.{op}"]
    assert workload.refuse("cuda", **{**workload.parameters, **changes}) == words
