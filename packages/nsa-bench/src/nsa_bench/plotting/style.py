"""How figures look: colours, markers, lines, the page with its title and legend, axes of lengths, files without dates.

Colours are those of Okabe and Ito, which people tell apart however they see colours; each series has a marker of its
own too, and dense anchors are grey and dashed. Nothing of pyplot is used and no setting of the reader's matplotlib.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from nsa_bench.measurements import ANCHOR, short_length

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A")  # yellow is too pale for a line
GREYS = ("#222222", "#666666", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
INK, PALE = "#222222", "#6B6B6B"

# Inches: a page is put together from these, so that nothing overlaps whatever the words are.
LEFT, RIGHT, BOTTOM, ABOVE_PANEL, TITLE_LINE = 0.80, 0.20, 0.62, 0.18, 0.16
PANEL, NARROW, HEIGHT = 3.5, 1.1, 2.7
BETWEEN, UNDER, LEGEND = 0.30, 0.55, 0.15  # between columns; under a row; left of the legend
MARGIN = 1.25  # of an axis of lengths, at both ends
TITLE, NOTE, LEAST_WIDTH = 0.42, 0.185, 8.2
NOTE_SIZE, PANEL_TITLE_SIZE = 8, 9.5  # points

SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.titlesize": PANEL_TITLE_SIZE,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelspacing": 0.6,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text: small files, and words that can be searched
    "svg.hashsalt": "nsa-bench",  # ids that do not change from run to run
}


@dataclass(frozen=True)
class Look:
    """How a series is drawn: one that differs from every other by its marker, open or filled, whatever its colour."""

    color: str
    marker: str
    linestyle: Any
    filled: bool = True

    def line(self, **changed: Any) -> dict[str, Any]:
        """Arguments of a matplotlib line."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.linestyle,
            "markerfacecolor": self.color if self.filled else "white",
            "markeredgecolor": self.color,
        } | changed


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """A look for each label, in their order; those of dense anchors grey, dashed and open.

    Example:
        >>> found = looks(["nsa.decode", "dense.decode", "nsa.prefill"])
        >>> [(look.marker, look.filled) for look in found.values()]
        [('o', True), ('s', False), ('^', True)]
    """
    colours, greys = cycle(COLOURS), cycle(GREYS)
    found: dict[str, Look] = {}
    for label in dict.fromkeys(labels):
        anchor = label.startswith(ANCHOR)
        marker, filled = _marker({(look.marker, look.filled) for look in found.values()}, filled=not anchor)
        line = LINES[1] if anchor else LINES[len(found) // len(MARKERS) % len(LINES)]
        found[label] = Look(next(greys if anchor else colours), marker, line, filled)
    return found


def _marker(used: Set[tuple[str, bool]], *, filled: bool) -> tuple[str, bool]:
    """A marker that no series has, if there is one, or the other half of one that another has."""
    fresh = [(marker, filled) for marker in MARKERS if not used & {(marker, True), (marker, False)}]
    either = [(marker, way) for way in (filled, not filled) for marker in MARKERS]
    return next((each for each in [*fresh, *either] if each not in used), either[len(used) % len(MARKERS)])


@contextmanager
def settings() -> Iterator[None]:
    """matplotlib's defaults and ours, for as long as something is drawn or saved."""
    with matplotlib.style.context(["default", SETTINGS]):
        yield


@dataclass(frozen=True)
class Page:
    """A figure with panels in rows and columns."""

    figure: Figure
    panels: tuple[tuple[Axes, ...], ...]

    @property
    def all_panels(self) -> list[Axes]:
        """Row by row."""
        return [axes for row in self.panels for axes in row]


def page(
    title: str,
    notes: Sequence[str],
    entries: Mapping[str, Look],
    titles: Sequence[Sequence[str]],
    widths: Sequence[float],
) -> Page:
    """An empty page: title, notes under it, panels that share their y axis, the legend to their right.

    Args:
        notes: what was measured, and on what.
        entries: the legend.
        titles: of the panels, by rows; a row that is shorter than the first has fewer panels.
        widths: of the columns of panels, in inches; all are stretched where the page would be too narrow.

    Words that are too long for their place are wrapped.
    """
    figure = Figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    legend = figure.legend(
        handles=[Line2D([], [], label=label, **look.line()) for label, look in entries.items()],
        loc="upper left",
        borderaxespad=0,
        handlelength=3.2,
    )
    beside = legend.get_window_extent().width / figure.dpi + LEGEND
    gaps = BETWEEN * (len(widths) - 1)
    stretch = max(1.0, (LEAST_WIDTH - LEFT - RIGHT - beside - gaps) / sum(widths))
    widths = [width * stretch for width in widths]
    width = LEFT + sum(widths) + gaps + RIGHT + beside
    wrapped = [line.strip("· ") for note in notes for line in _wrap(renderer, note, width - 0.4, NOTE_SIZE)]
    broken = [
        [_wrap(renderer, each, wide + BETWEEN / 2, PANEL_TITLE_SIZE) for each, wide in zip(row, widths, strict=False)]
        for row in titles
    ]
    above = [ABOVE_PANEL + TITLE_LINE * max(map(len, row)) for row in broken]
    top = TITLE + NOTE * len(wrapped)
    height = top + sum(above) + HEIGHT * len(titles) + UNDER * (len(titles) - 1) + BOTTOM
    figure.set_size_inches(width, height)
    figure.text(0.2 / width, 1 - 0.15 / height, title, va="top", size=12, weight="bold", color=INK)
    for number, line in enumerate(wrapped):
        figure.text(0.2 / width, 1 - (TITLE + NOTE * number) / height, line, va="top", size=NOTE_SIZE, color=PALE)
    legend.set_bbox_to_anchor((1 - (RIGHT + beside - LEGEND) / width, 1 - (top + above[0]) / height))
    panels: list[tuple[Axes, ...]] = []
    bottom, first = height - top, None
    for row, over in zip(broken, above, strict=True):
        bottom -= over + HEIGHT
        left = LEFT
        made: list[Axes] = []
        for lines, wide in zip(row, widths, strict=False):
            axes = figure.add_axes((left / width, bottom / height, wide / width, HEIGHT / height), sharey=first)
            axes.set_title("\n".join(lines), loc="left")
            axes.tick_params(labelleft=not made)
            first = first or axes
            made.append(axes)
            left += wide + BETWEEN
        panels.append(tuple(made))
        bottom -= UNDER
    return Page(figure, tuple(panels))


def _wrap(renderer: RendererAgg, text: str, width: float, size: float) -> list[str]:
    """Lines of at most so many inches, broken at blanks; a word that is longer stays whole."""
    font = FontProperties(family=SETTINGS["font.family"], size=size)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        fits = renderer.get_text_width_height_descent(longer, font, False)[0] <= width * renderer.dpi
        lines[-1:] = [longer] if fits or not lines else [lines[-1], word]
    return lines


def in_rows(titles: Sequence[str], columns: int) -> list[Sequence[str]]:
    """Titles of panels, so many in a row.

    Example:
        >>> in_rows(["a", "b", "c"], 2)
        [['a', 'b'], ['c']]
    """
    return [titles[start : start + columns] for start in range(0, len(titles), columns)]


def lengths_axis(axes: Axes, lengths: Iterable[float], which: str = "x") -> None:
    """An axis of numbers of tokens, by powers of two, as people say them."""
    lengths = sorted(set(lengths))
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=2)
    low, high = math.floor(math.log2(lengths[0])), math.ceil(math.log2(lengths[-1]))
    step = max(1, math.ceil((high - low) / 7))
    ticks = [2.0**power for power in range(low, high + 1, step)] if len(lengths) > 1 else lengths
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_length(round(value))))
    (axes.set_xlim if which == "x" else axes.set_ylim)(lengths[0] / MARGIN, lengths[-1] * MARGIN)


def log_axis(axes: Axes, values: Iterable[float], which: str = "y") -> None:
    """A logarithmic axis that names its steps in plain numbers.

    1, 2, 5 of each decade, or fewer if there are many; where there is no decade, even steps.
    """
    values = sorted(value for value in values if 0 < value < math.inf)
    axis = axes.yaxis if which == "y" else axes.xaxis
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    low, high = values[0] / 1.3, values[-1] * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    even = [float(tick) for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)]
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        known = even if high < 3 * low else [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in known if low <= tick <= high]
        if len(ticks) <= 8:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    (axes.set_ylim if which == "y" else axes.set_xlim)(low, high)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as its suffix says. The same figure gives the same bytes: files carry no date and no version.

    Raises:
        OSError: it cannot be written there.
    """
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    with settings():
        figure.savefig(path, metadata=metadata, facecolor="white")
