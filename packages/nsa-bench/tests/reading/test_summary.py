"""Does the table say what the rows say: speed-up, reads, floor, and rows without a time?"""

import random
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
from nsa_bench.measurements import error, labels, measurement
from nsa_bench.schema import Row
from nsa_bench.summary import cells, decode_reads, headings, summarise

Rows = Callable[..., list[Row]]


def made(workload: str, ms: float | None, **given: object) -> Row:
    return Row(**({"S": 1024, "ms_total": ms, "workload": workload, "clock": "graph", "batch": 1} | given))


def speedups(rows: list[Row]) -> dict[str, float | None]:
    return {line.label: line.speedup for line in summarise(rows)}


def test_speedup_is_against_the_fastest_dense_anchor() -> None:
    dense = [made("dense.decode", ms, backend=name) for ms, name in ((3.0, "a"), (2.0, "b"))]
    assert speedups([*dense, made("nsa.decode", 0.5)])["nsa.decode"] == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"S": 2048},
        {"batch": 2},
        {"clock": "host"},
        {"dtype": "float16"},
        {"num_kv_heads": 4},
        {"suite": "other"},
        {"device": "another"},
        {"commit": "another"},
        {"parameters": "queries=2"},
        {"status": "wrong: off by 1"},
        {"ms_total": None},
        {"ms_total": float("nan")},
    ],
)
def test_an_anchor_counts_at_its_point_and_with_a_time_only(changed: dict[str, object]) -> None:
    nsa = made("nsa.decode", 0.5, parameters="queries=1 topk=8")
    anchor = made("dense.decode", 2.0, parameters="queries=1")
    assert speedups([anchor, nsa])["nsa.decode"] == 4
    assert speedups([replace(anchor, **changed), nsa])["nsa.decode"] is None


def test_parameters_that_only_one_side_has_and_backends_do_not_part_them() -> None:
    nsa = made("nsa.decode", 0.5, parameters="backend=triton topk=8")
    assert speedups([made("dense.decode", 2.0, parameters="backend=cudnn"), nsa])["nsa.decode triton"] == 4


def test_a_workload_is_held_against_its_namesake_where_there_is_one() -> None:
    dense = [made("dense.decode", 2.0), made("dense.prefill", 1.0)]
    assert speedups([*dense, made("nsa.decode", 0.5)])["nsa.decode"] == 4
    assert speedups([*dense, made("nsa.layer", 0.5)])["nsa.layer"] == 2
    assert speedups([*dense, made("dense.decode.own", 1.5), made("nsa.decode", 0.5)])["nsa.decode"] == 3


def test_decode_reads_are_of_one_query_and_kv_head() -> None:
    sums = {"reads_actual_decode": 2 * 8 * 4 * 990, "reads_expected_decode": 2 * 8 * 4 * 1000}
    row = made("nsa.decode", 1.0, batch=2, calls=8, num_kv_heads=4, reads_actual=5, reads_expected=10, **sums)
    assert decode_reads(row) == (990, 1000)
    (line,) = summarise([row])
    assert (line.reads, line.budget) == (990, 0.99)
    (line,) = summarise([replace(row, reads_actual_decode=None)])
    assert (line.reads, line.budget) == (5, 0.5)


def test_the_floors_share_and_the_spread() -> None:
    (line,) = summarise([made("nsa.decode", 2.0, floor_ms=1.5, p25_ms=1.9, p75_ms=2.2)])
    assert line.floor == 0.75
    assert line.spread == pytest.approx(0.15)


def test_a_row_without_a_time_is_shown_with_its_reason() -> None:
    rows = [made("dense.decode", 2.0), made("nsa.decode", None, status="failed: out of\nmemory")]
    columns, table = cells(summarise(rows))
    assert headings(summarise(rows))[-1] == "without a time: 1 failed"
    line = dict(zip(columns, table[1], strict=True))
    assert (line["ms"], line["speed-up"], line["status"]) == ("-", "-", "failed: out of memory")


def test_lines_are_ordered_by_point_and_within_one_as_they_ran(measured: Rows) -> None:
    rows = measured((8192, 16384, 131072), batches=(1, 8), clocks=("graph", "host"))
    ordered = [line.row for line in summarise(rows)]
    assert [(row.clock, row.batch, row.S) for row in ordered[::3]] == [
        (clock, batch, S) for clock in ("graph", "host") for batch in (1, 8) for S in (8192, 16384, 131072)
    ]
    assert [row.backend for row in ordered[:3]] == ["triton", "cudnn", "flash-attn"]
    shuffled = random.Random(0).sample(rows, len(rows))
    place = [(row.clock, row.batch, row.S) for row in ordered]
    assert [(line.row.clock, line.row.batch, line.row.S) for line in summarise(shuffled)] == place


def test_what_all_rows_share_stands_above_the_table(measured: Rows) -> None:
    lines = summarise(measured((8192,)))
    above = " ".join(headings(lines))
    for words in ("NVIDIA H100 80GB HBM3", "torch 2.11.0+cu130", "triton 3.6.0", "commit 1f0c2ab94d", "clock graph"):
        assert words in above
    assert "clock" not in cells(lines)[0]
    several = summarise(measured((8192,), clocks=("graph", "host")))
    assert "clock" not in " ".join(headings(several))
    assert "clock" in cells(several)[0]


def test_labels_say_what_differs() -> None:
    asked = [made("nsa.decode", 1.0, parameters=f"backend=auto layer=one topk={n}", backend="sdpa") for n in (8, 16)]
    assert labels(asked) == ["nsa.decode auto→sdpa topk=8", "nsa.decode auto→sdpa topk=16"]
    twice = [made("nsa.decode", 1.0, backend="sdpa", why=why) for why in ("asked for", "the plan")]
    assert labels(twice) == ["nsa.decode sdpa", "nsa.decode sdpa (the plan)"]
    assert labels([made("dense.decode.flash-attn", 1.0, backend="flash-attn")]) == ["dense.decode.flash-attn"]
    clocks = [replace(twice[0], clock=clock) for clock in ("graph", "host")]
    assert labels(clocks, clock=True) == ["nsa.decode sdpa graph", "nsa.decode sdpa host"]


def test_the_backend_that_ran_is_the_measurement_only_if_none_was_asked_for() -> None:
    one, other = (made("nsa.decode", 1.0, backend=name) for name in ("sdpa", "triton"))
    assert measurement(one) != measurement(other)
    one, other = (replace(row, parameters="backend=auto") for row in (one, other))
    assert measurement(one) == measurement(other)


# The deviation of 2000 medians is known to 1/sqrt(4000) = 1.6 %: three of those, and by how much a median of few normal
# samples scatters less than 1.2533 / sqrt(n), which is 8 % of three and 2 % of eleven.
@pytest.mark.parametrize(("repeats", "off"), [(3, 0.13), (11, 0.07), (101, 0.05)])
def test_the_error_of_a_median_is_that_of_medians(repeats: int, off: float) -> None:
    source = random.Random(7)
    samples = [[source.gauss(1.0, 0.1) for _ in range(repeats)] for _ in range(2000)]
    quartiles = [statistics.quantiles(each, n=4, method="inclusive") for each in samples]
    seen = statistics.stdev(median for _, median, _ in quartiles)
    rows = [made("nsa.decode", m, p25_ms=low, p75_ms=high, repeats=repeats) for low, m, high in quartiles]
    told = statistics.mean(error(row) or 0 for row in rows)
    assert told == pytest.approx(seen, rel=off)


LOST = [{"p25_ms": None}, {"p75_ms": None}, {"repeats": None}, {"repeats": 1}, {"p25_ms": 9.0}]


@pytest.mark.parametrize("lost", LOST)
def test_without_quartiles_no_error_is_known(lost: dict[str, object]) -> None:
    row = made("nsa.decode", 2.0, p25_ms=1.9, p75_ms=2.1, repeats=9)
    assert error(row) is not None
    assert error(replace(row, **lost)) is None
