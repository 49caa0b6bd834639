"""Figures of cells and bars for the pages, as SVG files that a test can read back.

A panel is a grid of cells, one row for a query. Cells of one colour are one path of the SVG with an id of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MultipleLocator
from torch import Tensor

IMAGES = File(__file__).parents[1] / "images"

# Okabe and Ito's colours, which people tell apart however they see colours. The words are those of the legend.
COLOURS = {
    "read": "#0072B2",
    "initial block, always read": "#009E73",
    "local blocks, always read": "#E69F00",
    "chosen by score": "#D55E00",
    "in the past, not read": "#DDDDDD",
    "not finished: not visible yet": "#CC79A7",
    "phase 0": "#0072B2",
    "phase 1": "#E69F00",
    "phase 2": "#009E73",
    "phase 3": "#CC79A7",
    "chosen by the query": "#D55E00",
    "read once for all of them": "#0072B2",
}
INK = "#222222"
SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "svg.fonttype": "none",  # words stay words
    "svg.hashsalt": "nsa-masks",  # the same drawing gives the same bytes
}


@dataclass(frozen=True)
class Panel:
    """A grid: for each colour the cells [rows, columns] that have it. `at` is left, bottom, width, height in inches."""

    title: str
    across: str
    down: str
    cells: Mapping[str, Tensor]
    at: tuple[float, float, float, float]
    every: tuple[int, int] = (8, 8)  # ticks: columns, rows
    lines: tuple[list[int], list[int]] = ([], [])  # borders after so many columns, rows
    rows: list[str] = field(default_factory=list)  # names of the rows, instead of their numbers
    query: int | None = None  # a row to point at

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = next(iter(self.cells.values())).shape
        return rows, columns


@dataclass(frozen=True)
class Bars:
    """A score for each selection block, with the colour of why it is read."""

    title: str
    scores: Tensor
    why: list[str]
    at: tuple[float, float, float, float]


# What makes the parts of a figure, and its size in inches.
Figures = dict[str, tuple[Callable[[], list[Panel | Bars]], tuple[float, float]]]


def outline(mask: Tensor) -> Path:
    """One rectangle for each run of cells in a row, x to the right and y downwards."""
    vertices: list[tuple[int, int]] = []
    for y, row in enumerate(mask.int()):
        edges = torch.nn.functional.pad(row, (1, 1)).diff().nonzero()[:, 0].tolist()
        for left, right in zip(edges[::2], edges[1::2], strict=True):
            vertices += [(left, y), (right, y), (right, y + 1), (left, y + 1), (left, y)]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(vertices) // 5)
    return Path(vertices, codes) if vertices else Path([(0, 0)], [Path.MOVETO])


def colour(name: str) -> dict[str, Any]:
    """How cells of this name look; what is not there yet has no colour, but a border."""
    return {"facecolor": COLOURS[name]} if name in COLOURS else {"facecolor": "#F6F6F6", "edgecolor": "#999999"}


def draw_panel(figure: Figure, number: int, panel: Panel) -> None:
    """A grid of cells with everything around it."""
    width, height = figure.get_size_inches()
    left, bottom, wide, high = panel.at
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.patch.set_gid(f"frame-{number}")
    rows, columns = panel.shape
    axes.set(xlim=(0, columns), ylim=(rows, 0), title=panel.title, xlabel=panel.across, ylabel=panel.down)
    for name, mask in panel.cells.items():
        patch = PathPatch(outline(mask), **{"linewidth": 0.6, "edgecolor": "none"} | colour(name))
        patch.set_gid(f"cells-{number}-{name.replace(' ', '_')}")
        axes.add_patch(patch)
    for borders, draw in zip(panel.lines, (axes.axvline, axes.axhline), strict=True):
        for border in borders:
            draw(border, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
    for axis, every, count in ((axes.xaxis, panel.every[0], columns), (axes.yaxis, panel.every[1], rows)):
        numbers = range(0, count, every)
        axis.set_ticks([n + 0.5 for n in numbers], [str(n) for n in numbers])
    if panel.rows:
        axes.set_yticks([n + 0.5 for n in range(rows)], panel.rows)
    if panel.query is not None:
        axes.axhspan(panel.query, panel.query + 1, fill=False, edgecolor=INK, linewidth=1.4)
    axes.tick_params(length=2, labelsize=8)


def draw_bars(figure: Figure, bars: Bars) -> None:
    """A horizontal bar for each block."""
    width, height = figure.get_size_inches()
    left, bottom, wide, high = bars.at
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.barh(range(len(bars.why)), bars.scores.tolist(), color=[COLOURS[name] for name in bars.why], height=0.7)
    for block, score in enumerate(bars.scores.tolist()):
        axes.text(score + 0.02, block, f"{score:.2f}", va="center", color=INK)
    axes.set(title=bars.title, xlabel="score: attention to the blocks it overlaps", ylabel="selection block")
    axes.set(ylim=(len(bars.why) - 0.4, -0.6), xlim=(0, 1.18 * bars.scores.max().item()))
    axes.yaxis.set_major_locator(MultipleLocator(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2, labelsize=8)


def draw(parts: list[Panel | Bars], size: tuple[float, float]) -> Figure:
    """All parts on one page, under one legend."""
    figure = Figure(figsize=size)
    for number, part in enumerate(parts):
        if isinstance(part, Panel):
            draw_panel(figure, number, part)
        else:
            draw_bars(figure, part)
    names = dict.fromkeys(name for part in parts if isinstance(part, Panel) for name in part.cells)
    handles = [Patch(label=name, **{"edgecolor": "none"} | colour(name)) for name in names]
    figure.legend(handles=handles, loc="upper left", ncols=5, frameon=False, fontsize=8.5, columnspacing=1.5)
    return figure


def write(figures: Figures, folder: File = IMAGES) -> None:
    """Draw all figures into a folder. The same figures give the same bytes."""
    folder.mkdir(exist_ok=True)
    with matplotlib.style.context(["default", SETTINGS]):
        for name, (make, size) in figures.items():
            draw(make(), size).savefig(
                folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, facecolor="white"
            )
