"""The command as its users type it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nsa_bench import ceilings, cli, schema
from nsa_bench.cli import app
from typer.testing import CliRunner

SUITE = """
about = "toys"
[[variant]]
workload = "toy"
clock = "host"
[[cpu.points]]
S = [64, 128]
[[cpu.quick]]
S = 8
"""


@pytest.fixture(autouse=True)
def _toys(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load_workloads", lambda: ({"toy": toy}, {"theirs": "ImportError: gone"}))
    monkeypatch.setattr(ceilings, "flops_per_second", lambda device, dtype: 1e12)
    monkeypatch.setattr(ceilings, "bytes_per_second", lambda device: 1e9)


@pytest.fixture
def suite(tmp_path: Path) -> str:
    path = tmp_path / "toys.toml"
    path.write_text(SUITE)
    return str(path)


@pytest.fixture
def run(suite: str) -> Callable[..., Any]:
    def invoke(*words: str, suite: str = suite) -> Any:
        return CliRunner().invoke(app, ["run", suite, "--device", "cpu", "--repeats", "3", "--commit", "abc", *words])

    return invoke


def test_list_shows_suites_workloads_and_what_is_broken() -> None:
    shown = CliRunner().invoke(app, ["list"])
    assert shown.exit_code == 0
    for words in ("bench_decode", "bench_prefill", "toy", "S=8", "workloads of theirs do not load: ImportError: gone"):
        assert words in shown.output


def test_run_writes_rows_and_goes_on_with_them(run: Callable[..., Any], toy: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    first = run("--out", str(out), "--budget", "0")
    assert first.exit_code == 3
    assert "1 of 2 points left" in first.output
    assert [row.S for row in schema.read(out)] == [64]
    second = run("--out", str(out))
    assert second.exit_code == 0, second.output
    assert [(row.S, row.commit, row.status) for row in schema.read(out)] == [(64, "abc", "ok"), (128, "abc", "ok")]
    assert [said[1] for said in toy.said if said[0] == "check"] == [64, 128]  # each once
    assert "known" in second.output


def test_quick_takes_the_short_points(run: Callable[..., Any], toy: Any) -> None:
    assert run("--quick").exit_code == 0
    assert {said[1] for said in toy.said if said[0] == "check"} == {8}


def test_a_wrong_result_fails_the_command(run: Callable[..., Any], toy: Any, tmp_path: Path) -> None:
    toy.wrong = frozenset({128})
    out = tmp_path / "rows.csv"
    done = run("--out", str(out))
    assert done.exit_code == 1
    assert "wrong: off by 1.0" in done.output
    assert [row.ms_total is None for row in schema.read(out)] == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workload", "gone"], "workload: expected one of ['toy'], got 'gone'"),
        (["--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
        (["--out", "/no/such/folder/x.csv"], "out: expected a file in a folder that is there"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, run: Callable[..., Any]) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_trend_that_nobody_can_ask_is_said_before_anything_is_measured(
    run: Callable[..., Any], toy: Any, tmp_path: Path
) -> None:
    path = tmp_path / "typo.toml"
    path.write_text(f'{SUITE}\n[[trend]]\nkind = "exponnent"\nworkload = "toy"\n')
    done = run(suite=str(path))
    assert done.exit_code == 2
    assert "trend: expected a kind of" in done.output
    assert toy.said == []


def test_an_unknown_suite_names_the_known_ones(run: Callable[..., Any]) -> None:
    done = run(suite="bench_gone")
    assert done.exit_code == 2
    assert "expected one of ['bench_decode', " in done.output


def test_rows_of_another_machine_or_commit_are_not_gone_on_with(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert run("--out", str(out)).exit_code == 0
    before = out.read_bytes()
    done = run("--out", str(out), "--commit", "def")
    assert done.exit_code == 2
    assert "got 'abc' instead of 'def'" in done.output
    assert out.read_bytes() == before


def test_rows_of_another_preset_are_not_gone_on_with(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    assert run("--out", str(out)).exit_code == 0
    monkeypatch.setenv("NSA_PRESET", "perf")
    monkeypatch.setenv("NSA_CHECK_FINITE", "off")
    done = run("--out", str(out))
    assert done.exit_code == 2
    assert "got '' instead of 'NSA_CHECK_FINITE=off NSA_PRESET=perf'" in done.output


def test_rows_of_code_that_is_in_no_commit_are_measured_again(
    run: Callable[..., Any], toy: Any, tmp_path: Path
) -> None:
    out = tmp_path / "rows.csv"
    done = [run("--out", str(out), "--commit", "abc+") for _ in range(2)]
    assert [each.exit_code for each in done] == [0, 0]
    assert ["measured anew" in each.output for each in done] == [False, True]
    assert [said[1] for said in toy.said if said[0] == "check"] == [64, 128, 64, 128]


@pytest.mark.parametrize("commit", ["abc", "abc+"])
def test_a_file_that_is_no_table_is_left_alone(commit: str, run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "notes.csv"
    out.write_text("my,notes\n1,2\n")
    assert run("--out", str(out), "--commit", commit).exit_code == 2
    assert out.read_text() == "my,notes\n1,2\n"


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_is_measured(
    run: Callable[..., Any], toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkstemp(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(schema.tempfile, "mkstemp", mkstemp)
    done = run("--out", str(tmp_path / "rows.csv"))
    assert done.exit_code == 2
    assert "out: expected a file that can be written" in done.output
    assert "Permission denied" in done.output
    assert toy.said == []


def test_a_disk_that_is_full_in_the_middle(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "rows.csv", schema.write

    def full(path: Path, rows: Any) -> None:
        if len(rows) > 1:
            raise OSError(28, "No space left on device")
        write(path, rows)

    monkeypatch.setattr(schema, "write", full)
    done = run("--out", str(out))
    assert done.exit_code == 2
    assert "No space left on device" in done.output
    assert [row.S for row in schema.read(out)] == [64]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("S = [64, 128]", "S = [64, 64]"),
        ("[[cpu.points]]", '[[variant]]\nworkload = "toy"\nclock = "host"\n[[cpu.points]]'),
    ],
)
def test_a_suite_that_measures_something_twice(old: str, new: str, run: Callable[..., Any], tmp_path: Path) -> None:
    """A file has one row for each measurement."""
    path = tmp_path / "twice.toml"
    path.write_text(SUITE.replace(old, new))
    done = run(suite=str(path))
    assert done.exit_code == 2
    assert "suite twice: expected each measurement once, got toy [host] S=64 twice" in done.output


def test_a_cuda_device_that_is_not_there(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("--device", "cuda")
    assert done.exit_code == 2
    assert "torch finds no CUDA device" in done.output


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "nsa_bench", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("nsa-bench ")
