"""Draws the two ideas of docs/kernels.md, from masks and selections of `nsa_varlen` itself: `hatch run demo:draw`."""

import draw_branches
import torch
from draw_masks import selection
from drawing import Bars, Figures, Panel, write
from nsa_varlen import BlockGeometry, VarlenLayout, masks
from torch import Tensor

FOLDED = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=8, topk=4, window_size=12)
FOLDED_TOKENS = 48
SHARED = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=8, topk=16, window_size=12)
SHARED_TOKENS, TILE = 512, 8  # queries of a tile: the last ones


def fold() -> list[Panel | Bars]:
    """The compressed mask, and the same rows put together by phase."""
    layout = VarlenLayout.from_lengths([FOLDED_TOKENS])
    seen = masks.compressed_mask(layout, FOLDED)
    count, stride, first = seen.shape[1], FOLDED.kernel_stride, FOLDED.kernel_size - 1
    position = layout.positions()
    phases = [seen & ((position >= first) & ((position - first) % stride == phase))[:, None] for phase in range(stride)]
    panels: list[Panel | Bars] = [
        Panel(
            "Compressed attention, as it is",
            "compressed block",
            "query",
            {f"phase {number}": mask for number, mask in enumerate(phases)},
            (0.6, 0.55, 2.5, 4.0),
            every=(2, 4),
        )
    ]
    for number in range(stride):
        queries = list(range(first + number, FOLDED_TOKENS, stride))
        cells = torch.zeros(count, count, dtype=torch.bool)
        cells[: len(queries)] = seen[queries]
        padding = torch.zeros_like(cells)
        padding[len(queries) :] = True
        across, up = number % 2, 1 - number // 2
        panels.append(
            Panel(
                f"Queries {queries[0]}, {queries[1]}, ..., {queries[-1]}",
                "compressed block" if not up else "",
                "",
                {f"phase {number}": cells} | ({"padding": padding} if padding.any() else {}),
                (4.0 + 2.9 * across, 0.55 + 2.25 * up, 2.5, 1.75),
                every=(2, 2),
                rows=[str(query) for query in queries] + ["-"] * (count - len(queries)),
            )
        )
    return panels


def chosen(q: Tensor, k: Tensor) -> Tensor:
    """Blocks that each of the last queries chose: bool [TILE, blocks]."""
    layout = VarlenLayout.from_lengths([TILE], [SHARED_TOKENS])
    indices, _ = selection(layout, q[-TILE:], k, SHARED)
    count = SHARED.num_blocks(SHARED_TOKENS)
    found = torch.zeros(TILE, count + 1, dtype=torch.bool)
    found.scatter_(1, indices[:, 0].long().masked_fill(indices[:, 0] < 0, count), True)
    return found[:, :count]


def sharing() -> list[Panel | Bars]:
    """What a tile of neighbouring queries reads, if they agree and if they do not."""
    q, k = draw_branches.queries_and_keys(SHARED_TOKENS, seed=2)
    alone = 4 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    panels: list[Panel | Bars] = []
    for number, (title, queries) in enumerate((("Neighbours agree", q), ("Every query on its own", alone))):
        own = chosen(queries, k)
        union, none = own.any(0, keepdim=True), torch.zeros_like(own)
        different = f"{TILE} queries chose {int(own.sum())} blocks, {int(union.sum())} different ones"
        panels.append(
            Panel(
                f"{title}: {different}",
                "selection block" if number else "",
                "",
                {
                    "chosen by the query": torch.cat([own, none[:1]]),
                    "read once for all of them": torch.cat([none, union]),
                },
                (1.2, 2.75 - 2.2 * number, 8.2, 1.55),
                rows=[f"query {SHARED_TOKENS - TILE + row}" for row in range(TILE)] + ["the tile"],
                lines=([], [TILE]),
            )
        )
    return panels


FIGURES: Figures = {"kernel-fold": (fold, (9.7, 5.3)), "kernel-sharing": (sharing, (9.7, 4.9))}

if __name__ == "__main__":
    write(FIGURES)
