"""The last thing that this suite does: measure a little, hold trends against what was measured, draw.

Plots in `bench/plots` are those of the results in `bench/results`: drawn anew, and compared. After new results:

    for table in bench/results/*-2026-11-29.csv; do nsa-bench plot $table --out bench/plots --format svg; done
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from nsa_bench import schema
from nsa_bench.schema import PREFIX

BENCH = Path(__file__).parents[1] / "bench"
TABLES = sorted(BENCH.glob("results/*.csv"))
DRAWN_BY = "3.11"  # matplotlib; another one draws otherwise
RESULTS = [path for path in TABLES if path.read_text(encoding="utf-8").startswith(",".join(PREFIX))]

SUITE = """
about = "Everything, small"

[[variant]]
workload = ["nsa.decode", "nsa.prefill", "nsa.train"]
clock = "host"
backend = ["auto", "sdpa"]

[[variant]]
workload = ["dense.decode", "dense.prefill", "dense.train"]
clock = "host"
backend = "sdpa"

[[cpu.points]]
S = [128, 256]
batch = 2
num_heads = 4
num_kv_heads = 2
head_dim = 16
kernel_size = 8
kernel_stride = 4
block_size = 16
topk = 4
window_size = 32

[[trend]]
kind = "reads_within_budget"
workload = "nsa.decode"

[[trend]]
kind = "exponent"
workload = "nsa.prefill"
at_most = 3.0
"""


def nsa_bench(*words: str | Path, status: int = 0) -> str:
    command = [sys.executable, "-m", "nsa_bench", *map(str, words)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests have the other cores
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_packages_together_are_measured_judged_and_drawn(tmp_path: Path) -> None:
    """One test: what each part takes was made by the one before."""
    suite, table = tmp_path / "small.toml", tmp_path / "small.csv"
    suite.write_text(SUITE)
    nsa_bench("run", suite, "--device", "cpu", "--repeats", "3", "--out", table)
    rows = schema.read(table)
    assert len(rows) == 2 * (3 * 2 + 3)
    assert [row.status for row in rows] == ["ok"] * len(rows)
    assert {row.backend for row in rows} == {"sdpa"}
    decode = [row for row in rows if row.workload == "nsa.decode"]
    assert all(row.ms_cmp and row.ms_sel and row.ms_win and row.ms_choice and row.ms_combine for row in decode)
    assert all(row.ms_slc_win is None for row in decode)

    said = nsa_bench("summarize", table, "--suite", suite)
    assert any(line.split()[:2] == ["holds", "reads_within_budget"] for line in said.splitlines())
    never = tmp_path / "never.toml"
    never.write_text(SUITE.replace("at_most = 3.0", "at_most = 99.0\nat_least = 98.0"))
    said = nsa_bench("summarize", table, "--suite", never, status=1)
    assert any(line.split()[:2] == ["BROKEN", "exponent,"] for line in said.splitlines())

    nsa_bench("plot", table, "--out", tmp_path / "plots")
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"small-time.png", "small-branches.png", "small-roofline.png", "small-reads.png"} <= drawn


def test_there_are_results_of_a_gpu_and_of_a_cpu() -> None:
    devices = {bool(row.cudnn) for path in RESULTS for row in schema.read(path)}
    assert devices == {True, False}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_trends_hold_in_committed_results(path: Path) -> None:
    said = nsa_bench("summarize", path)  # whose status is 1 if one is broken
    assert any(line.startswith("0 of ") or line == "no trend declared" for line in said.splitlines())


def test_committed_results_are_of_committed_code_and_right() -> None:
    for path in RESULTS:
        for row in schema.read(path):
            assert row.commit, path
            assert not row.commit.endswith("+"), path
            assert not row.status.startswith(("wrong", "failed")), (path, row)


@pytest.mark.slow
def test_the_plots_of_committed_results_are_drawn(tmp_path: Path) -> None:
    committed = {path.name: path for path in (BENCH / "plots").glob("*.svg")}
    for path in RESULTS:
        nsa_bench("plot", path, "--out", tmp_path, "--format", "svg")
    drawn = {path.name: path for path in tmp_path.glob("*.svg")}
    assert drawn.keys() == committed.keys()
    assert all(any(name.startswith(f"{path.stem}-") for name in drawn) for path in RESULTS)
    if matplotlib.__version__.rpartition(".")[0] == DRAWN_BY:
        assert [name for name in drawn if lines(drawn[name]) != lines(committed[name])] == []


def lines(plot: Path) -> list[str]:
    """Of an SVG, its references by order: matplotlib names them by a hash that differs between Pythons."""
    names: dict[str, str] = {}

    def number(found: re.Match[str]) -> str:
        return names.setdefault(found[0], f"#{len(names)}")

    return re.sub(r"\b[mp][0-9a-f]{10}\b", number, plot.read_text(encoding="utf-8")).splitlines()
