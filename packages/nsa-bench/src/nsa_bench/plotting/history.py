"""A metric over commits: the same measurements in several files, ordered by date."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from matplotlib.figure import Figure

from nsa_bench.measurements import (
    anchors_for,
    device_words,
    error,
    fastest,
    is_anchor,
    is_timed,
    labels,
    numbered,
    short_commit,
    short_length,
)
from nsa_bench.plotting.style import GREYS, LINES, PANEL, in_rows, log_axis, looks, page
from nsa_bench.schema import IDENTITY, Row

COLUMNS, TICKS = 3, 5  # panels in a row; commits that have room under a panel
SPEEDUP = "speedup"
UNITS = {SPEEDUP: "times as fast as dense", "floor_ms": "ms"}
_HINTS = get_type_hints(Row)
_NUMBERS = [name for name, hint in _HINTS.items() if {int, float} & set(get_args(hint))]
METRICS = (SPEEDUP, *(name for name in _NUMBERS if name not in IDENTITY))


class MetricError(ValueError):
    """No column of numbers."""


def history_figure(name: str, files: Mapping[str, Sequence[Row]], metric: str = SPEEDUP) -> Figure | None:
    """A panel for each variant, a line for each length and batch. None unless some measurement is in two files.

    Raises:
        MetricError: there is no such metric.
    """
    if metric not in METRICS:
        raise MetricError(f"expected one of {', '.join(METRICS)}, got {metric!r}")
    runs = sorted(files.values(), key=lambda rows: (min(row.date for row in rows), rows[0].commit))
    values: dict[Any, dict[int, tuple[float, float]]] = defaultdict(dict)
    latest: dict[Any, Row] = {}
    titles: dict[Any, str] = {}
    for number, rows in enumerate(runs):
        for (key, row), label in zip(numbered(rows).items(), labels(rows, clock=True), strict=True):
            value = _value(row, rows, metric)
            if value is not None and not (metric == SPEEDUP and is_anchor(row)):
                values[key][number] = value
                latest[key], titles[key] = row, label
    kept = [key for key in values if len(values[key]) > 1]
    if not kept:
        return None
    panels = list(dict.fromkeys(titles[key] for key in kept))
    batches = len({row.batch for row in map(latest.__getitem__, kept)}) > 1
    kept.sort(key=lambda key: (latest[key].batch or 0, latest[key].S))
    names = {
        key: f"S {short_length(latest[key].S)}" + (f", batch {latest[key].batch}" if batches else "") for key in kept
    }
    entries = looks(names.values())
    what = {SPEEDUP: "speed-up over dense attention"}.get(metric, metric)
    note = "bars: one standard error" + ("; dotted: dense attention" if metric == SPEEDUP else "")
    drawn = page(
        f"{name}: {what} by commit",
        [device_words([row for rows in runs for row in rows]), note],
        entries,
        in_rows(panels, COLUMNS),
        [PANEL] * min(COLUMNS, len(panels)),
    )
    step = -(-len(runs) // TICKS)
    for axes, title in zip(drawn.all_panels, panels, strict=True):
        if metric == SPEEDUP:
            axes.axhline(1, color=GREYS[1], linewidth=1, linestyle=LINES[2], zorder=1)
        for key in (key for key in kept if titles[key] == title):
            at = sorted(values[key])
            y, bars = zip(*(values[key][number] for number in at), strict=True)
            axes.errorbar(at, y, yerr=bars, capsize=2, elinewidth=0.9, label=names[key], **entries[names[key]].line())
        axes.set_xticks(range(0, len(runs), step), [_commit(rows) for rows in runs[::step]])
        axes.set_xlim(-0.4, len(runs) - 0.6)
    log_axis(drawn.all_panels[0], [value for key in kept for value, _ in values[key].values()])
    for line in drawn.panels:
        line[0].set_ylabel(UNITS.get(metric, "ms" if metric.endswith("_ms") or metric.startswith("ms_") else metric))
    return drawn.figure


def _value(row: Row, rows: Sequence[Row], metric: str) -> tuple[float, float] | None:
    """(value, one standard error, 0 where it is not known)."""
    noise = error(row) or 0.0
    if metric == SPEEDUP:
        dense = fastest(row, anchors_for(row.workload, rows)) if is_timed(row) else None
        if dense is None or dense.ms_total is None or row.ms_total is None:
            return None
        return dense.ms_total / row.ms_total, dense.ms_total / row.ms_total * math.hypot(noise, error(dense) or 0.0)
    value = getattr(row, metric)
    return None if not value or value < 0 else (float(value), value * noise if metric == "ms_total" else 0.0)


def _commit(rows: Sequence[Row]) -> str:
    commits = {short_commit(row.commit, 7) for row in rows if row.commit} or {"no commit"}
    return f"{min(commits)}{'…' if len(commits) > 1 else ''}\n{min(row.date for row in rows)[5:10]}"
