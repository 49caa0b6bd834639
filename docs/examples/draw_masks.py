"""Draws the masks of docs/concepts.md, from `nsa_varlen` itself: `hatch run demo:draw`.

A panel is a grid of cells, one row for a query. Cells of one colour are one path of the SVG with an id of its own, so
that a test can read them back from the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import draw_branches
import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MultipleLocator
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from torch import Tensor

IMAGES = File(__file__).parents[1] / "images"
# The default sizes, divided by eight; a window that is no multiple of a block.
BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=8, topk=5, window_size=12)
TOKENS, QUERY, SEED = 64, 58, 121  # QUERY: the one that is looked at closely
LENGTHS, NEW = [24, 9, 63], [1, 3, 1]  # of the ragged batch; its last tokens, decoded

# Okabe and Ito's colours, which people tell apart however they see colours. The words are those of the legend.
COLOURS = {
    "read": "#0072B2",
    "initial block, always read": "#009E73",
    "local blocks, always read": "#E69F00",
    "chosen by score": "#D55E00",
    "in the past, not read": "#DDDDDD",
    "not finished: not visible yet": "#CC79A7",
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


def selection(layout: VarlenLayout, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """block_indices [Tq, 1, topk] and scores [Tq, 1, Nb] by the oracle."""
    k_cmp = reference.compress_mean(k, layout, BLOCKS)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, layout, BLOCKS)
    return (
        reference.select_blocks(q, k_cmp, lse, layout, BLOCKS),
        reference.block_scores(q, k_cmp, lse, layout, BLOCKS),
    )


def by_reason(layout: VarlenLayout, indices: Tensor) -> dict[str, Tensor]:
    """The selected keys [Tq, Tk] by why they are selected, and the past keys that are not."""
    selected = masks.selected_mask(indices, layout, BLOCKS)[:, 0]
    current = layout.positions()[:, None] // BLOCKS.block_size
    block = layout.key_positions() // BLOCKS.block_size
    initial = selected & (block < BLOCKS.init_blocks)
    local = selected & ~initial & (block > current - BLOCKS.local_blocks)
    return {
        "initial block, always read": initial,
        "local blocks, always read": local,
        "chosen by score": selected & ~initial & ~local,
        "in the past, not read": masks.causal_mask(layout) & ~selected,
    }


def in_window(layout: VarlenLayout) -> dict[str, Tensor]:
    """The window [Tq, Tk], and the past keys before it."""
    window = masks.window_mask(layout, BLOCKS)
    return {"read": window, "in the past, not read": masks.causal_mask(layout) & ~window}


def compressed() -> list[Panel | Bars]:
    """Which blocks each query sees, and why not the others."""
    layout = VarlenLayout.from_lengths([TOKENS])
    seen = masks.compressed_mask(layout, BLOCKS)
    blocks, tokens = 12, 26  # of the closer look
    query = 18
    start = layout.compressed_starts(BLOCKS)[:blocks, None]
    token = torch.arange(tokens)
    covered = (token >= start) & (token < start + BLOCKS.kernel_size)
    visible = covered & seen[query, :blocks, None]
    begun = covered & ~visible & (start <= query)
    close = {"read": visible, "not finished: not visible yet": begun, "in the future": covered & ~visible & ~begun}
    return [
        Panel(
            "Compressed: which blocks a query sees", "compressed block", "query", {"read": seen}, (0.6, 0.55, 3.2, 3.9)
        ),
        Panel(
            f"Which tokens the first {blocks} blocks cover: query {query}",
            "token",
            "compressed block",
            close,
            (4.6, 0.55, 4.9, 3.9),
            every=(2, 1),
            lines=([query + 1], []),
        ),
    ]


def selected() -> list[Panel | Bars]:
    """Which keys each query reads, and the scores of one query."""
    layout = VarlenLayout.from_lengths([TOKENS])
    indices, scores = selection(layout, *draw_branches.queries_and_keys(TOKENS, SEED))
    cells = by_reason(layout, indices)
    firsts = range(0, QUERY + 1, BLOCKS.block_size)  # the first key of each block that the query may choose
    why = [next(name for name, mask in cells.items() if mask[QUERY, key]) for key in firsts]
    title = f"Scores of query {QUERY}, block by block"
    borders = list(range(8, TOKENS, 8))
    return [
        Panel(
            f"Selected: {BLOCKS.topk} blocks of {BLOCKS.block_size} keys",
            "key",
            "query",
            cells,
            (0.6, 0.55, 4.4, 4.4),
            lines=(borders, []),
            query=QUERY,
        ),
        Bars(title, scores[QUERY, 0, : len(why)], why, (6.0, 0.55, 3.5, 4.4)),
    ]


def window() -> list[Panel | Bars]:
    """The last keys, the query's own among them."""
    layout = VarlenLayout.from_lengths([TOKENS])
    near = VarlenLayout.from_lengths([22])
    return [
        Panel(f"Window: the last {BLOCKS.window_size} keys", "key", "query", in_window(layout), (0.6, 0.55, 4.0, 4.0)),
        Panel(
            "The first 22 tokens: query 15 reads keys 4 to 15",
            "key",
            "query",
            in_window(near),
            (5.4, 0.55, 4.0, 4.0),
            every=(1, 1),
            query=15,
        ),
    ]


def batch(layout: VarlenLayout, q: Tensor, k: Tensor) -> list[tuple[str, str, dict[str, Tensor]]]:
    """Title, axis and cells of the three branches."""
    seen = masks.compressed_mask(layout, BLOCKS)
    return [
        ("Compressed", "packed compressed block", {"read": seen}),
        ("Selected", "packed key", by_reason(layout, selection(layout, q, k)[0])),
        ("Window", "packed key", in_window(layout)),
    ]


def ragged() -> list[Panel | Bars]:
    """Three sequences in one batch."""
    layout = VarlenLayout.from_lengths(LENGTHS)
    rows = layout.cu_seqlens_q[1:-1].tolist()
    blocks = layout.compressed(BLOCKS).cu_seqlens[1:-1].tolist()
    found = batch(layout, *draw_branches.queries_and_keys(sum(LENGTHS), SEED))
    return [
        Panel(
            title,
            across,
            "packed query" if not number else "",
            cells,
            (0.6 + 3.1 * number, 0.55, 2.75, 2.75),
            every=(16, 16),
            lines=(rows if across == "packed key" else blocks, rows),
        )
        for number, (title, across, cells) in enumerate(found)
    ]


def decode() -> list[Panel | Bars]:
    """The same sequences, their last tokens alone as queries."""
    layout = VarlenLayout.from_lengths(NEW, LENGTHS)
    q, k = draw_branches.queries_and_keys(sum(LENGTHS), SEED)
    whole = VarlenLayout.from_lengths(LENGTHS)
    last = torch.cat([torch.arange(end - n, end) for n, end in zip(NEW, whole.cu_seqlens_q[1:].tolist(), strict=True)])
    rows = layout.cu_seqlens_q[1:-1].tolist()
    keys = layout.cu_seqlens_k[1:-1].tolist()
    blocks = layout.compressed(BLOCKS).cu_seqlens[1:-1].tolist()
    sequence = layout.sequence_of_queries().tolist()
    names = [f"sequence {s}, t = {t}" for s, t in zip(sequence, layout.positions().tolist(), strict=True)]
    return [
        Panel(
            title,
            across,
            "",
            cells,
            (1.5, 3.95 - 1.7 * number, 8.0, 0.95),
            every=(8, 1),
            lines=(keys if across == "packed key" else blocks, rows),
            rows=names,
        )
        for number, (title, across, cells) in enumerate(batch(layout, q[last], k))
    ]


FIGURES = {
    "mask-compressed": (compressed, (9.7, 5.0)),
    "mask-selected": (selected, (9.7, 5.5)),
    "mask-window": (window, (9.7, 5.1)),
    "mask-ragged": (ragged, (9.7, 3.95)),
    "mask-decode": (decode, (9.7, 5.6)),
}


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


def draw(name: str) -> Figure:
    """One of FIGURES."""
    make, size = FIGURES[name]
    with matplotlib.style.context(["default", SETTINGS]):
        figure, parts = Figure(figsize=size), make()
        for number, part in enumerate(parts):
            if isinstance(part, Panel):
                draw_panel(figure, number, part)
            else:
                draw_bars(figure, part)
        names = dict.fromkeys(name for part in parts if isinstance(part, Panel) for name in part.cells)
        handles = [Patch(label=name, **{"edgecolor": "none"} | colour(name)) for name in names]
        figure.legend(handles=handles, loc="upper left", ncols=5, frameon=False, fontsize=8.5, columnspacing=1.5)
        return figure


def main(folder: File = IMAGES) -> None:
    """Write all figures."""
    folder.mkdir(exist_ok=True)
    for name in FIGURES:
        with matplotlib.style.context(["default", SETTINGS]):
            draw(name).savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, facecolor="white")


if __name__ == "__main__":
    main()
