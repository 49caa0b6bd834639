"""Dense attention as a workload: does it run, does its check see what is wrong, does its cost count what there is?"""

import pytest
import torch
from nsa_varlen.benchmarks import dense, workloads
from nsa_varlen.benchmarks.trying import tried

WORKLOADS = {workload.name: workload for workload in workloads()}
TINY = {"S": 100, "batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def test_names() -> None:
    assert list(WORKLOADS)[:3] == ["dense.prefill", "dense.train", "dense.decode"]
    assert {name.partition(".")[0] for name in WORKLOADS} == {"dense", "sdpa"}


def test_dense_gradients_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "dq off by" in tried(WORKLOADS["dense.train"], **TINY)
    right = dense._prefill
    monkeypatch.setattr(dense, "_prefill", lambda *args: right(*args) * 2 - right(*args).detach())
    with pytest.raises(AssertionError, match="dq: max-abs error"):
        tried(WORKLOADS["dense.train"], **TINY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["sdpa", "grouped"])
@pytest.mark.parametrize("name", ["dense.prefill", "dense.decode"])
def test_dense_attention_runs_and_is_right(name: str, backend: str, dtype: str) -> None:
    assert "off by" in tried(WORKLOADS[name], **TINY, backend=backend, dtype=dtype)


@pytest.mark.parametrize("name", ["dense.prefill", "dense.decode"])
def test_a_wrong_row_is_seen(name: str) -> None:
    workload = WORKLOADS[name]
    state = workload.setup("cpu", 0, **{**workload.parameters, **TINY})
    results = [workload.call(state, index) for index in range(workload.calls)]
    assert workload.check(state, results)
    results[-1][-1, -1] += 1e-3
    with pytest.raises(AssertionError, match="max-abs error"):
        workload.check(state, results)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [((0, slice(0, 50)), 7.0, "max-abs error"), ((0, slice(60, 100)), float("nan"), "expected finite values")],
)
def test_rows_of_other_sequences_are_looked_at(place: tuple[int, slice], value: float, words: str) -> None:
    workload = WORKLOADS["dense.prefill"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **TINY})
    out = workload.call(state, 0).clone()
    out[place] = value
    with pytest.raises(AssertionError, match=words):
        workload.check(state, [out])


@pytest.mark.parametrize("value", [7.0, float("nan")])
def test_steps_of_other_sequences_are_looked_at(value: float) -> None:
    workload = WORKLOADS["dense.decode"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **TINY})
    results = [workload.call(state, index).clone() for index in range(workload.calls)]
    for out in results:
        out[0] = value
    with pytest.raises(AssertionError, match="step"):
        workload.check(state, results)


def test_gradients_of_what_is_timed_are_finite() -> None:
    workload = WORKLOADS["dense.train"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **TINY})
    results = [x.clone() for x in workload.call(state, 0)]
    results[2][0, 3] = torch.nan
    with pytest.raises(AssertionError, match="dk: expected finite values"):
        workload.check(state, [results])


def test_steps_grow() -> None:
    """Each reads one token more, and none that is not there yet."""
    workload = WORKLOADS["dense.decode"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **TINY})
    for index in (0, dense.STEPS - 1):
        expected = workload.call(state, index)
        beyond = state.v.clone()
        beyond[:, 100 + 1 + index :] = torch.nan
        assert torch.equal(workload.call(state._replace(v=beyond), index), expected)
    read = workload.facts(state)["reads_actual_decode"]
    assert read == 2 * 2 * sum(100 + 1 + index for index in range(dense.STEPS))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"backend": "fast"}, "backend: expected one of ['sdpa', 'grouped', 'cudnn', 'flash'], got 'fast'"),
        ({"backend": "cudnn"}, "cudnn needs a CUDA device and half precision"),
        ({"backend": "flash", "dtype": "bfloat16"}, "flash needs a CUDA device and half precision"),
        ({}, None),
    ],
)
def test_what_is_refused(changes: dict[str, str], words: str | None) -> None:
    workload = WORKLOADS["dense.prefill"]
    assert workload.refuse("cpu", **{**workload.parameters, **changes}) == words


def test_costs_are_counted() -> None:
    """Pairs of a causal mask; bytes of q, k, v and out."""
    parameters = {**WORKLOADS["dense.prefill"].parameters, **TINY}
    seen = int(torch.ones(100, 100).tril().sum())
    rows = 2 * 100 * (4 + 2) * 8 * 4
    assert WORKLOADS["dense.prefill"].cost(**parameters) == (4 * 8 * 4 * 2 * seen, 2 * rows)
    flops, moved = WORKLOADS["dense.decode"].cost(**parameters)
    keys = [100 + 1 + index for index in range(dense.STEPS)]
    assert flops == 4 * 8 * 4 * 2 * sum(keys) / len(keys)
    assert moved == 2 * 2 * 8 * 4 * (4 + 2 * sum(keys) / len(keys))
