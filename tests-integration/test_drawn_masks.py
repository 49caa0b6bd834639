"""Are the pictures of docs/concepts.md and docs/kernels.md true: what the oracle reads, and what the script draws?

Cells are read back from the files, so that another matplotlib may write them differently.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import draw_branches
import draw_kernels
import draw_masks
import drawing
import pytest
import torch
from draw_masks import BLOCKS, LENGTHS, NEW, SEED, TOKENS
from drawing import IMAGES, Panel
from nsa_varlen import VarlenLayout, reference
from torch import Tensor

FIGURES = draw_masks.FIGURES | draw_kernels.FIGURES
UNREAD = "in the past, not read"
SVG = "{http://www.w3.org/2000/svg}"


class Drawn(NamedTuple):
    """What a file shows: for each panel the cells by colour, and all its words."""

    cells: dict[int, dict[str, Tensor]]
    words: list[str]


def boxes(path: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of each closed outline of an SVG path."""
    found = []
    for outline in path.split("M")[1:]:
        numbers = [float(x) for x in re.findall(r"-?[\d.]+(?:e-?\d+)?", outline)]
        x, y = numbers[::2], numbers[1::2]
        found.append((min(x), min(y), max(x), max(y)))
    return found


def read_back(file: Path, panels: list[Panel]) -> Drawn:
    root = ElementTree.parse(file).getroot()
    paths = {
        group.get("id", ""): "".join(path.get("d", "") for path in group.iter(f"{SVG}path"))
        for group in root.iter(f"{SVG}g")
        if re.match("frame-|cells-", group.get("id", ""))
    }
    cells = {}
    for number, panel in enumerate(panels):
        (frame,) = boxes(paths[f"frame-{number}"])
        rows, columns = panel.shape
        cells[number] = {}
        for name in panel.cells:
            mask = torch.zeros(rows, columns, dtype=torch.bool)
            for left, top, right, bottom in boxes(paths[f"cells-{number}-{name.replace(' ', '_')}"]):
                x = [round((each - frame[0]) / (frame[2] - frame[0]) * columns) for each in (left, right)]
                y = [round((each - frame[1]) / (frame[3] - frame[1]) * rows) for each in (top, bottom)]
                mask[slice(*y), slice(*x)] = True
            cells[number][name] = mask
    return Drawn(cells, ["".join(text.itertext()) for text in root.iter(f"{SVG}text")])


def panels_of(name: str) -> list[Panel]:
    return [part for part in FIGURES[name][0]() if isinstance(part, Panel)]


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    drawing.write(FIGURES, folder)
    return folder


@pytest.mark.parametrize("name", FIGURES)
def test_the_committed_picture_is_what_the_script_draws(name: str, redrawn: Path) -> None:
    panels = panels_of(name)
    committed, new = (read_back(folder / f"{name}.svg", panels) for folder in (IMAGES, redrawn))
    assert committed.words == new.words
    assert len(committed.words) > 20
    for number, panel in enumerate(panels):
        for colour, cells in panel.cells.items():
            assert torch.equal(committed.cells[number][colour], cells), (number, colour)
            assert torch.equal(new.cells[number][colour], cells), (number, colour)


def weights(attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, *rest: object) -> Tensor:
    """What the oracle gives each key [Tq, Tk]: its output, where each key's value names the key."""
    values = torch.eye(len(k))[:, None]
    return attend(q, k, values, *rest)[0][:, 0]


def read_by_the_oracle(layout: VarlenLayout, q: Tensor, k: Tensor) -> list[Tensor]:
    """bool [Tq, keys] of cmp, slc and win: which keys have a weight."""
    k_cmp = reference.compress_mean(k, layout, BLOCKS)
    indices, _ = draw_masks.selection(layout, q, k)
    return [
        weights(reference.compressed_attention, q, k_cmp, layout, BLOCKS) > 0,
        weights(reference.selected_attention, q, k, indices, layout, BLOCKS) > 0,
        weights(reference.window_attention, q, k, layout, BLOCKS) > 0,
    ]


def shown_as_read(panel: Panel) -> Tensor:
    return torch.stack([cells for name, cells in panel.cells.items() if name != UNREAD]).any(0)


def test_one_sequence_is_drawn_as_the_oracle_reads_it() -> None:
    layout = VarlenLayout.from_lengths([TOKENS])
    read = read_by_the_oracle(layout, *draw_branches.queries_and_keys(TOKENS, SEED))
    drawn = [panels_of(name)[0] for name in ("mask-compressed", "mask-selected", "mask-window")]
    for each, panel in zip(read, drawn, strict=True):
        assert torch.equal(shown_as_read(panel), each), panel.title


@pytest.mark.parametrize("name", ["mask-ragged", "mask-decode"])
def test_a_batch_is_drawn_as_the_oracle_reads_it(name: str) -> None:
    """A decode step reads what the last rows of the whole batch read."""
    layout = VarlenLayout.from_lengths(LENGTHS)
    read = read_by_the_oracle(layout, *draw_branches.queries_and_keys(sum(LENGTHS), SEED))
    if name == "mask-decode":
        ends = layout.cu_seqlens_q[1:].tolist()
        read = [torch.cat([each[end - n : end] for n, end in zip(NEW, ends, strict=True)]) for each in read]
    for each, panel in zip(read, panels_of(name), strict=True):
        assert torch.equal(shown_as_read(panel), each), panel.title


def test_colours_of_the_selection_are_the_reasons() -> None:
    """Each past key has one colour; forced keys are those of the first block and the last two."""
    (panel,) = panels_of("mask-selected")
    t, s = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    assert torch.equal(torch.stack(list(panel.cells.values())).sum(0), (s <= t).int())
    initial, local, scored, _ = panel.cells.values()
    assert torch.equal(initial, (s <= t) & (s < 8))
    assert torch.equal(local, (s <= t) & (s >= 8) & (s // 8 >= t // 8 - 1))
    assert scored.any(0).sum() > 16


def test_the_closer_look_at_compressed_blocks_is_right() -> None:
    """Blocks that end at the query or before it are read; those that have begun are not there yet."""
    panel = panels_of("mask-compressed")[1]
    for block, (read, begun, future) in enumerate(zip(*panel.cells.values(), strict=True)):
        first, last = 2 * block, 2 * block + 3
        expected = [last <= 18, first <= 18 < last, first > 18]
        for cells, there in zip((read, begun, future), expected, strict=True):
            assert cells.nonzero()[:, 0].tolist() == (list(range(first, last + 1)) if there else [])


def test_the_folded_rows_are_causal_triangles_and_all_there_are() -> None:
    """Phase by phase; rows are those of the mask, each once."""
    whole, *phases = [part for part in draw_kernels.fold() if isinstance(part, Panel)]
    layout, blocks = VarlenLayout.from_lengths([draw_kernels.FOLDED_TOKENS]), draw_kernels.FOLDED
    q, k = draw_branches.queries_and_keys(draw_kernels.FOLDED_TOKENS, SEED)
    k_cmp = reference.compress_mean(k, layout, blocks)
    read = weights(reference.compressed_attention, q, k_cmp, layout, blocks) > 0
    assert torch.equal(shown_as_read(whole), read)
    queries = []
    for panel in phases:
        rows = [int(row) for row in panel.rows if row != "-"]
        cells = next(iter(panel.cells.values()))[: len(rows)]
        assert torch.equal(cells, torch.ones_like(cells).tril())
        assert torch.equal(cells, read[rows])
        queries += rows
    assert sorted(queries) == list(range(blocks.kernel_size - 1, draw_kernels.FOLDED_TOKENS))


def test_a_tile_reads_what_its_queries_chose_once() -> None:
    for panel in draw_kernels.sharing():
        assert isinstance(panel, Panel)
        own, union = panel.cells.values()
        assert torch.equal(union[-1], own[:-1].any(0))
        assert own[:-1].sum(1).tolist() == [draw_kernels.SHARED.topk] * draw_kernels.TILE
        assert f"{int(union.sum())} different" in panel.title
    agree, alone = (int(list(panel.cells.values())[1].sum()) for panel in draw_kernels.sharing())
    assert agree < alone / 2
