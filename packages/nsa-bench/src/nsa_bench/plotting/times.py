"""Time against context length: of calls, a line for each workload and backend; and of the branches within them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa_bench.measurements import by_series, device_words, is_timed, labels
from nsa_bench.plotting.style import GREYS, MARGIN, NARROW, PANEL, Look, in_rows, lengths_axis, log_axis, looks, page
from nsa_bench.schema import Row

COLUMNS = 3  # of panels of branches
SHAPE = ("batch", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "dtype")
CLOCK_WORDS = {"graph": "CUDA graph", "events": "CUDA events", "host": "called from Python"}
PARTS = {
    "ms_total": ("whole call", Look(GREYS[0], "o", "-")),
    "ms_cmp": ("compressed", Look("#0072B2", "s", "-")),
    "ms_sel": ("selected", Look("#D55E00", "^", "-")),
    "ms_win": ("window", Look("#009E73", "D", "-")),
    "ms_slc_win": ("selected + window, fused", Look("#CC79A7", "v", "-")),
    "ms_choice": ("choice of blocks", Look("#E69F00", "P", (0, (5, 1.5)))),
    "ms_compress": ("pooling of k and v", Look("#56B4E9", "X", (0, (1, 1.2)))),
    "ms_combine": ("sum by gates", Look("#8C510A", "*", (0, (5, 1.5, 1, 1.5)))),
}


def time_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """Medians with quartiles: a row of panels for each clock, a column for each shape. None without a time.

    Shapes that were measured at one length have narrow columns, in which variants stand side by side.
    """
    timed = [row for row in rows if is_timed(row)]
    if not timed:
        return None
    called = dict(zip(map(id, rows), labels(rows), strict=True))
    clocks, shapes = _values(timed, lambda row: row.clock), _values(timed, _shape)
    shapes.sort(key=lambda shape: -len({row.S for row in timed if _shape(row) == shape}))  # curves before points
    lengths = [sorted({row.S for row in timed if _shape(row) == shape}) for shape in shapes]
    entries = looks(_anchors_last(called[id(row)] for row in timed))
    places = {label: (number + 1) / (len(entries) + 1) for number, label in enumerate(entries)}
    words = [_shape_words(next(row for row in timed if _shape(row) == shape), timed) for shape in shapes]
    drawn = page(
        f"{name}: time of a call by context length",
        [device_words(timed), f"{_common(timed)}median, bars from first to third quartile"],
        entries,
        [
            [", ".join(filter(None, [CLOCK_WORDS.get(clock, clock), words[0]])), *words[1:]]  # once for each row
            for clock in clocks
        ],
        [PANEL if len(each) > 1 else NARROW for each in lengths],
    )
    for clock, panels in zip(clocks, drawn.panels, strict=True):
        for shape, each, axes in zip(shapes, lengths, panels, strict=True):
            for line in by_series(row for row in timed if row.clock == clock and _shape(row) == shape):
                label = called[id(line[0])]
                beside = MARGIN ** (2 * places[label] - 1) if len(each) == 1 else 1
                _bars(axes, line, beside, label=label, **entries[label].line())
            lengths_axis(axes, each)
            axes.set_xlabel("context length S, tokens" if len(each) > 1 else "S")
        panels[0].set_ylabel("ms")
    log_axis(drawn.panels[0][0], [t for row in timed for t in (row.p25_ms, row.ms_total, row.p75_ms) if t])
    return drawn.figure


def branches_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """What branches take of a call: a panel for each series that has them. None where no row does.

    Parts are timed on their own, so their sum need not be the whole. Series of one length are left out where there are
    longer ones.
    """
    timed = [row for row in rows if is_timed(row) and any(getattr(row, part) for part in list(PARTS)[1:])]
    called = dict(zip(map(id, rows), labels(rows, clock=True), strict=True))
    series = by_series(timed)
    series = [line for line in series if line[0].S != line[-1].S] or series
    if not series:
        return None
    shown = [part for part in PARTS if any(getattr(row, part) for line in series for row in line)]
    titles = [", ".join(filter(None, [called[id(line[0])], _shape_words(line[0], timed)])) for line in series]
    drawn = page(
        f"{name}: time of the branches by context length",
        [device_words(timed), f"{_common(timed)}medians; parts overlap, so they need not sum up to the whole call"],
        {PARTS[part][0]: PARTS[part][1] for part in shown},
        in_rows(titles, COLUMNS),
        [PANEL] * min(COLUMNS, len(series)),
    )
    times = []
    for axes, line in zip(drawn.all_panels, series, strict=True):
        for part in shown:
            points = [(row.S, ms) for row in line if (ms := getattr(row, part))]
            times += [ms for _, ms in points]
            if points:
                axes.plot(*zip(*points, strict=True), label=PARTS[part][0], **PARTS[part][1].line())
        lengths_axis(axes, [row.S for row in line])
        axes.set_xlabel("context length S, tokens")
    for panels in drawn.panels:
        panels[0].set_ylabel("ms")
    log_axis(drawn.all_panels[0], times)
    return drawn.figure


def _bars(axes: Axes, line: Sequence[Row], beside: float, **look: Any) -> None:
    """A series with its quartiles, at its lengths times `beside`."""
    at = [row.ms_total or 0 for row in line]
    low = [max(0.0, t - (t if row.p25_ms is None else row.p25_ms)) for row, t in zip(line, at, strict=True)]
    high = [max(0.0, (t if row.p75_ms is None else row.p75_ms) - t) for row, t in zip(line, at, strict=True)]
    axes.errorbar([row.S * beside for row in line], at, yerr=[low, high], capsize=2, elinewidth=0.9, **look)


def _values(rows: Sequence[Row], of: Callable[[Row], Any]) -> list[Any]:
    return list(dict.fromkeys(map(of, rows)))


def _shape(row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in SHAPE)


def _anchors_last(names: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(names), key=lambda name: name.startswith("dense."))


SAID: dict[str, Callable[[Row], str]] = {
    "batch": lambda row: f"batch {row.batch}",
    "heads": lambda row: f"{row.num_heads} heads over {row.num_kv_heads}",
    "head_dim": lambda row: (
        f"head dim {row.head_dim}" + (f"/{row.v_head_dim}" if row.v_head_dim not in (None, row.head_dim) else "")
    ),
    "dtype": lambda row: row.dtype,
}


def _common(rows: Sequence[Row]) -> str:
    """What of the shape all rows share, in words."""
    return "".join(f"{say(rows[0])}, " for say in SAID.values() if len(set(map(say, rows))) == 1 and say(rows[0]))


def _shape_words(row: Row, rows: Sequence[Row]) -> str:
    """What of a row's shape the others do not share."""
    return ", ".join(say(row) for say in SAID.values() if len(set(map(say, rows))) > 1)
