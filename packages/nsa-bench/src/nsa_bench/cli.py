"""The command `nsa-bench`."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nsa_bench import reading, runner, schema
from nsa_bench.machine import MachineError, find_device, provenance
from nsa_bench.schema import PROVENANCE, Row
from nsa_bench.suite import load_suite, shipped
from nsa_bench.trends import parse_trend
from nsa_bench.workload import Workload, WorkloadError, load_workloads

BAD, INCOMPLETE = 1, 3  # exit statuses: a result that is wrong or failed; points that the budget did not reach

app = typer.Typer(
    help="Workloads of Native Sparse Attention: measured, summarized, drawn.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # errors stay one line: rich boxes would cut them at the width of a pipe
    pretty_exceptions_enable=False,
)


def _version(shown: bool) -> None:
    if shown:
        print(f"nsa-bench {version('nsa-bench')}")
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command("list")
def list_() -> None:
    """Show the suites that ship, and the workloads of the packages that are installed."""
    console = Console()
    suites = Table("suite", "what", "workloads", title="Suites", title_justify="left")
    for name in shipped():
        suite = load_suite(name)
        suites.add_row(name, suite.about, ", ".join(sorted({variant.workload for variant in suite.variants})))
    console.print(suites)
    workloads = Table(title="Workloads", title_justify="left")
    for name in ("workload", "what", "parameters"):
        workloads.add_column(name, no_wrap=name == "workload")
    for workload in _workloads().values():
        parameters = " ".join(f"{name}={value}" for name, value in workload.parameters.items())
        workloads.add_row(workload.name, workload.about, parameters)
    console.print(workloads)


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="A suite's name, or a path that ends in .toml.")],
    quick: Annotated[bool, typer.Option("--quick", help="Few short points: does it run?")] = False,
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write, point by point. If it is there, it is gone on with.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds: no point is begun that would not fit.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Samples of each variant.")] = 11,
    only: Annotated[
        list[str] | None, typer.Option("--workload", help="Only this workload, and the dense anchors; repeatable.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="What to call the code; by default what git says here.")] = None,
) -> None:
    """Measure a suite.

    Each point is checked against the oracle before it is timed: a wrong result gets no number. Exits with 1 if
    something was wrong or failed, with 3 if the budget left points out: the same command goes on with them.
    """
    try:
        found = load_suite(suite)
        for table in found.trends:
            parse_trend(table)  # better said now than when all is measured
        where = find_device(device)
        points = runner.points_of(found, _chosen(only), where, quick=quick)
        machine = provenance(where, commit)
        known = _known(out, machine)
    except (ValueError, MachineError, OSError) as error:
        raise _refused(error) from error
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(found.name, total=sum(map(len, points)))

        def tell(line: str) -> None:
            progress.advance(task)
            progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

        def keep(rows: list[Row]) -> None:
            try:
                if out is not None:
                    schema.write(out, _merged(known, rows))
            except OSError as error:  # a disk that is full by now: what was written before is still there
                raise _refused(ValueError(f"out: expected a file that can be written, got {out}: {error}")) from error

        outcome = runner.run(points, where, machine, known=known, repeats=repeats, budget=budget, keep=keep, tell=tell)
    if out is not None:
        console.print(f"{out}: {len(_merged(known, outcome.rows))} rows", highlight=False)
    for row in outcome.bad:
        about = f"{row.workload} [{row.clock}] S={row.S} {row.parameters}"
        console.print(f"{about}: {row.status}", style="red", markup=False)
    if outcome.left:
        left = f"{outcome.left} of {len(points)} points left"
        console.print(f"{left}: the budget of {budget:g} s is spent", highlight=False)
    raise typer.Exit(BAD if outcome.bad else INCOMPLETE if outcome.left else 0)


app.command()(reading.summarize)
app.command()(reading.plot)


def _workloads() -> dict[str, Workload]:
    try:
        workloads, broken = load_workloads()
    except WorkloadError as error:
        raise _refused(error) from error
    for point, reason in broken.items():
        typer.echo(f"workloads of {point} do not load: {reason}", err=True)
    return workloads


def _chosen(only: list[str] | None) -> dict[str, Workload]:
    """The workloads asked for, and anchors."""
    workloads = _workloads()
    unknown = sorted(set(only or ()) - workloads.keys())
    if unknown:
        raise ValueError(f"workload: expected one of {sorted(workloads)}, got {unknown[0]!r}")
    return {name: w for name, w in workloads.items() if not only or name in only or name.startswith("dense.")}


def _known(out: Path | None, machine: dict[str, str]) -> list[Row]:
    """Rows of a file that is gone on with: measured on this machine, with this code.

    Raises:
        ValueError: they were not, it is no such file, or cannot be written.
        OSError: it cannot be read.
    """
    if out is None:
        return []
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"out: expected a file in a folder that is there, got {str(out)!r}")
    try:
        schema.check_writable(out)
    except OSError as error:
        raise ValueError(f"out: expected a file that can be written, got {str(out)!r}: {error.strerror}") from None
    if not out.exists():
        return []
    rows = schema.read(out)  # what is no such table is not written over, whatever the commit
    if machine["commit"].endswith("+"):  # who knows which changes
        typer.echo(f"{out}: measured anew, since the code has changes that are in no commit", err=True)
        return []
    here = tuple(machine[name] for name in PROVENANCE)
    for row in rows:
        if row.provenance != here:
            before, now = next((a, b) for a, b in zip(row.provenance, here, strict=True) if a != b)
            raise ValueError(f"out: expected rows of this machine and code, got {before!r} instead of {now!r} in {out}")
    return rows


def _merged(known: list[Row], rows: list[Row]) -> list[Row]:
    """Rows of before, in their order, renewed where they were measured again; then the others."""
    renewed = {row.identity: row for row in known} | {row.identity: row for row in rows}
    return list(renewed.values())


def _refused(error: Exception) -> typer.Exit:
    typer.echo(f"nsa-bench: {error}", err=True)
    return typer.Exit(2)
