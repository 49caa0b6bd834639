"""From a suite to rows: is everything checked before it is timed, and does every outcome get its row?"""

from collections.abc import Callable
from typing import Any

import pytest
from nsa_bench import ceilings, runner
from nsa_bench.runner import RunError, points_of
from nsa_bench.schema import PROVENANCE, Row
from nsa_bench.suite import parse

MACHINE = dict.fromkeys(PROVENANCE, "here")


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 TFLOP/s and 1 GB/s."""
    monkeypatch.setattr(ceilings, "flops_per_second", lambda device, dtype: 1e12)
    monkeypatch.setattr(ceilings, "bytes_per_second", lambda device: 1e9)


@pytest.fixture
def measure(document: Callable[..., dict[str, Any]]) -> Callable[..., runner.Outcome]:
    """Run a suite of one toy at some lengths."""

    def run(toy: Any, *lengths: int, repeats: int = 3, **options: Any) -> runner.Outcome:
        points = points_of(parse("toys", document(*lengths)), {"toy": toy}, "cpu")
        return runner.run(points, "cpu", MACHINE, repeats=repeats, **options)

    return run


def test_a_row_says_what_was_measured(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    (row,) = measure(toy, 64).rows
    assert (row.S, row.suite, row.workload, row.clock, row.batch, row.calls) == (64, "toys", "toy", "host", 1, 2)
    assert (row.parameters, row.backend, row.why) == ("backend=auto topk=16", "toys", "plan")
    assert (row.status, row.check, row.reads_actual, row.repeats) == ("ok", "off by 0", 192, 3)
    assert (row.device, row.commit, row.flops, row.bytes) == ("here", "here", 64e6, 64e3)
    assert row.floor_ms == pytest.approx(0.064)  # 64e6 FLOP take 0.064 ms, 64e3 bytes as long
    assert 0 < (row.p25_ms or 0) <= (row.ms_total or 0) <= (row.p75_ms or 0)
    assert [name for name in ("ms_cmp", "ms_slc_win", "ms_sel") if getattr(row, name) is None] == ["ms_sel"]


def test_every_call_is_checked_before_the_clock_starts(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    measure(toy, 64)
    kinds = [kind for kind, *_ in toy.said]
    assert kinds[:4] == ["setup", "call", "call", "check"]
    assert toy.said[3] == ("check", 64, [0, 1])


@pytest.mark.parametrize(
    ("trouble", "status"),
    [
        ("wrong", "wrong: off by 1.0"),
        ("failing", "failed: MemoryError: no room, none at all"),
        ("refusing", "refused: too short"),
    ],
)
def test_trouble_gets_a_row_and_no_number(
    trouble: str, status: str, toy: Any, measure: Callable[..., runner.Outcome]
) -> None:
    outcome = measure(toy.but(**{trouble: frozenset({64})}), 64, 128)
    bad, good = outcome.rows
    assert bad.status == status
    assert [getattr(bad, name) for name in ("ms_total", "p25_ms", "p75_ms", "ms_cmp", "floor_ms")] == [None] * 5
    assert good.status == "ok"
    assert outcome.bad == ([] if trouble == "refusing" else [bad])


def test_what_a_replay_left_behind_is_checked_too(
    document: Callable[..., dict[str, Any]], toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph without a GPU: its calls are made, and its memory holds the results of both sets of data in turn."""
    monkeypatch.setattr(runner, "sets_of_data", lambda *_: 2)
    monkeypatch.setattr(runner, "sample", lambda clock, device, calls: (lambda: 1.0, [call() + 10 for call in calls]))
    suite = parse("toys", document(64, variant=[{"workload": "toy", "clock": "graph"}], cuda={"points": [{"S": 64}]}))
    runner.run(points_of(suite, {"toy": toy}, "cuda"), "cuda", MACHINE, repeats=3)
    assert [said[2] for said in toy.said if said[0] == "check"] == [[0, 1], [10, 11]]


def test_who_cannot_even_refuse_fails(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    class Confused(type(toy)):  # type: ignore[misc]
        def refuse(self, device: str, **parameters: Any) -> str | None:
            raise ValueError("block_size: expected a multiple of kernel_stride, got 5")

    (row,) = measure(Confused(), 64).rows
    assert row.status == "failed: ValueError: block_size: expected a multiple of kernel_stride, got 5"


def test_an_assertion_outside_of_the_check_is_no_verdict(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    class Asserting(type(toy)):  # type: ignore[misc]
        def setup(self, device: str, seed: int, **parameters: Any) -> dict[str, Any]:
            raise AssertionError("my own mistake")

    (row,) = measure(Asserting(), 64).rows
    assert row.status == "failed: AssertionError: my own mistake"


def test_trouble_of_one_variant_leaves_the_others(document: Callable[..., dict[str, Any]], toy: Any) -> None:
    variants = [{"workload": name, "clock": "host"} for name in ("bad", "toy")]
    workloads = {"bad": toy.but(name="bad", wrong=frozenset({8})), "toy": toy}
    points = points_of(parse("toys", document(8, variant=variants)), workloads, "cpu")
    rows = runner.run(points, "cpu", MACHINE, repeats=3).rows
    assert [(row.workload, row.ms_total is None) for row in rows] == [("bad", True), ("toy", False)]


def test_what_fails_under_the_clock_has_no_time(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    class Late(type(toy)):  # type: ignore[misc]
        def call(self, state: Any, index: int) -> int:
            if len([1 for kind, *_ in self.said if kind == "call"]) > 6:
                raise RuntimeError("too warm")
            return super().call(state, index)

    (row,) = measure(Late(), 64).rows
    assert (row.status, row.ms_total, row.ms_cmp) == ("failed: RuntimeError: too warm", None, None)


def test_a_part_without_a_column_is_a_failure(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    (row,) = measure(toy.but(own_parts=("gates",)), 64).rows
    assert row.status.startswith("failed: ValueError: parts of toy: expected")


@pytest.mark.parametrize(
    ("method", "answer", "status"),
    [
        ("facts", {"reads_actual": float("nan")}, "facts: expected an int of at least 0 for reads_actual, got nan"),
        ("facts", {"reads_expected": -1}, "facts: expected an int of at least 0 for reads_expected, got -1"),
        ("cost", (float("nan"), 1.0), "cost: expected finite numbers of at least 0, got nan and 1.0"),
        ("cost", (1.0, -1.0), "cost: expected finite numbers of at least 0, got 1.0 and -1.0"),
    ],
)
def test_what_a_file_could_not_give_back_is_a_failure(
    method: str, answer: Any, status: str, toy: Any, measure: Callable[..., runner.Outcome]
) -> None:
    setattr(toy, method, lambda *args, **parameters: answer)
    (row,) = measure(toy, 64).rows
    assert (row.status, row.ms_total) == (f"failed: ValueError: {status}", None)


def test_states_are_shared_by_clocks_and_not_by_parameters(document: Callable[..., dict[str, Any]], toy: Any) -> None:
    variants = [{"workload": "toy", "clock": "host", "backend": ["a", "b"]}]
    ((a, b),) = points_of(parse("toys", document(8, variant=variants)), {"toy": toy}, "cpu")
    runner.run([[a, a, b, b]], "cpu", MACHINE, repeats=3)
    setups = [parameters["backend"] for kind, *rest in toy.said if kind == "setup" for parameters in rest[1:]]
    assert setups == ["a", "b"]


def test_known_points_are_not_measured_again(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    before = measure(toy, 64).rows
    later = toy.but()
    kept: list[list[Row]] = []
    outcome = measure(later, 64, 128, known=before, keep=lambda rows: kept.append(list(rows)))
    assert outcome.rows[0] == before[0]
    assert {said[1] for said in later.said if said[0] == "check"} == {128}
    assert [len(rows) for rows in kept] == [2]


def test_what_was_wrong_is_tried_again(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    before = measure(toy.but(wrong=frozenset({64})), 64).rows
    (row,) = measure(toy, 64, known=before).rows
    assert row.status == "ok"


def test_the_budget_stops_before_a_point_that_would_not_fit(toy: Any, measure: Callable[..., runner.Outcome]) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 5.0  # it is read as a point begins and when it ends: 5 s each
        return now[0]

    outcome = measure(toy, 1, 2, 3, 4, budget=22.0, clock=clock)
    assert [row.S for row in outcome.rows] == [1, 2]
    assert outcome.left == 2
    assert measure(toy, 1, 2, budget=None).left == 0
    assert measure(toy, 1, budget=0.0).left == 0  # the first point is begun whatever it takes: nobody knows yet


def test_workloads_that_are_not_installed_are_left_out(document: Callable[..., dict[str, Any]], toy: Any) -> None:
    variants = [{"workload": name, "clock": ["host", "graph"]} for name in ("toy", "gone")]
    suite = parse("toys", document(8, variant=variants, cuda={"points": [{"S": 8}]}))
    (cpu,), (cuda,) = (points_of(suite, {"toy": toy}, device) for device in ("cpu", "cuda"))
    assert [(m.workload.name, m.variant.clock) for m in cpu] == [("toy", "host")]
    assert [m.variant.clock for m in cuda] == ["host", "graph"]


def test_a_variant_may_be_of_one_device(document: Callable[..., dict[str, Any]], toy: Any) -> None:
    variants = [{"workload": "toy", "clock": "host", "device": device} for device in ("cpu", "cuda")]
    suite = parse("toys", document(8, variant=variants, cuda={"points": [{"S": 8}]}))
    for device in ("cpu", "cuda"):
        ((found,),) = points_of(suite, {"toy": toy}, device)
        assert found.variant.devices == (device,)


@pytest.mark.parametrize(
    ("changes", "workload", "words"),
    [
        ({"cpu": {}, "cuda": {"points": [{"S": 1}]}}, "toy", "expected points for cpu"),
        ({"variant": [{"workload": "toy", "clock": "graph"}]}, "toy", "expected variants for cpu, got none"),
        ({}, "another", r"expected one of the workloads \['toy'\]"),
        ({"cpu": {"points": [{"S": 1, "heads": 2}]}}, "toy", r"got \['heads'\]"),
        ({"cpu": {"points": [{"S": 1, "batch": "two"}]}}, "toy", "expected int for batch of toy, got 'two'"),
        ({"variant": [{"workload": "toy", "clock": "host", "heads": 1}]}, "toy", "of toy, got 'heads'"),
    ],
)
def test_a_suite_that_asks_for_what_there_is_not(
    changes: dict[str, Any], workload: str, words: str, document: Callable[..., dict[str, Any]], toy: Any
) -> None:
    suite = parse("toys", document(1) | changes)
    with pytest.raises(RunError, match=words):
        points_of(suite, {workload: toy}, "cpu")
