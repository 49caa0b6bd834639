"""Do suites multiply as documented, and does a wrong one say what is wrong?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nsa_bench.suite import CLOCKS, FOLDER, SuiteError, load_suite, parse, shipped
from nsa_bench.workload import load_workloads


def test_lists_multiply(document: Callable[..., dict[str, Any]]) -> None:
    variant = {"workload": "toy", "clock": ["host", "graph"], "backend": ["a", "b"]}
    points = [{"S": [1, 2], "batch": [3, 4]}, {"S": 5}]
    suite = parse("mine", document(variant=[variant], cpu={"points": points}))
    assert [(v.clock, v.parameters["backend"]) for v in suite.variants] == [
        ("host", "a"),
        ("host", "b"),
        ("graph", "a"),
        ("graph", "b"),
    ]
    assert suite.points["cpu"] == (
        {"S": 1, "batch": 3},
        {"S": 1, "batch": 4},
        {"S": 2, "batch": 3},
        {"S": 2, "batch": 4},
        {"S": 5},
    )
    assert suite.quick["cpu"] == ({"S": 1, "batch": 3},)  # none are named: the first point
    assert suite.points["cuda"] == suite.quick["cuda"] == ()


BAD: dict[str, dict[str, Any]] = {
    "expected about, variant": {"variants": []},
    "at least one": {"variant": []},
    r"expected \[\[variant\]\] tables": {"variant": {"workload": "toy"}},
    "a workload and a clock": {"variant": [{"workload": "toy", "clock": "sundial"}]},
    "a device of": {"variant": [{"workload": "toy", "clock": "host", "device": "tpu"}]},
    "expected ints and words for clock": {"variant": [{"workload": "toy", "clock": []}]},
    "expected points of": {"cpu": {}},
    "points and quick": {"cpu": {"point": []}},
    "expected points with S": {"cpu": {"points": [{"batch": 1}]}},
    "S of at least 1": {"cpu": {"points": [{"S": [8, 0]}]}},
    "expected ints and words for S": {"cpu": {"points": [{"S": [1.5]}]}},
    r"without \['S'\]": {"variant": [{"workload": "toy", "clock": "host", "S": 4}]},
}


@pytest.mark.parametrize(("words", "changes"), BAD.items())
def test_a_wrong_suite_says_so(words: str, changes: dict[str, Any], document: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(SuiteError, match=words):
        parse("mine", document(1) | changes)


def test_files_that_are_not_there_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"expected one of \['bench_decode'"):
        load_suite("bench_no_such")
    path = tmp_path / "mine.toml"
    path.write_text("about = ")
    with pytest.raises(SuiteError, match=r"mine\.toml"):
        load_suite(str(path))
    with pytest.raises(SuiteError, match="null"):
        load_suite("bench\0decode")
    with pytest.raises(SuiteError, match=str(tmp_path)):
        load_suite(f"{tmp_path}/other.toml")


@pytest.mark.parametrize("name", shipped())
def test_shipped_suites_are_sound(name: str) -> None:
    suite = load_suite(name)
    assert suite.about
    assert suite == load_suite(str(FOLDER / f"{name}.toml"))
    devices = ["cuda"] if name == "bench_peers" else ["cpu", "cuda"]  # peers have nothing for a CPU
    assert [device for device in ("cpu", "cuda") if suite.points[device] and suite.quick[device]] == devices
    assert {variant.clock for variant in suite.variants} <= set(CLOCKS)
    workloads, _ = load_workloads()
    for variant in suite.variants:
        if variant.workload in workloads:  # those of packages that are installed
            assert variant.parameters.keys() <= workloads[variant.workload].parameters.keys()


def test_there_are_suites_for_decode_and_prefill() -> None:
    assert {"bench_decode", "bench_prefill"} <= set(shipped())
