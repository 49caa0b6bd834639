"""Is a slowdown told from noise, from another machine, and from what merely cannot be compared?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from nsa_bench.regressions import FLOOR_NOISE, LEAST, Comparison, compare
from nsa_bench.schema import Row

Rows = Callable[..., list[Row]]


def of_nsa(rows: list[Row], **given: Any) -> list[Row]:
    return [replace(row, **given) if row.workload == "nsa.decode" else row for row in rows]


def outcomes(rows: list[Row], baseline: list[Row]) -> list[str]:
    return [comparison.outcome for comparison in compare(rows, baseline)]


def only(rows: list[Row], baseline: list[Row]) -> Comparison:
    (comparison,) = compare(rows, baseline)
    return comparison


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_the_same_sampled_again_does_not_regress(measured: Rows, noise: float) -> None:
    """80 comparisons with three standard errors each; seeds are fixed, so this is one draw, not a flaky one."""
    for seed in range(8):
        baseline = measured(batches=(1, 8), noise=noise, seed=seed)
        assert "regressed" not in outcomes(measured(batches=(1, 8), noise=noise, seed=100 + seed), baseline)


def test_ten_percent_slower_regresses(measured: Rows) -> None:
    found = compare(measured(slower=1.1, seed=1), measured())
    assert {comparison.outcome for comparison in found} == {"regressed"}
    for comparison in found:
        assert comparison.change == pytest.approx(1.1, abs=0.02)
        assert "of dense attention, +" in comparison.words


def test_ten_percent_faster_is_improved(measured: Rows) -> None:
    assert set(outcomes(measured(slower=0.9, seed=1), measured())) == {"improved"}


def test_ten_percent_within_noise_does_not_regress(measured: Rows) -> None:
    found = compare(measured((8192,), slower=1.1, noise=0.3, seed=1), measured((8192,), noise=0.3))
    assert [comparison.outcome for comparison in found] == ["same"]


@pytest.mark.parametrize("slower, outcome", [(1 + LEAST - 0.002, "same"), (1 + LEAST + 0.002, "regressed")])
def test_without_noise_a_little_is_granted(measured: Rows, slower: float, outcome: str) -> None:
    assert only(measured((8192,), noise=0, slower=slower), measured((8192,), noise=0)).outcome == outcome


def test_a_slower_machine_is_no_regression(measured: Rows) -> None:
    baseline = measured()
    times = ("ms_total", "p25_ms", "p75_ms")
    slower = [replace(row, **{name: 3 * getattr(row, name) for name in times}, device="older") for row in baseline]
    assert set(outcomes(slower, baseline)) == {"same"}


def test_the_noise_is_that_of_all_four_medians(measured: Rows) -> None:
    """Each median's noise alone, five times what it was, can hide a slowdown that shows without it."""
    now, was = measured((8192,), anchors=("cudnn",), slower=1.1, seed=1), measured((8192,), anchors=("cudnn",))
    assert only(now, was).outcome == "regressed"
    for rows in (now, was):
        for place, row in enumerate(rows):
            wide = replace(row, p25_ms=row.ms_total * 0.7, p75_ms=row.ms_total * 1.3)
            rows[place] = wide
            assert only(now, was).outcome == "same"
            rows[place] = row


def test_an_anchor_that_only_one_file_has_does_not_count(measured: Rows) -> None:
    both, one = measured(noise=0.001), measured(noise=0.001, anchors=("flash-attn",), seed=1)
    assert set(outcomes(both, one)) == {"same", "new"}  # cudnn is 6 % faster than flash-attn
    assert [c.outcome for c in compare(one, both) if "nsa" in c.subject] == ["same"] * 5
    assert {c.subject.split(",")[0] for c in compare(one, both) if c.outcome == "missing"} == {"dense.decode cudnn"}
    failed = [replace(row, status="failed: no") if row.backend == "cudnn" else row for row in both]
    assert [c.outcome for c in compare(one, failed)] == ["same"] * 5
    assert [c.outcome for c in compare(failed, both) if "nsa" in c.subject] == ["same"] * 5


def test_an_anchor_is_not_compared_itself(measured: Rows) -> None:
    slower = [replace(row, ms_total=9.0) if row.backend == "flash-attn" else row for row in measured()]
    assert outcomes(slower, measured()) == ["same"] * 5


def test_a_measurement_that_is_lost_is_missing(measured: Rows) -> None:
    baseline = measured((8192, 16384))
    found = compare([row for row in baseline if row.S == 8192 or row.workload == "dense.decode"], baseline)
    assert [(c.outcome, c.subject, c.words) for c in found if c.outcome != "same"] == [
        ("missing", "nsa.decode triton, S 16k", "no such row")
    ]
    failed = of_nsa(baseline, status="failed: out of memory", ms_total=None)
    assert [c.words for c in compare(failed, baseline)] == ["failed: out of memory"] * 2


def test_what_had_no_time_cannot_be_lost(measured: Rows) -> None:
    rows = measured((8192,))
    refused = of_nsa(rows, status="refused: no Triton", ms_total=None)
    assert outcomes(refused, refused) == []
    assert outcomes(rows, refused) == ["new"]


def test_without_anchors_times_are_held_against_the_floor(measured: Rows) -> None:
    was = measured((8192,), anchors=(), noise=0)
    for slower, outcome in ((1 + FLOOR_NOISE - 0.01, "same"), (1 + FLOOR_NOISE + 0.01, "regressed")):
        found = only(measured((8192,), anchors=(), noise=0, slower=slower), was)
        assert found.outcome == outcome
        assert "of the floor" in found.words
    faster_machine = of_nsa(was, floor_ms=was[0].floor_ms / 2)
    assert only(faster_machine, was).outcome == "regressed"


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"floor_ms": None}, "no dense anchor at its point has a time in both files, and there is no floor"),
        ({"device": "older"}, "and the devices differ: NVIDIA H100 80GB HBM3 and older"),
        ({"p25_ms": None}, "no quartiles, so no noise is known"),
    ],
)
def test_what_cannot_be_compared_is_named(measured: Rows, given: dict[str, Any], reason: str) -> None:
    rows = measured((8192,), anchors=())
    found = only(of_nsa(rows, **given), rows)
    assert found.outcome == "not comparable"
    assert reason in found.words


def test_two_rows_of_one_measurement_are_met_in_their_order(measured: Rows) -> None:
    rows = [replace(row, parameters="") for row in measured((8192,), noise=0)]
    nsa, *dense = rows
    twice = [nsa, replace(nsa, ms_total=2 * nsa.ms_total), *dense]
    assert outcomes(twice, twice) == ["same", "same"]
    assert outcomes([twice[1], twice[0], *dense], twice) == ["regressed", "improved"]
