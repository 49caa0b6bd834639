"""Does each kind of trend hold where it should, break where it should, and keep silent where nothing can be said?"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nsa_bench.schema import Row
from nsa_bench.trends import TrendError, Verdict, ask, parse_trend

Rows = Callable[..., list[Row]]
DECODE = {"workload": "nsa.decode"}


def verdicts(rows: list[Row], **table: Any) -> list[Verdict]:
    return ask(parse_trend(DECODE | table), rows)


def holds(rows: list[Row], **table: Any) -> bool | None:
    (verdict,) = verdicts(rows, **table)
    return verdict.holds


def budget(S: int) -> float:
    return (S - 32) // 16 + 1 + 1536


def as_budget(S: int) -> float:
    return budget(S) / 1e5


def as_length(S: int) -> float:
    return S / 1e5


# follows_budget


def test_time_that_grows_like_the_budget_follows_it(measured: Rows) -> None:
    assert holds(measured(time=as_budget), kind="follows_budget") is True
    assert holds(measured(time=as_budget), kind="follows_budget", tolerance=0.05) is True


def test_time_that_grows_like_the_length_does_not(measured: Rows) -> None:
    (verdict,) = verdicts(measured(time=as_length), kind="follows_budget")
    assert verdict.holds is False
    assert "8k to 128k: time grows 16" in verdict.words
    assert "the budget 4.75-fold, S 16-fold" in verdict.words


def test_a_fixed_cost_may_hide_growth(measured: Rows) -> None:
    assert holds(measured(time=lambda S: 1.0), kind="follows_budget", tolerance=0.0) is True


def test_tolerance_is_what_growth_may_exceed_the_budgets_by(measured: Rows) -> None:
    def twice(S: int) -> float:  # compressed keys are read twice: 26 % more growth from 8k to 128k
        return (1.5 * budget(S) - 0.5 * 1536) / 1e5

    assert holds(measured(time=twice), kind="follows_budget") is True
    assert holds(measured(time=twice), kind="follows_budget", tolerance=0.2) is False


def test_a_length_between_that_breaks_away_is_seen(measured: Rows) -> None:
    def leaps(S: int) -> float:
        return as_budget(S) * (3 if S == 32768 else 1)

    (verdict,) = verdicts(measured(time=leaps), kind="follows_budget")
    assert verdict.holds is False
    assert "5.2" in verdict.words.split("by 32k")[0]  # 3 times the budget's 1.75


def test_growth_that_noise_hides_is_neither_the_budgets_nor_the_lengths(measured: Rows) -> None:
    rows = measured((8192, 32768), time=as_budget, noise=0.2, repeats=10001)
    few = [replace(row, repeats=2) for row in rows]  # medians are where they should be; their errors are large
    (verdict,) = verdicts(few, kind="follows_budget")
    assert verdict.holds is None
    assert "too noisy to tell it from S" in verdict.words
    assert holds(rows, kind="follows_budget") is True


def test_lengths_over_which_the_budget_grows_like_the_length_tell_nothing(measured: Rows) -> None:
    assert holds(measured((262144, 524288), time=as_budget), kind="follows_budget") is None


def test_noise_is_granted(measured: Rows) -> None:
    def slightly(S: int) -> float:  # 6 % more than a tolerance of 0 allows
        return as_budget(S) * (1.06 if S == 131072 else 1)

    assert holds(measured(time=slightly, noise=0.001), kind="follows_budget", tolerance=0) is False
    assert holds(measured(time=slightly, noise=0.2, seed=1), kind="follows_budget", tolerance=0) is True


def test_the_budget_is_of_a_step_however_many_were_timed(measured: Rows) -> None:
    rows = measured(time=as_budget)
    sums = {"reads_actual_decode", "reads_expected_decode"}
    rows = [
        replace(row, calls=row.calls * 4, **{name: getattr(row, name) * 4 for name in sums})
        if row.S == 131072 and row.reads_actual_decode
        else row
        for row in rows
    ]
    assert holds(rows, kind="follows_budget", tolerance=0.05) is True


# crossover


def slope(crossing: float) -> Callable[[int], float]:
    """A time that is dense.decode's at `crossing`, and grows like the square root of the length."""
    dense = 8 * 4 * 128 * 4.0 / 2.9e12 * 1e3 * 1.05
    return lambda S: (dense * crossing + 0.004) * math.sqrt(S / crossing)


@pytest.mark.parametrize("crossing, at_most, expected", [(20000, 32768, True), (20000, 16384, False)])
def test_a_crossover(measured: Rows, crossing: float, at_most: int, expected: bool) -> None:
    rows = measured(time=slope(crossing), noise=0.002)
    (verdict,) = verdicts(rows, kind="crossover", at_most=at_most)
    assert verdict.holds is expected
    assert "faster from 32k on, not at 16k" in verdict.words


def test_the_fastest_anchor_counts(measured: Rows) -> None:
    rows = measured(time=slope(20000), noise=0.002)
    assert holds([row for row in rows if row.backend != "cudnn"], kind="crossover", at_most=16384) is False
    slow = [replace(row, ms_total=row.ms_total * 9) if row.backend == "flash-attn" else row for row in rows]
    assert holds(slow, kind="crossover", at_most=8192) is False


def test_a_longer_length_that_is_lost_moves_the_crossover(measured: Rows) -> None:
    rows = measured(time=lambda S: 99.0 if S == 65536 else 0.001)
    (verdict,) = verdicts(rows, kind="crossover", at_most=65536)
    assert verdict.holds is False
    assert "from 128k on, not at 64k" in verdict.words


@pytest.mark.parametrize("crossing, expected", [(131072 / 1.04, None), (131072 * 1.04, False)])
def test_faster_within_noise_is_not_faster_and_not_lost(measured: Rows, crossing: float, expected: bool | None) -> None:
    rows = measured((131072,), anchors=("cudnn",), time=slope(crossing), noise=0.1, repeats=40001)
    few = [replace(row, repeats=9) for row in rows]
    assert holds(few, kind="crossover", at_most=131072) is expected
    assert holds(rows, kind="crossover", at_most=131072) is (expected is None)


def test_lengths_that_were_not_measured_are_not_lost(measured: Rows) -> None:
    assert holds(measured((8192,), time=lambda S: 99.0), kind="crossover", at_most=16384) is None
    assert holds(measured((65536,), time=lambda S: 0.001), kind="crossover", at_most=16384) is None
    assert holds(measured((8192, 65536), time=slope(20000), noise=0.002), kind="crossover", at_most=32768) is None
    assert holds(measured(anchors=()), kind="crossover", at_most=16384) is None


@given(
    times=st.lists(st.floats(0.01, 2.0), min_size=5, max_size=5),
    faster=st.lists(st.floats(0.3, 1.0), min_size=5, max_size=5),
    limits=st.lists(st.sampled_from([4096, 8192, 16384, 65536, 131072]), min_size=2, max_size=2).map(sorted),
)
def test_faster_times_and_looser_limits_never_break_a_crossover(
    times: list[float], faster: list[float], limits: list[int]
) -> None:
    def rows(scale: list[float]) -> list[Row]:
        lengths = [2 ** (13 + n) for n in range(5)]
        nsa = [Row(S, ms_total=t * x, workload="nsa.decode") for S, t, x in zip(lengths, times, scale, strict=True)]
        dense = [Row(S, ms_total=S / 1e5, workload="dense.decode") for S in lengths]
        return [replace(row, p25_ms=row.ms_total, p75_ms=row.ms_total, repeats=9) for row in [*nsa, *dense]]

    order = {False: 0, None: 1, True: 2}
    before = order[holds(rows([1.0] * 5), kind="crossover", at_most=limits[0])]
    assert order[holds(rows(faster), kind="crossover", at_most=limits[0])] >= before
    assert order[holds(rows([1.0] * 5), kind="crossover", at_most=limits[1])] >= before


# exponent


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(measured: Rows, power: float) -> None:
    rows = measured(time=lambda S: (S / 8192) ** power, noise=0.005)
    (verdict,) = verdicts(rows, kind="exponent", at_most=power + 0.02, at_least=power - 0.02)
    assert verdict.holds is True
    assert float(verdict.words.split("S^")[1].split(" ")[0]) == pytest.approx(power, abs=0.01)
    assert holds(rows, kind="exponent", at_most=power - 0.05) is False
    assert holds(rows, kind="exponent", at_most=power + 9, at_least=power + 0.05) is False


def test_an_exponent_is_of_lengths_from_a_length_on(measured: Rows) -> None:
    """Short ones take as long as a launch; two lengths are left, or nothing can be said."""
    rows = measured(time=lambda S: max(1.0, S / 16384), noise=0.001)
    assert holds(rows, kind="exponent", at_least=0.98, at_most=1.02) is False
    assert holds(rows, kind="exponent", at_least=0.98, at_most=1.02, **{"from": 16384}) is True
    (verdict,) = verdicts(rows, kind="exponent", at_most=0, **{"from": 100_000})
    assert (verdict.holds, verdict.words) == (None, "expected two lengths from 100000 on with a time, got 1")


def test_the_exponents_error_is_derived_from_quartiles() -> None:
    """Two lengths: p = log(t2 / t1) / log(S2 / S1), so its error is that of the ratio over log(S2 / S1)."""
    rows = [
        Row(S, ms_total=1.0, p25_ms=0.9, p75_ms=1.1, repeats=25, workload="nsa.decode", clock="graph")
        for S in (1024, 4096)
    ]
    (verdict,) = verdicts(rows, kind="exponent", at_most=0)
    median = 1.2533 * (0.2 / 1.272) / 5  # 1.272 is the mean interquartile range of 25 normal samples
    assert f"± {median * math.sqrt(2) / math.log(4):.3f}" in verdict.words


@pytest.mark.parametrize("limits", [{"at_most": 0.98}, {"at_most": 1.02}, {"at_most": 2, "at_least": 0.98}], ids=str)
def test_what_noise_could_explain_says_nothing_of_an_exponent(measured: Rows, limits: dict[str, float]) -> None:
    noisy = measured(time=as_length, noise=0.5, seed=3)
    (verdict,) = verdicts(noisy, kind="exponent", **limits)
    assert (verdict.holds, verdict.words[-19:]) == (None, ": too noisy to tell")
    assert holds(noisy, kind="exponent", at_most=2.0, at_least=0.1) is True
    sure = measured(time=as_length, noise=0.001, seed=3)
    assert holds(sure, kind="exponent", **limits) is (limits["at_most"] > 1)


def test_trends_of_one_kind_are_told_apart() -> None:
    names = {str(parse_trend(DECODE | {"kind": "faster", "than": than})) for than in ("a", "b")}
    assert names == {"faster, than a, by 1, from 0", "faster, than b, by 1, from 0"}


# reads_within_budget


def changed(rows: list[Row], **of: Callable[[Row], Any]) -> list[Row]:
    return [
        replace(row, **{name: value(row) for name, value in of.items()}) if row.workload == "nsa.decode" else row
        for row in rows
    ]


def test_counted_reads_are_within_the_budget(measured: Rows) -> None:
    (verdict,) = verdicts(measured((7900, 8192)), kind="reads_within_budget")
    assert verdict.holds is True
    assert "at most 36.0 keys fewer" in verdict.words  # 7900 - 1 is 27 past a block's first key: 64 - 28


def test_one_key_too_many_is_seen(measured: Rows) -> None:
    rows = changed(measured((8192,)), reads_actual_decode=lambda row: row.reads_expected_decode + 1)
    assert holds(rows, kind="reads_within_budget") is False
    rows = changed(measured((8192,)), reads_actual=lambda row: 101, reads_expected=lambda row: 100)
    assert holds(rows, kind="reads_within_budget") is False


@pytest.mark.parametrize("fewer, expected", [(63, True), (64, False)])
def test_a_block_too_few_is_seen(measured: Rows, fewer: int, expected: bool) -> None:
    def actual(row: Row) -> int:
        return row.reads_expected_decode - fewer * row.batch * row.calls * row.num_kv_heads

    rows = changed(measured((8192,)), reads_actual_decode=actual)
    assert holds(rows, kind="reads_within_budget") is expected
    smaller = changed(rows, parameters=lambda row: "block_size=32 topk=8")
    assert holds(smaller, kind="reads_within_budget") is False
    larger = changed(rows, parameters=lambda row: "block_size=128")
    assert holds(larger, kind="reads_within_budget") is True


def test_short_contexts_may_read_far_less_than_their_budget(measured: Rows) -> None:
    assert holds(measured((512,)), kind="reads_within_budget") is True
    rows = changed(measured((1000,)), calls=lambda row: 80, reads_actual_decode=lambda row: 1)
    assert holds(rows, kind="reads_within_budget") is True  # its steps may begin at 920


def test_without_reads_there_is_nothing_to_say(measured: Rows) -> None:
    rows = changed(measured((8192,)), reads_actual_decode=lambda row: None)
    assert holds(rows, kind="reads_within_budget") is None


# faster


@pytest.mark.parametrize("by, start, expected", [(20, 0, False), (16, 0, True), (17.5, 65536, True), (17.5, 0, False)])
def test_faster_by_so_much_from_so_long_on(measured: Rows, by: float, start: int, expected: bool) -> None:
    rows = measured(backends=("triton", "sdpa"), noise=0.001)
    table = {"kind": "faster", "backend": "triton", "than": "nsa.decode", "than_backend": "sdpa"}
    ratios = {row.S: other.ms_total / row.ms_total for row, other in zip(rows[::4], rows[1::4], strict=True)}
    assert 16.2 < ratios[8192] < 17.3 < 17.7 < ratios[65536] < 19.8  # what the cases above are about
    assert holds(rows, by=by, **table, **{"from": start}) is expected


def test_not_slower_is_not_faster(measured: Rows) -> None:
    rows = measured((8192,), backends=("triton", "sdpa"))
    same = [replace(row, ms_total=1.0, p25_ms=1.0, p75_ms=1.0) for row in rows]
    assert holds(same, kind="faster", backend="triton", than="nsa.decode", than_backend="sdpa") is False


def test_faster_within_noise_does_not_count(measured: Rows) -> None:
    table = {"kind": "faster", "than": "dense.decode"}
    rows = measured((131072,), anchors=("cudnn",), time=slope(131072 / 1.04), noise=0.1, repeats=40001)
    assert holds(rows, **table) is True
    assert holds([replace(row, repeats=9) for row in rows], **table) is None
    slower = measured((131072,), anchors=("cudnn",), time=slope(131072 * 1.04), noise=0.1, repeats=40001)
    assert holds([replace(row, repeats=9) for row in slower], **table) is False


def test_faster_than_what_was_not_measured(measured: Rows) -> None:
    assert holds(measured(), kind="faster", than="nsa.other") is None
    assert holds(measured(), kind="faster", than="dense.decode", **{"from": 10**6}) is None


# all of them


def test_filters(measured: Rows) -> None:
    rows = measured(clocks=("graph", "host"), backends=("triton", "sdpa"))
    assert len(verdicts(rows, kind="follows_budget")) == 4
    assert len(verdicts(rows, kind="follows_budget", clock="host")) == 2
    assert len(verdicts(rows, kind="follows_budget", clock="host", backend="sdpa")) == 1
    assert len(verdicts(rows, kind="follows_budget", device="cuda")) == 4
    (none,) = verdicts(rows, kind="follows_budget", device="cpu")
    assert (none.holds, none.words) == (None, "no row of it")
    on_cpu = [replace(row, cudnn="") for row in rows]
    assert len(verdicts(on_cpu, kind="follows_budget", device="cpu")) == 4


def test_a_backend_is_met_as_asked_for_and_as_run(measured: Rows) -> None:
    rows = [replace(row, parameters="backend=auto") if row.backend == "triton" else row for row in measured()]
    for backend in ("auto", "triton"):
        assert holds(rows, kind="follows_budget", backend=backend) is True


def test_series_that_say_nothing_are_left_out_where_others_speak(measured: Rows) -> None:
    alone = measured((8192,), batches=(64,))
    (verdict,) = verdicts(alone, kind="follows_budget")
    assert verdict.holds is None
    (verdict,) = verdicts([*measured(), *alone], kind="follows_budget")
    assert (verdict.holds, verdict.subject) == (True, "nsa.decode triton, batch 8")


def test_a_budget_of_nothing_says_nothing(measured: Rows) -> None:
    rows = [replace(row, reads_expected_decode=0, reads_actual_decode=0) for row in measured()]
    assert holds(rows, kind="follows_budget") is None


@pytest.mark.parametrize("kind", ["follows_budget", "exponent", "crossover", "faster"])
def test_rows_without_time_or_quartiles_are_passed_over(measured: Rows, kind: str) -> None:
    own = {"exponent": {"at_most": 1}, "crossover": {"at_most": 8192}, "faster": {"than": "dense.decode"}}.get(kind, {})
    rows = measured()
    assert holds(rows, kind=kind, **own) is True
    late = [replace(row, ms_total=99.0, p25_ms=None) if row.S > 16384 else row for row in rows]
    assert holds(late, kind=kind, **own) is True
    failed = [replace(row, ms_total=99.0, status="wrong: by 1") if row.S > 16384 else row for row in rows]
    assert holds(failed, kind=kind, **own) is True
    refused = changed(rows, ms_total=lambda row: None, status=lambda row: "refused: no Triton here")
    (verdict,) = verdicts(refused, kind=kind, **own)
    assert (verdict.holds, verdict.words) == (None, "no time: refused: no Triton here")


@pytest.mark.parametrize(
    "table, message",
    [
        ({"kind": "grows"}, "expected a kind of follows_budget, .*, got 'grows'"),
        ({}, "got None"),
        ({"kind": ["exponent", "faster"], "workload": "w"}, "expected a kind of .*, got .'exponent', 'faster'."),
        ({"kind": "exponent", "workload": "nsa.decode"}, "expected at_most, got kind, workload"),
        ({"kind": "exponent", "at_most": 1}, "expected workload, got kind, at_most"),
        ({"kind": "exponent", "workload": "w", "at_most": 1, "by": 2}, "expected keys of .*at_least, from, got by"),
        ({"kind": "exponent", "workload": "w", "at_most": True}, "a number of at least 0 for at_most, got True"),
        ({"kind": "exponent", "workload": "w", "at_most": math.nan}, "a number of at least 0 for at_most, got nan"),
        ({"kind": "exponent", "workload": "w", "at_most": "1"}, "a number of at least 0 for at_most, got '1'"),
        ({"kind": "crossover", "workload": 3, "at_most": 1}, "expected a word for workload, got 3"),
        ({"kind": "crossover", "workload": "w", "at_most": 1, "clock": "sun"}, "expected clock of graph.*got 'sun'"),
        ({"kind": "crossover", "workload": "w", "at_most": 1, "device": "tpu"}, "expected device of cpu.*got 'tpu'"),
        ({"kind": "faster", "workload": "w"}, "expected than, got kind, workload"),
    ],
)
def test_a_table_that_is_wrong_says_what_was_expected(table: dict[str, Any], message: str) -> None:
    with pytest.raises(TrendError, match=message):
        parse_trend(table)
