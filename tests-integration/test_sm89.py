"""Are Ada's denials obeyed by every route, and is Triton elsewhere taken by nobody who did not ask for it?

CPU tensors play those of a GPU, and backends `triton`, `fa2` and `fa2-torch` run sdpa under their name, so that each
operation really runs where its route says.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nsa import nsa_attention, ops
from nsa_routing import OPS, Problem, dispatch, load_profile, plan_for
from nsa_routing.profile import SHIPPED
from nsa_routing.tuning import PREFILL_OPS
from nsa_varlen import BlockGeometry, VarlenLayout, testing
from nsa_varlen.op_inputs import op_inputs
from nsa_varlen.sdpa import BACKEND

ADRS = Path(__file__).parents[1] / "docs" / "adr"
BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=6)
LAYOUT = VarlenLayout.from_lengths([9, 20], [11, 20])
SELECTION = ["select_blocks", "selected_attention"]
OTHERS = [op for op in PREFILL_OPS if op not in SELECTION]
# What `run_all` runs, in that order.
FORWARD = ["compress_mean", *PREFILL_OPS]


@pytest.fixture
def inputs() -> testing.Inputs:
    return testing.random_inputs(LAYOUT, dtype=torch.float32)


def run_all(inputs: testing.Inputs, backend: str | None = None) -> torch.Tensor:
    """`nsa_attention`, compression of keys and of values first: every operation but the one that decodes."""
    q, k, v, gates = inputs
    k_cmp, v_cmp = (ops.compress_mean(x, LAYOUT, BLOCKS, backend=backend) for x in (k, v))
    return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, LAYOUT, BLOCKS, backend=backend)


def exact(inputs: testing.Inputs) -> torch.Tensor:
    return testing.run_ops(BACKEND, inputs, LAYOUT, BLOCKS).out


def ask(op: str, length: int = 0, **changes: Any) -> Problem:
    facts = {"total_q": length, "max_seqlen_q": length, "max_seqlen_k": length} | changes
    return Problem(op, "cpu", torch.bfloat16, 128, 128, 16, **facts)


@pytest.mark.parametrize("flag", [{}, {"FA2": "1"}, {"TRITON_SEL_FORCE": "1"}, {"PROFILE": "sm89"}], ids=str)
def test_safe_runs_sdpa_on_ada(
    flag: dict, install: Callable, machine: Callable, flags: Callable, inputs: testing.Inputs
) -> None:
    made = install("triton", "fa2", "fa2-torch")
    machine(89)
    flags(**flag)
    assert torch.equal(run_all(inputs), exact(inputs))
    assert [x.ran for x in made.values()] == [[], [], []]
    assert {plan_for(ask(op)).profile for op in OPS} == {"sm89"}


def test_perf_runs_selection_on_sdpa_on_ada(
    install: Callable, machine: Callable, flags: Callable, inputs: testing.Inputs
) -> None:
    made = install("triton", "fa2", "fa2-torch")
    machine(89)
    flags(PRESET="perf")
    assert torch.equal(run_all(inputs), exact(inputs))
    assert sorted(set(made["triton"].ran)) == sorted(OTHERS)
    assert made["fa2"].ran == made["fa2-torch"].ran == []
    for op in SELECTION:
        assert plan_for(ask(op)).accepted == ("sdpa",)


@pytest.mark.parametrize(
    "preset, force, backend", [("perf", "0", "sdpa"), ("safe", "1", "sdpa"), ("perf", "1", "triton")]
)
def test_a_decode_step_selects_too(
    preset: str, force: str, backend: str, install: Callable, machine: Callable, flags: Callable
) -> None:
    made = install("triton", "fa2", "fa2-torch")
    machine(89)
    flags(PRESET=preset, TRITON_SEL_FORCE=force, FA2="1")
    args, _ = op_inputs(
        "decode_attention", [1, 2], [9, 40], num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu"
    )
    ops.decode_attention(*args)
    assert made["triton"].ran == (["decode_attention"] if backend == "triton" else [])
    assert plan_for(ask("decode_attention", paged=True)).backend == backend


def test_forced_perf_runs_selection_on_triton_on_ada(
    install: Callable, machine: Callable, flags: Callable, inputs: testing.Inputs
) -> None:
    made = install("triton", "fa2", "fa2-torch")
    machine(89)
    flags(PRESET="perf", TRITON_SEL_FORCE="1", FA2="1")
    assert torch.equal(run_all(inputs), exact(inputs))
    assert sorted(set(made["triton"].ran)) == sorted(PREFILL_OPS)
    assert made["fa2"].ran == made["fa2-torch"].ran == []


@pytest.mark.parametrize("preset", ["safe", "perf"])
@pytest.mark.parametrize("op", [*SELECTION, "decode_attention"])
def test_a_request_for_triton_selection_raises_on_ada(
    op: str, preset: str, install: Callable, machine: Callable, flags: Callable
) -> None:
    install("triton")
    machine(89)
    flags(PRESET=preset)
    with pytest.raises(RuntimeError) as caught:
        dispatch(op, ask(op), backend="triton")
    lines = str(caught.value).splitlines()
    assert lines[:4] == [
        "no backend accepts the problem (requested: triton)",
        f"{op} on cpu, torch.bfloat16, head_dim 128/128, group size 16",
        "  triton  rejected: denied by ADR 0001: Triton selection is off on SM 8.9; NSA_TRITON_SEL_FORCE=1 allows it",
        "without the request:",
    ]
    assert lines[-1].split() == ["sdpa", "chosen"]
    flags(BACKEND=f"{op}=triton")
    with pytest.raises(RuntimeError, match=r"denied by ADR 0001: Triton selection is off on SM 8\.9"):
        dispatch(op, ask(op))


def test_a_request_through_the_operations_raises_on_ada(
    install: Callable, machine: Callable, inputs: testing.Inputs
) -> None:
    made = install("triton")
    machine(89)
    with pytest.raises(RuntimeError, match=r"(?s)requested: triton.*select_blocks on cpu.*NSA_TRITON_SEL_FORCE=1"):
        run_all(inputs, backend="triton")
    assert not set(made["triton"].ran) & set(SELECTION)


@pytest.mark.parametrize("preset", ["safe", "perf"])
def test_a_forced_request_is_obeyed_on_ada(
    preset: str, install: Callable, machine: Callable, flags: Callable, inputs: testing.Inputs
) -> None:
    made = install("triton")
    machine(89)
    flags(PRESET=preset, TRITON_SEL_FORCE="1")
    assert torch.equal(run_all(inputs, backend="triton"), exact(inputs))
    assert made["triton"].ran == FORWARD


@pytest.mark.parametrize("name", ["fa2", "fa2-torch"])
@pytest.mark.parametrize("flag", [{}, {"FA2": "1"}, {"PRESET": "perf", "FA2": "1", "TRITON_SEL_FORCE": "1"}], ids=str)
def test_fa2_never_selects_on_ada(flag: dict, name: str, install: Callable, machine: Callable, flags: Callable) -> None:
    install("fa2", "fa2-torch")
    machine(89)
    flags(**flag)
    op = "selected_attention"
    assert plan_for(ask(op, 65536)).accepted == ("sdpa",)
    with pytest.raises(RuntimeError, match=rf"{name}  rejected: denied by ADR 0001: FA-2 is off for selection"):
        dispatch(op, ask(op, 65536), backend=name)


@pytest.mark.parametrize("preset", ["safe", "perf"])
@pytest.mark.parametrize("op, least", [("window_attention", 1024), ("compressed_attention", 8192)])
def test_fa2_is_opt_in_above_its_threshold_on_ada(
    op: str, least: int, preset: str, install: Callable, machine: Callable, flags: Callable
) -> None:
    install("fa2", "fa2-torch")
    machine(89)
    for fa2 in ("auto", "0", "1"):
        flags(PRESET=preset, FA2=fa2)
        taken = [plan_for(ask(op, length)).backend for length in (0, least - 1, least, 65536)]
        assert taken == (["sdpa", "sdpa", "fa2", "fa2"] if fa2 == "1" else ["sdpa"] * 4)
        for other in set(OPS) - {"window_attention", "compressed_attention"}:
            assert plan_for(ask(other, 65536)).backend == "sdpa"


def test_fa2_runs_what_its_threshold_allows_on_ada(install: Callable, machine: Callable, flags: Callable) -> None:
    """Whole prefill, that is: nobody has measured a decode step, and its threshold leaves that out."""
    made = install("fa2")
    machine(89)
    flags(FA2="1")
    blocks = BlockGeometry()
    for queries, keys in ((1023, 1023), (1, 1024), (1024, 1024)):
        layout = VarlenLayout.from_lengths([queries], [keys])
        q, k, v, _ = testing.random_inputs(layout, dtype=torch.float32)
        got = ops.window_attention(q, k, v, layout, blocks)
        assert torch.equal(got[0], BACKEND.window_attention(q, k, v, layout, blocks)[0])
    assert made["fa2"].ran == ["window_attention"]


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [80, 90])
def test_triton_needs_perf_or_a_request(
    sm: int, install: Callable, machine: Callable, flags: Callable, inputs: testing.Inputs
) -> None:
    made = install("triton")
    machine(sm)
    assert torch.equal(run_all(inputs), exact(inputs))
    assert made["triton"].ran == []
    assert torch.equal(run_all(inputs, backend="triton"), exact(inputs))
    assert made["triton"].ran == FORWARD
    made["triton"].ran.clear()
    flags(BACKEND="combine=triton")
    run_all(inputs)
    assert made["triton"].ran == ["combine"]
    made["triton"].ran.clear()
    flags(BACKEND=None, PRESET="perf")
    assert torch.equal(run_all(inputs), exact(inputs))
    assert set(made["triton"].ran) == set(PREFILL_OPS)


@pytest.mark.parametrize("sm", [80, 89, 90])
def test_one_line_says_that_triton_is_there(
    sm: int, install: Callable, machine: Callable, flags: Callable, inputs: testing.Inputs, caplog: Any
) -> None:
    install("triton")
    machine(sm)
    for _ in range(3):
        run_all(inputs)
        ops.window_attention(*inputs[:3], LAYOUT, BLOCKS, deterministic=True)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("nsa_routing", logging.WARNING)
    assert record.getMessage() == (
        "backend triton is installed and can run compress_mean here, but preset safe does not take it: NSA_PRESET=perf "
        "does (now: sdpa)"
    )
    caplog.clear()
    flags(PRESET="perf")
    run_all(inputs)
    assert caplog.records == []


def test_on_sm_100_triton_runs_by_request_only(
    install: Callable, machine: Callable, flags: Callable, inputs: testing.Inputs, caplog: Any
) -> None:
    made = install("triton")
    machine(100)
    for preset in ("safe", "perf"):
        flags(PRESET=preset)
        run_all(inputs)
    assert (made["triton"].ran, caplog.records) == ([], [])
    run_all(inputs, backend="triton")
    assert made["triton"].ran == FORWARD


def test_without_triton_nobody_speaks_of_it(
    install: Callable, machine: Callable, inputs: testing.Inputs, caplog: Any
) -> None:
    install()
    machine(90)
    run_all(inputs)
    assert caplog.records == []


@pytest.mark.parametrize("sm", [80, 90])
def test_the_wrong_triton_stops_perf_and_not_safe(
    sm: int, install: Callable, machine: Callable, flags: Callable, inputs: testing.Inputs
) -> None:
    made = install("triton")
    machine(sm, triton="3.7.1")
    assert torch.equal(run_all(inputs), exact(inputs))
    flags(PRESET="perf")
    with pytest.raises(RuntimeError, match=r"stops here: torch 2.11.0\+cu130 needs triton 3.6, got triton 3.7.1"):
        run_all(inputs)
    assert made["triton"].ran == []


# --- the records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(file.stem for file in SHIPPED.glob("*.yaml")))
def test_every_denial_has_its_record(name: str) -> None:
    profile = load_profile(name)
    numbers = {denial.adr for by_name in profile.denials.values() for denial in by_name.values()}
    numbers |= {word.strip(".,;:") for word in profile.source.split("ADR ")[1:] for word in word.split()[:1]}
    for number in numbers:
        assert len(list(ADRS.glob(f"{number}-*.md"))) == 1, f"{name}: ADR {number}"


def test_the_denials_of_ada_are_its_only_ones() -> None:
    denied = {
        name: {(op, backend) for op, by_name in load_profile(name).denials.items() for backend in by_name}
        for name in (file.stem for file in SHIPPED.glob("*.yaml"))
    }
    assert denied.pop("sm89") == {
        ("select_blocks", "triton"),
        ("selected_attention", "triton"),
        ("selected_attention", "fa2"),
        ("selected_attention", "fa2-torch"),
        ("decode_attention", "triton"),
    }
    assert not any(denied.values())
