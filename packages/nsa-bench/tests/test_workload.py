"""Which entry points are taken for workloads, and what is said of those that are none."""

from typing import Any

import pytest
from nsa_bench.workload import WorkloadError, load_workloads


class Point:
    """An entry point of somebody."""

    def __init__(self, name: str, *workloads: Any, error: Exception | None = None) -> None:
        self.name, self.value, self.workloads, self.error = name, f"{name}:workloads", workloads, error

    def load(self) -> Any:
        if self.error:
            raise self.error
        return lambda: self.workloads


def test_workloads_by_name_in_order(toy: Any) -> None:
    found, broken = load_workloads([Point("b", toy.but(name="z"), toy.but(name="y")), Point("a", toy.but(name="x"))])  # type: ignore[list-item]
    assert list(found) == ["x", "y", "z"]
    assert broken == {}


def test_one_broken_package_does_not_hide_the_others(toy: Any) -> None:
    points = [Point("good", toy), Point("bad", error=ImportError("no module named gone"))]
    found, broken = load_workloads(points)  # type: ignore[arg-type]
    assert list(found) == ["toy"]
    assert broken == {"bad": "ImportError: no module named gone"}


def test_a_name_is_offered_once(toy: Any) -> None:
    with pytest.raises(WorkloadError, match="workload toy: expected one of that name"):
        load_workloads([Point("a", toy), Point("b", toy)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "with a name"),
        ({"name": None}, "with a name"),
        ({"calls": 0}, "calls, an int of at least 1"),
        ({"calls": True}, "calls, an int of at least 1"),
        ({"parameters": {"batch": 1}}, "S an int among them"),
        ({"parameters": {"S": "64"}}, "S an int among them"),
        ({"parameters": {"S": 64, "scale": 0.5}}, "ints and words"),
        ({"parameters": {"S": 64, "flag": True}}, "ints and words"),
        ({"parameters": None}, "S an int among them"),
    ],
)
def test_what_is_no_workload_is_refused(changes: dict[str, Any], words: str, toy: Any) -> None:
    found, broken = load_workloads([Point("a", toy.but(**changes))])  # type: ignore[list-item]
    assert found == {}
    assert words in broken["a"]


def test_an_object_without_methods_is_none() -> None:
    _, broken = load_workloads([Point("a", object())])  # type: ignore[list-item]
    assert "refuse, setup, call, parts, cost, check, facts" in broken["a"]
