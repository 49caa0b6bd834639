"""Do the commands that read say what they found, end as they promise, and meet bad input with one line?"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from nsa_bench.reading import plot, summarize
from nsa_bench.schema import PREFIX, Row, write
from typer.testing import CliRunner, Result

Rows = Callable[..., list[Row]]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(summarize)
app.command()(plot)

SUITE = """
about = "Mine"
[[variant]]
workload = "nsa.decode"
clock = "graph"
[[cuda.points]]
S = 8192
[[trend]]
kind = "follows_budget"
workload = "nsa.decode"
[[trend]]
kind = "crossover"
workload = "nsa.decode"
at_most = 16384
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one to stand in, with a suite."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(SUITE)
    return tmp_path


def called(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def told(result: Result) -> str:
    """What a bad option or file was met with: usage, a hint, and one line."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert result.stderr.rstrip().endswith(line)
    return line


def test_a_summary_with_trends_that_hold(folder: Path, measured: Rows) -> None:
    write(Path("run.csv"), measured())
    result = called("summarize", "run.csv", "--suite", "mine.toml")
    assert result.exit_code == 0, result.output
    for words in ("NVIDIA H100 80GB HBM3", "speed-up", "9,727", "100.0%", "0 of 2 broken", "faster from 8k on"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) > 100  # wider than a pipe's 80 columns: nothing is cut
    assert "…" not in result.stdout


def test_a_broken_trend_fails(folder: Path, measured: Rows) -> None:
    write(Path("run.csv"), measured(time=lambda S: S / 1e4))
    result = called("summarize", "run.csv", "--suite", "mine.toml")
    assert result.exit_code == 1
    assert "2 of 2 broken" in result.stdout
    assert "BROKEN" in result.stdout
    assert result.stderr == "nsa-bench: 2 failures\n"


def test_strict_fails_where_nothing_can_be_said(folder: Path, measured: Rows) -> None:
    write(Path("run.csv"), measured((8192,)))
    assert called("summarize", "run.csv", "--suite", "mine.toml").exit_code == 0
    result = called("summarize", "run.csv", "--suite", "mine.toml", "--strict")
    assert result.exit_code == 1
    assert "unsaid" in result.stdout
    assert result.stderr == "nsa-bench: 1 failure\n"


def test_trends_of_the_rows_own_suite(folder: Path, measured: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path("run.csv"), [replace(row, suite="mine") for row in measured(time=lambda S: S / 1e4)])
    result = called("summarize", "run.csv")
    assert result.exit_code == 0
    assert "suite 'mine' is not a shipped one: --suite FILE says where its trends are" in result.stdout
    assert called("summarize", "run.csv", "--strict").exit_code == 1
    monkeypatch.setattr("nsa_bench.suite.FOLDER", folder)
    result = called("summarize", "run.csv")
    assert result.exit_code == 1
    assert "2 of 2 broken" in result.stdout


def test_a_baseline(folder: Path, measured: Rows) -> None:
    write(Path("was.csv"), measured(commit="0ld0ld0ld0"))
    write(Path("same.csv"), measured(seed=1))
    write(Path("slow.csv"), measured(seed=1, slower=1.1))
    result = called("summarize", "same.csv", "--baseline", "was.csv")
    assert result.exit_code == 0, result.output
    assert "5 same" in result.stdout
    assert "commit 0ld0ld0ld0" in result.stdout
    result = called("summarize", "slow.csv", "--baseline", "was.csv")
    assert result.exit_code == 1
    assert "5 regressed" in result.stdout
    assert result.stderr == "nsa-bench: 5 failures\n"
    write(Path("less.csv"), measured((8192,), seed=1))
    result = called("summarize", "less.csv", "--baseline", "was.csv")
    assert result.exit_code == 1
    assert "12 missing" in result.stdout
    assert called("summarize", "less.csv", "--baseline", "was.csv", "--where", "S=8192").exit_code == 0


def test_files_of_one_comparison_hold_a_measurement_once(folder: Path, measured: Rows) -> None:
    write(Path("a.csv"), measured((8192,)))
    write(Path("b.csv"), measured((16384,)))
    write(Path("both.csv"), measured((8192, 16384)))
    result = called("summarize", "a.csv", "b.csv", "--baseline", "both.csv")
    assert result.exit_code == 0, result.output
    assert "2 same" in result.stdout
    assert "b.csv: expected other measurements than those of a.csv" in told(
        called("summarize", "a.csv", "a.csv", "b.csv", "both.csv", "--baseline", "both.csv")
    ).replace("both.csv: expected", "b.csv: expected")


def test_a_long_reason_is_wrapped_and_whole(folder: Path, measured: Rows) -> None:
    reason = "failed: " + " ".join(f"word{number}" for number in range(99))
    write(Path("run.csv"), [replace(row, status=reason) if row.S == 8192 else row for row in measured()])
    result = called("summarize", "run.csv")
    assert max(map(len, result.stdout.splitlines())) < 240
    assert all(f"word{number}" in result.stdout for number in range(99))


def test_markdown(folder: Path, measured: Rows) -> None:
    write(Path("run.csv"), measured())
    result = called("summarize", "run.csv", "--format", "markdown", "--suite", "mine.toml", "--baseline", "run.csv")
    assert result.exit_code == 0, result.output
    assert "| S | batch | variant | ms | spread | speed-up | reads | of budget | of floor | status |" in result.stdout
    tables = [line.count("|") for line in result.stdout.splitlines() if line.startswith("|")]
    assert tables[:17] == [11] * 17
    assert "## trends of run.csv" in result.stdout


def test_where(folder: Path, measured: Rows) -> None:
    write(Path("run.csv"), measured(clocks=("graph", "host")))
    result = called("summarize", "run.csv", "--where", "clock=host", "--where", "S=8192")
    assert len([line for line in result.stdout.splitlines() if line.startswith("8192")]) == 3
    assert [line for line in result.stdout.splitlines() if line.startswith("16384")] == []


@pytest.mark.parametrize("command", ["summarize", "plot"])
def test_bad_files_are_met_with_one_line(folder: Path, measured: Rows, command: str) -> None:
    assert "none.csv: expected a CSV file, got: No such file" in told(called(command, "none.csv"))
    assert "expected a CSV file, got: Is a directory" in told(called(command, "."))
    Path("empty.csv").write_text("")
    assert "empty.csv: expected columns S,ms_total" in told(called(command, "empty.csv"))
    Path("binary.csv").write_bytes(b"\xff\xfe\x00")
    assert "binary.csv: expected a CSV file, got: it is not UTF-8" in told(called(command, "binary.csv"))
    Path("other.csv").write_text("shape,tokens\n1,2\n")
    assert "other.csv: expected columns S,ms_total" in told(called(command, "other.csv"))
    Path("rows.csv").write_text(",".join([*PREFIX, "schema"]) + "\n")
    assert "rows.csv: expected rows with a time, got 0 rows" in told(called(command, "rows.csv"))
    refused = [replace(row, status="refused: no GPU", ms_total=None) for row in measured((8192,))]
    write(Path("refused.csv"), refused)
    assert "expected rows with a time, got 3 rows, the first: refused: no GPU" in told(called(command, "refused.csv"))
    write(Path("run.csv"), measured((8192,)))
    assert "got 0 such rows of 3" in told(called(command, "run.csv", "--where", "clock=host"))
    assert "expected COLUMN=VALUE" in told(called(command, "run.csv", "--where", "color=red"))


def test_bad_options_of_summarize(folder: Path, measured: Rows) -> None:
    write(Path("run.csv"), measured((8192,)))
    assert "'--baseline': none.csv: expected a CSV" in told(called("summarize", "run.csv", "--baseline", "none.csv"))
    assert "'--suite': suite: expected one of" in told(called("summarize", "run.csv", "--suite", "none"))
    Path("wrong.toml").write_text(SUITE.replace("crossover", "grows"))
    line = told(called("summarize", "run.csv", "--suite", "wrong.toml"))
    assert "wrong.toml: trend: expected a kind of" in line
    assert "expected one of text, markdown, got 'csv'" in told(called("summarize", "run.csv", "--format", "csv"))


def test_plots(folder: Path, measured: Rows) -> None:
    write(Path("one.csv"), measured())
    write(Path("two.csv"), measured(commit="2b7e151628", date="2026-12-01"))
    result = called("plot", "one.csv", "two.csv", "--out", "deep/plots", "--format", "svg")
    assert result.exit_code == 0, result.output
    names = {f"{stem}-{kind}.svg" for stem in ("one", "two") for kind in ("time", "branches", "roofline", "reads")}
    assert {path.name for path in Path("deep/plots").iterdir()} == names | {"bench_decode-history-speedup.svg"}
    assert result.stdout.splitlines()[0] == "wrote deep/plots/one-time.svg"
    result = called("plot", "one.csv", "two.csv", "--kind", "history", "--metric", "ms_total")
    assert result.exit_code == 0, result.output
    assert Path("bench_decode-history-ms_total.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_nothing_is_named(folder: Path, measured: Rows) -> None:
    write(Path("run.csv"), [replace(row, reads_actual_decode=None) for row in measured()])
    result = called("plot", "run.csv", "--kind", "reads")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "nsa-bench: run: nothing to draw for reads: no row with decode reads, batch and calls\n"
    result = called("plot", "run.csv")
    assert result.exit_code == 0
    assert "nothing to draw for reads" in result.stderr


def test_bad_options_of_plot(folder: Path, measured: Rows) -> None:
    write(Path("run.csv"), measured((8192, 16384)))
    assert "'--out': expected a folder that can be written" in told(called("plot", "run.csv", "--out", "run.csv"))
    assert "expected one of speedup, ms_total" in told(called("plot", "run.csv", "--metric", "color"))
    assert "expected one of png, svg, got 'pdf'" in told(called("plot", "run.csv", "--format", "pdf"))
    assert "expected one of time, branches" in told(called("plot", "run.csv", "--kind", "pie"))


def test_two_files_of_one_name_would_overwrite_each_other(folder: Path, measured: Rows) -> None:
    Path("a").mkdir()
    for path in ("run.csv", "a/run.csv"):
        write(Path(path), measured((8192,)))
    assert "a/run.csv: expected another name than that of run.csv" in told(called("plot", "run.csv", "a/run.csv"))
