"""What nsa-bench finds installed: workloads of all packages, by their entry points, as its contract wants them."""

import importlib.metadata

import pytest
from nsa_bench.workload import FACTS, PARTS, load_workloads
from nsa_fa2 import CUDNN, FA2, FA2_TORCH
from nsa_kernels_triton import BACKEND as TRITON
from nsa_varlen import BlockGeometry
from nsa_varlen.benchmarks.operations import ABOUT
from nsa_varlen.benchmarks.trying import TINY
from nsa_varlen.sdpa import BACKEND as SDPA

FOUND, BROKEN = load_workloads()
BRANCHES = ("compressed_attention", "selected_attention", "window_attention")
OPERATIONS = {
    *(f"{backend.name}.{op}" for backend in (SDPA, TRITON) for op in ABOUT),
    *(f"{backend.name}.{op}" for backend in (FA2, FA2_TORCH) for op in BRANCHES),
    f"{CUDNN.name}.compressed_attention",
}
ANCHORS = {f"dense.{name}{by}" for name in ("prefill", "decode") for by in ("", ".flash-attn")} | {"dense.train"}


def test_none_is_broken() -> None:
    assert BROKEN == {}


def test_every_package_offers_its_own() -> None:
    assert FOUND.keys() >= OPERATIONS | ANCHORS
    backends = {name.partition(".")[0] for name in OPERATIONS}
    assert {name for name in FOUND if name.partition(".")[0] in backends} == OPERATIONS
    assert {name for name in FOUND if name.startswith("dense.")} == ANCHORS


def test_they_come_by_the_entry_points_of_their_packages() -> None:
    points = importlib.metadata.entry_points(group="nsa.bench")
    assert {"varlen", "triton", "fa2"} <= {point.name for point in points}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_take_the_same_parameters(name: str) -> None:
    """So that a suite may let backends take turns at a point."""
    workload = FOUND[name]
    assert list(workload.parameters) == list(FOUND["sdpa.combine"].parameters)
    assert {field: workload.parameters[field] for field in vars(BlockGeometry())} == vars(BlockGeometry())
    assert "\n" not in workload.about


@pytest.mark.parametrize("name", sorted(FOUND))
def test_each_answers_for_either_device_and_knows_its_cost(name: str) -> None:
    workload = FOUND[name]
    for device in ("cpu", "cuda"):
        assert isinstance(workload.refuse(device, **workload.parameters), str | None)
    flops, moved = workload.cost(**workload.parameters)
    assert flops > 0
    assert moved > 0


def test_parts_and_facts_have_columns() -> None:
    workload = FOUND["sdpa.decode_attention"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **TINY})
    assert set(workload.parts(state)) <= set(PARTS)
    assert set(workload.facts(state)) <= set(FACTS)
