"""Which figures files give, and how they are called."""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from nsa_bench.plotting.history import MetricError, history_figure
from nsa_bench.plotting.reads import reads_figure
from nsa_bench.plotting.roofline import roofline_figure
from nsa_bench.plotting.style import settings
from nsa_bench.plotting.times import branches_figure, time_figure
from nsa_bench.schema import Row

__all__ = ["MetricError", "draw"]

OF_ONE_FILE: dict[str, tuple[Callable[[str, Sequence[Row]], Figure | None], str]] = {
    "time": (time_figure, "no row with a time"),
    "branches": (branches_figure, "no row with times of branches"),
    "roofline": (roofline_figure, "no row with a time, flops, bytes and ceilings"),
    "reads": (reads_figure, "no row with decode reads, batch and calls"),
}


def draw(
    files: Mapping[str, Sequence[Row]], kind: str = "all", metric: str = "speedup"
) -> tuple[list[tuple[str, Figure]], list[str]]:
    """Figures by name, and why some that were asked for have nothing to show.

    Args:
        files: rows by the file's name. Each file, and within it each suite, has figures of its own: STEM-KIND, or
            STEM-SUITE-KIND with several suites. The history is of all files: SUITE-history-METRIC.
        kind: of KINDS, or "all".
        metric: of the history.

    Raises:
        MetricError: there is no such metric.
    """
    drawn: list[tuple[str, Figure]] = []
    nothing = []
    with settings():
        for stem, rows in files.items():
            suites = list(dict.fromkeys(row.suite for row in rows))
            for suite in suites:
                own = [row for row in rows if row.suite == suite]
                for each, (figure_of, missing) in OF_ONE_FILE.items():
                    if kind not in (each, "all"):
                        continue
                    figure = figure_of(suite or stem, own)
                    if figure is None:
                        nothing.append(f"{stem}: nothing to draw for {each}: {missing}")
                    else:
                        drawn.append(("-".join([stem, *([suite] if len(suites) > 1 else []), each]), figure))
        if kind in ("history", "all"):
            for suite in dict.fromkeys(row.suite for rows in files.values() for row in rows):
                runs = {stem: [row for row in rows if row.suite == suite] for stem, rows in files.items()}
                figure = history_figure(suite, {stem: rows for stem, rows in runs.items() if rows}, metric)
                if figure is not None:
                    drawn.append((f"{suite or 'all'}-history-{metric}", figure))
                elif kind == "history":
                    nothing.append(f"{suite}: nothing to draw for history: no measurement with {metric} in two files")
    return drawn, nothing
