"""Do variants take turns, and are clocks read around what they claim to time?"""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nsa_bench import timing
from nsa_bench.timing import LEAST_REPEATS, Timing, sample, sets_of_data, take_turns


def test_variants_take_turns_and_another_goes_first_each_time() -> None:
    order: list[str] = []

    def make(name: str) -> Any:
        return lambda: float(order.append(name) or ord(name))

    times = take_turns({name: make(name) for name in "abc"}, repeats=3, warm_up=1)
    assert ["".join(order[i : i + 3]) for i in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]
    assert times["b"] == Timing(98.0, 98.0, 98.0, 3)


def test_the_warm_up_does_not_count() -> None:
    left = [100.0, 100.0, 1.0, 2.0, 3.0]
    assert take_turns({"a": lambda: left.pop(0)}, repeats=3) == {"a": Timing(2.0, 1.5, 2.5, 3)}


def test_what_takes_long_is_sampled_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow() -> float:
        now[0] += 15.0
        return 15e3

    times = take_turns({"slow": slow, "fast": lambda: 1.0}, repeats=9)
    assert (times["slow"].repeats, times["fast"].repeats) == (LEAST_REPEATS, 9)


@given(samples=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=20))
def test_quartiles_lie_around_the_median(samples: list[float]) -> None:
    found = Timing.of(samples)
    assert min(samples) <= found.p25 <= found.median <= found.p75 <= max(samples)
    assert found.repeats == len(samples)


def test_the_host_clock_averages_over_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(seconds: float) -> Any:
        def run() -> float:
            now[0] += seconds
            return seconds

        return run

    timed, results = sample("host", "cpu", [call(1.0), call(3.0)])
    assert results == [1.0, 3.0]
    assert timed() == pytest.approx(2000.0)


def test_cold_data_is_a_matter_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "l2_bytes", lambda: 50)
    assert sets_of_data("host", "cpu", 10) == 1
    assert sets_of_data("events", "cuda", 10) == 1
    assert [sets_of_data("graph", "cuda", size) for size in (1000, 100, 10, 0.5)] == [2, 2, 15, timing.MOST_SETS]
