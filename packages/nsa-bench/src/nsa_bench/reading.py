"""The commands that read: `nsa-bench summarize` and `nsa-bench plot`.

Exit status: 0; 1 where a trend is broken or a ratio regressed, with --strict also where nothing can be said of a trend;
2 for files that cannot be read and for wrong options.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa_bench import schema
from nsa_bench.measurements import device_words, is_timed, numbered, on_cpu
from nsa_bench.plotting import FORMATS, KINDS
from nsa_bench.regressions import FAILURES, compare
from nsa_bench.schema import Row, SchemaError
from nsa_bench.suite import SuiteError, load_suite
from nsa_bench.summary import cells, headings, markdown, summarise
from nsa_bench.trends import TrendError, Verdict, ask, parse_trend

TEXT_FORMATS = ("text", "markdown")
WIDEST = 120  # characters that a last column of words may have before it is wrapped
Columns = Sequence[str]
Lines = Sequence[Sequence[str]]


def _choice(values: Sequence[str]) -> Callable[[str], str]:
    """A parser for an option that takes one of `values`."""

    def parse(value: str) -> str:
        if value not in values:
            raise typer.BadParameter(f"expected one of {', '.join(values)}, got {value!r}")
        return value

    return parse


Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="What `nsa-bench run` wrote.")]
Where = Annotated[list[str] | None, typer.Option("--where", metavar="COLUMN=VALUE", help="Only such rows; repeatable.")]


def summarize(
    files: Files,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE", help="An earlier file: fail where a ratio to dense attention grew."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", metavar="SUITE", help="Whose trends: a name or a .toml file.  [default: the rows']"),
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", parser=_choice(TEXT_FORMATS), metavar="FORMAT", help=f"{' or '.join(TEXT_FORMATS)}."),
    ] = "text",
    strict: Annotated[bool, typer.Option("--strict", help="Fail where nothing can be said of a trend.")] = False,
    where: Where = None,
) -> None:
    """Times beside dense attention, reads beside the budget, the share of the floor; whether trends hold.

    Exit status 1 if a trend is broken, or a ratio regressed beyond its noise.
    """
    tables = {path: _rows(path, where) for path in files}
    old = None if baseline is None else _rows(baseline, where, "'--baseline'")
    failures, show = 0, _shown(form)
    for path, rows in tables.items():
        lines = summarise(rows)
        show(str(path), headings(lines), *cells(lines))
    for path, rows in tables.items():
        verdicts, unknown = _verdicts(rows, suite)
        broken = sum(verdict.holds is False for verdict in verdicts)
        # A trend is unsaid as a whole: `ask` leaves out series of which there is nothing to say if it can.
        unsaid = len({id(verdict.trend) for verdict in verdicts if verdict.holds is None}) + len(unknown)
        failures += broken + unsaid * strict
        said = [f"{broken} of {len(verdicts)} broken" if verdicts else "no trend declared"]
        words = {True: "holds", False: "BROKEN", None: "unsaid"}
        table = [(words[verdict.holds], str(verdict.trend), verdict.subject, verdict.words) for verdict in verdicts]
        show(f"trends of {path}", [*unknown, *said], ("", "trend", "of", "what was found"), table)
    if old is not None:
        comparisons = compare(_pooled(tables), old)
        failed = [comparison for comparison in comparisons if comparison.outcome in FAILURES]
        failures += len(failed)
        outcomes = [comparison.outcome for comparison in comparisons]
        counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)]
        changed = [(found.outcome, found.subject, found.words) for found in comparisons if found.outcome != "same"]
        facts = [f"baseline: {device_words(old)}", ", ".join(counts)]
        show(f"against {baseline}", facts, ("", "measurement", "what was found"), changed)
    if failures:
        typer.echo(f"nsa-bench: {failures} {'failure' if failures == 1 else 'failures'}", err=True)
        raise typer.Exit(1)


def plot(
    files: Files,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Made if it is not there.")] = Path(),
    kind: Annotated[
        str,
        typer.Option("--kind", parser=_choice((*KINDS, "all")), metavar="KIND", help=f"{', '.join(KINDS)}, or all."),
    ] = "all",
    metric: Annotated[
        str, typer.Option("--metric", metavar="COLUMN", help="Of history: speedup, or a column of numbers.")
    ] = "speedup",
    form: Annotated[
        str, typer.Option("--format", parser=_choice(FORMATS), metavar="FORMAT", help=f"{' or '.join(FORMATS)}.")
    ] = "png",
    where: Where = None,
) -> None:
    """Times, branches, roofline and decode reads of each file; the history of a metric over several.

    A kind of which the files have nothing to show is named, and fails where it was asked for by name.
    """
    from nsa_bench.plotting.figures import MetricError, draw
    from nsa_bench.plotting.style import save

    tables = {path: _rows(path, where) for path in files}
    stems: dict[str, Path] = {}
    for path in tables:
        if stems.setdefault(path.stem, path) != path:
            message = f"{path}: expected another name than that of {stems[path.stem]}: plots are named after files"
            raise typer.BadParameter(message, param_hint="'FILE...'")
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn, nothing = draw({path.stem: rows for path, rows in tables.items()}, kind, metric)
        for name, figure in drawn:
            path = out / f"{name}.{form}"
            save(figure, path)
            typer.echo(f"wrote {path}")
    except MetricError as error:
        raise typer.BadParameter(str(error), param_hint="'--metric'") from None
    except OSError as error:
        raise typer.BadParameter(f"expected a folder that can be written, got {error}", param_hint="'--out'") from None
    for reason in nothing:
        typer.echo(f"nsa-bench: {reason}", err=True)
    if nothing and kind != "all" and not drawn:
        raise typer.Exit(2)


def _conditions(where: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in where or ():
        column, sign, wanted = text.partition("=")
        if not sign or column not in schema.COLUMNS:
            message = f"expected COLUMN=VALUE, a column of the files, got {text!r}"
            raise typer.BadParameter(message, param_hint="'--where'")
        pairs.append((column, wanted))
    return pairs


def _rows(path: Path, where: Sequence[str] | None, hint: str = "'FILE...'") -> list[Row]:
    """The rows of a file that meet every condition; some of them must have a time."""
    conditions = _conditions(where)
    try:
        rows = schema.read(path)
    except SchemaError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise typer.BadParameter(f"{path}: expected a CSV file, got: {reason}", param_hint=hint) from None
    found = [row for row in rows if all(_text(getattr(row, column)) == wanted for column, wanted in conditions)]
    if not any(map(is_timed, found)):
        such = f"{len(rows)} rows" if not where else f"{len(found)} such rows of {len(rows)}"
        first = next((f", the first: {row.status}" for row in found), "")
        raise typer.BadParameter(f"{path}: expected rows with a time, got {such}{first}", param_hint=hint)
    return found


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _verdicts(rows: Sequence[Row], named: str | None) -> tuple[list[Verdict], list[str]]:
    """Verdicts of the trends of one suite that was named, or of each that rows name; and which of these are unknown."""
    verdicts, unknown = [], []
    for name in dict.fromkeys(row.suite for row in rows):
        try:
            suite = load_suite(named or name)
            trends = [parse_trend(table) for table in suite.trends]
        except SuiteError as error:
            if named is not None:
                raise typer.BadParameter(str(error), param_hint="'--suite'") from None
            unknown.append(f"suite {name!r} is not a shipped one: --suite FILE says where its trends are")
            continue
        except TrendError as error:
            raise typer.BadParameter(f"{named or name}: {error}", param_hint="'--suite'") from None
        own = [row for row in rows if row.suite == name]
        devices = {"cpu" if on_cpu(row) else "cuda" for row in own}
        trends = [trend for trend in trends if trend.device in ("", *devices)]
        verdicts += [verdict for trend in trends for verdict in ask(trend, own)]
    return verdicts, unknown


def _pooled(tables: dict[Path, list[Row]]) -> list[Row]:
    """The rows of all files. A measurement that two of them have could not be told from itself."""
    holders: dict[Any, Path] = {}
    for path, rows in tables.items():
        for key in numbered(rows):
            if key in holders:
                message = f"{path}: expected other measurements than those of {holders[key]}, got one of them again"
                raise typer.BadParameter(message, param_hint="'FILE...'")
        holders |= dict.fromkeys(numbered(rows), path)
    return [row for rows in tables.values() for row in rows]


def _shown(form: str) -> Callable[[str, Sequence[str], Columns, Lines], None]:
    """What prints a title, facts and a table in the format that was asked for."""
    if form == "markdown":

        def show(title: str, facts: Sequence[str], columns: Columns, lines: Lines) -> None:
            typer.echo(f"## {title}\n")
            typer.echo("".join(f"{fact}\n\n" for fact in facts), nl=False)
            if lines:
                typer.echo(f"{markdown(columns, lines)}\n")

    else:

        def show(title: str, facts: Sequence[str], columns: Columns, lines: Lines) -> None:
            typer.echo("\n".join([title, *facts]))
            if lines:
                typer.echo(_rendered(columns, lines))
            typer.echo("")

    return show


def _rendered(columns: Columns, lines: Lines) -> str:
    """As wide as its cells, whatever the terminal: a number that is cut off is worse than a long line."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    numbers = ("S", "batch", "ms", "spread", "speed-up", "reads", "of budget", "of floor")
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True, justify="right" if column in numbers else "left")
    table.add_column(columns[-1], overflow="fold", max_width=WIDEST)
    styles = dict.fromkeys(("holds", "improved"), "green") | dict.fromkeys(("BROKEN", *FAILURES), "bold red")
    for line in lines:
        table.add_row(*(Text(cell, styles.get(cell, "")) for cell in line))
    console = Console(highlight=False, markup=False)
    console.width = max(console.measure(table, options=console.options.update(width=1000)).maximum, 20)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())  # cells are padded to their width
