"""Does `nsa-routing tune` work for real: real operations, a real clock, real inputs, and a profile that plans obey?

Nothing here depends on what the clock says. What it said is read back from the raw measurements.
"""

import csv
import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nsa_routing import Policy, Problem, Profile, backends, cli, load_profile, plan, probe, reset, tuning
from nsa_routing.tuning import PREFILL_OPS, _tune, measuring
from nsa_routing.tuning.findings import crossover
from nsa_routing.tuning.measuring import Timing
from nsa_varlen import reference
from typer.testing import CliRunner

LENGTHS = (32, 64, 128, 256)


class Dense:
    """The oracle as a backend: quick at short lengths, where it does no bookkeeping; slow at long ones."""

    name = "dense"

    def refuse(self, op: str, problem: Problem, environment: Any) -> str | None:
        return None

    def __getattr__(self, op: str) -> Any:
        return getattr(reference, op)


@pytest.fixture
def _dense(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("dense_package")
    module.BACKEND = Dense()
    monkeypatch.setitem(sys.modules, "dense_package", module)
    points = (
        EntryPoint("dense", "dense_package:BACKEND", "nsa.backends"),
        EntryPoint("sdpa", "nsa_varlen.sdpa:BACKEND", "nsa.backends"),
    )
    monkeypatch.setattr(backends, "entry_points", lambda group: points)
    inputs = EntryPoint("varlen", "nsa_varlen.op_inputs:op_inputs", "nsa.op_inputs")
    monkeypatch.setattr(_tune, "entry_points", lambda group: (inputs,))
    reset()


def problem(op: str, length: int, device: str) -> Problem:
    """One sequence, prefilled, as the profile's bounds see it."""
    names = ("total_q",) if op == "combine" else ("total_q", "max_seqlen_q", "max_seqlen_k")
    lengths = dict.fromkeys(names, length)
    return Problem(op, device, torch.float32, 8, 8, 2, **lengths)


def chosen(profile: Profile, op: str, length: int, device: str = "cpu") -> str | None:
    return plan(probe(device), profile, problem(op, length, device), Policy(preset="perf")).backend


def thresholds_of(path: Path) -> dict[str, int]:
    """By op, what the rule makes of the raw measurements."""
    times: dict[tuple[str, str], dict[int, Timing]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            timing = Timing(*(float(row[name]) for name in ("median_ms", "p25_ms", "p75_ms", "min_ms")))
            times.setdefault((row["op"], row["backend"]), {})[int(row["length"])] = timing
    assert times.keys() == {(op, name) for op in PREFILL_OPS for name in ("dense", "sdpa")}
    assert all(tuple(by_length) == LENGTHS for by_length in times.values())
    assert all(0 < t.min_ms <= t.p25_ms <= t.median_ms <= t.p75_ms for found in times.values() for t in found.values())
    found = {op: crossover(times[op, "dense"], times[op, "sdpa"]) for op in PREFILL_OPS}
    return {op: length for op, length in found.items() if length is not None}


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_the_clock_of_a_gpu(device: str) -> None:
    x = torch.ones(1 << 20, device=device)
    assert measuring.stopwatch(device)(lambda: x + 1) > 0
    assert measuring._l2_sized().nbytes >= 2 * torch.cuda.get_device_properties(0).L2_cache_size


@pytest.mark.usefixtures("_dense")
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_real_run(device: str, grad: bool, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    words = ["tune", "--out", str(out), "--lengths", ",".join(map(str, LENGTHS)), "--device", "cpu", "--json"]
    words += ["--num-heads", "2", "--num-kv-heads", "1", "--head-dim", "8", "--repeat", "3", "--preset", "perf"]
    result = CliRunner().invoke(cli.app, [*words, "--grad"] if grad else words)
    assert result.exit_code == 0, result.output
    findings = {found["op"]: found for found in json.loads(result.stdout)["findings"]}
    assert {found["outcome"] for found in findings.values()} <= {"threshold", "never"}, "the oracle is right"
    expected = thresholds_of(tmp_path / "mine.csv")
    assert {op: found["at_least"] for op, found in findings.items()} == {op: expected.get(op) for op in PREFILL_OPS}
    profile = load_profile(out)
    assert {op for op, names in profile.thresholds.items() if "dense" in names} == expected.keys()
    for op in PREFILL_OPS:
        before, at = (chosen(profile, op, length, device) for length in (expected.get(op, 1) - 1, expected.get(op, 1)))
        assert (before, at) == ("sdpa", "dense" if op in expected else "sdpa")


@pytest.mark.usefixtures("_dense")
def test_the_profile_of_a_real_run_where_dense_always_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real operations again; only the verdict is made up, so that every operation has a threshold."""
    monkeypatch.setattr("nsa_routing.tuning.findings.wins", lambda *_: True)
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "repeat": 3, "device": "cpu"}
    tuned = tuning.tune(tmp_path / "mine.yaml", lengths=(64, 128), preset="perf", **sizes)
    profile = load_profile(tuned.profile)
    assert {op: chosen(profile, op, 63) for op in PREFILL_OPS} == dict.fromkeys(PREFILL_OPS, "sdpa")
    assert {op: chosen(profile, op, 64) for op in PREFILL_OPS} == dict.fromkeys(PREFILL_OPS, "dense")
