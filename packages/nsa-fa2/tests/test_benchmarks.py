"""Workloads over plain torch in the place of the libraries: do they run, do their checks see what is wrong?"""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nsa_fa2.benchmarks import workloads
from nsa_fa2.testing import plain_backend
from nsa_varlen.benchmarks import dense
from nsa_varlen.benchmarks.operations import op_workloads
from nsa_varlen.benchmarks.trying import TINY, FaultyBackend, off_by_a_little, tried
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BRANCHES = ("compressed_attention", "selected_attention", "window_attention")
SHORT = TINY | {"S": 50, "batch": 1}
SIZES = {"S": 100, "batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
WORKLOADS = {workload.name: workload for workload in workloads()}
ANCHORS = ("dense.prefill.flash-attn", "dense.decode.flash-attn")


def test_names_and_defaults() -> None:
    branches = [f"{name}.{op}" for name in ("fa2", "fa2-torch") for op in BRANCHES]
    assert set(WORKLOADS) == {*ANCHORS, *branches, "cudnn.compressed_attention"}
    assert {workload.parameters["dtype"] for workload in WORKLOADS.values()} == {"bfloat16"}
    for name in ANCHORS:
        assert WORKLOADS[name].parameters.keys() == dense.PARAMETERS.keys() - {"backend"}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", BRANCHES)
def test_branches_run_and_are_right(op: str, direction: str) -> None:
    (workload,) = op_workloads(plain_backend(), [op])
    assert tried(workload, **SHORT | {"pass": direction})


@pytest.mark.parametrize("op", BRANCHES)
def test_a_planted_fault_is_seen(op: str) -> None:
    (workload,) = op_workloads(FaultyBackend(plain_backend(), op, off_by_a_little), [op])
    with pytest.raises(AssertionError, match=r"^out of the last "):
        tried(workload, **SHORT)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """As that of flash-attn, for as many queries as keys."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor) -> Tensor:
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == (len(q),)
    steps = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
    return torch.stack([flash_attn_func(*(x[None] for x in (q, k[:n], v[:n])))[0] for q, k, v, n in steps])


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in the place of flash-attn."""
    fake = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)  # type: ignore[arg-type]
    return fake


def called(name: str) -> tuple[Any, Any, list[Tensor]]:
    """A workload, a state of it, and what all calls gave."""
    workload = WORKLOADS[name]
    state = workload.setup("cpu", 0, **{**workload.parameters, **SIZES})
    return workload, state, [workload.call(state, index) for index in range(workload.calls)]


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("name", ANCHORS)
def test_anchors_run_and_are_right(name: str) -> None:
    workload, state, results = called(name)
    assert "off by" in workload.check(state, results)
    facts = workload.facts(state)
    assert (facts["backend"], facts["why"]) == ("flash-attn", "requested")
    results[-1][-1, -1] += 0.25
    with pytest.raises(AssertionError, match="error"):
        workload.check(state, results)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_anchors_are_of_the_tokens_that_those_by_torch_are(name: str) -> None:
    """Costs and inputs: rows of both can stand side by side."""
    other = next(workload for workload in dense.workloads() if workload.name == f"dense.{name}")
    workload, state, results = called(f"dense.{name}.flash-attn")
    parameters = {**workload.parameters, **SIZES}
    assert workload.cost(**parameters) == other.cost(**parameters, backend="sdpa")
    theirs = other.setup("cpu", 0, **parameters, backend="sdpa")
    for mine, x in zip(state.point[:3], theirs[:3], strict=True):
        assert mine.equal(x)
    for index, result in enumerate(results):
        torch.testing.assert_close(result, other.call(theirs, index))


@pytest.mark.usefixtures("flash_attn")
def test_a_window_for_the_whole_is_seen(flash_attn: Any) -> None:
    """A call that is not causal."""
    causal = flash_attn.flash_attn_func
    flash_attn.flash_attn_func = lambda q, k, v, **_: causal(q, k, v)
    workload, state, results = called("dense.prefill.flash-attn")
    with pytest.raises(AssertionError):
        workload.check(state, results)


@pytest.mark.parametrize(
    "name, device, changes, words",
    [
        ("fa2.window_attention", "cpu", {}, "needs CUDA, got cpu"),
        ("fa2-torch.window_attention", "cuda", {"dtype": "float32"}, "takes float16 and bfloat16, not float32"),
        ("cudnn.compressed_attention", "cuda", {"head_dim": 192}, "needs head_dim and v_head_dim up to 128"),
        ("dense.prefill.flash-attn", "cpu", {}, "needs CUDA, got cpu"),
        ("dense.decode.flash-attn", "cuda", {"head_dim": 36}, "needs head_dim and v_head_dim that are multiples of 8"),
        ("dense.decode.flash-attn", "cuda", {"dtype": "int8"}, "dtype: expected one of "),
    ],
)
def test_what_is_refused(name: str, device: str, changes: dict[str, Any], words: str) -> None:
    workload = WORKLOADS[name]
    assert str(workload.refuse(device, **{**workload.parameters, **changes})).startswith(words)
