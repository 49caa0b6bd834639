"""Is something shown as often as asked: by times, by seconds, by both? The clock is a list that the test winds."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nsa_routing import RateLimit


def shown(every: int, seconds: float, waits: list[float]) -> list[int]:
    """Numbers, from 1 on, of the times that are shown, each after a wait."""
    now = [1000.0]
    limit, found = RateLimit(every, seconds, lambda: now[0]), []
    for number, wait in enumerate(waits, start=1):
        now[0] += wait
        found += [number] if limit.due() else []
    assert limit.times == len(waits)
    return found


@pytest.mark.parametrize(
    "every, seconds, waits, expected",
    [
        (0, 0.0, [0, 1e9, 1e9], [1]),
        (1, 0.0, [0] * 4, [1, 2, 3, 4]),
        (3, 0.0, [1e9] * 7, [1, 3, 6]),
        (0, 10.0, [0, 9, 1, 9.5, 0.25, 0.25], [1, 3, 6]),
        (2, 10.0, [0, 9, 1, 1, 9, 9], [1, 3, 5]),
        (5, 10.0, [0, 20, 20, 20, 20, 1, 1, 1, 1, 1, 9], [1, 5, 11]),
    ],
    ids=["once", "always", "times", "seconds", "both, time is short", "both, times are few"],
)
def test_what_is_shown(every: int, seconds: float, waits: list[float], expected: list[int]) -> None:
    assert shown(every, seconds, waits) == expected


@given(st.integers(0, 5), st.integers(0, 5), st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_the_first_is_shown_and_no_two_are_too_close(every: int, seconds: int, waits: list[int]) -> None:
    found = shown(every, float(seconds), [float(wait) for wait in waits])
    assert found[0] == 1
    for before, after in pairwise(found):
        assert every or seconds
        assert sum(waits[before:after]) >= seconds
        assert not every or any(number % every == 0 for number in range(before + 1, after + 1))


def test_a_clock_is_not_asked_in_vain() -> None:
    def never() -> float:
        raise AssertionError("asked")

    limit = RateLimit(2, clock=never)
    assert [limit.due() for _ in range(4)] == [True, True, False, True]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"every": -1}, ValueError, "^every: expected at least 0, got -1$"),
        ({"every": True}, TypeError, "^every: expected an int, got True of type bool$"),
        ({"seconds": float("inf")}, ValueError, "^seconds: expected a finite number of at least 0, got inf$"),
        ({"seconds": None}, TypeError, "^seconds: expected a number, got None of type NoneType$"),
    ],
)
def test_rates_that_are_none(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RateLimit(**options)
