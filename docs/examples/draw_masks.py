"""Draws the masks of docs/concepts.md, from `nsa_varlen` itself: `hatch run demo:draw`."""

import draw_branches
import torch
from drawing import Bars, Figures, Panel, write
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from torch import Tensor

# The default sizes, divided by eight; a window that is no multiple of a block.
BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=8, topk=5, window_size=12)
TOKENS, QUERY, SEED = 64, 58, 121  # QUERY: the one that is looked at closely
LENGTHS, NEW = [24, 9, 63], [1, 3, 1]  # of the ragged batch; its last tokens, decoded


def selection(layout: VarlenLayout, q: Tensor, k: Tensor, blocks: BlockGeometry = BLOCKS) -> tuple[Tensor, Tensor]:
    """block_indices [Tq, 1, topk] and scores [Tq, 1, Nb] by the oracle."""
    k_cmp = reference.compress_mean(k, layout, blocks)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, layout, blocks)
    return (
        reference.select_blocks(q, k_cmp, lse, layout, blocks),
        reference.block_scores(q, k_cmp, lse, layout, blocks),
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


FIGURES: Figures = {
    "mask-compressed": (compressed, (9.7, 5.0)),
    "mask-selected": (selected, (9.7, 5.5)),
    "mask-window": (window, (9.7, 5.1)),
    "mask-ragged": (ragged, (9.7, 3.95)),
    "mask-decode": (decode, (9.7, 5.6)),
}

if __name__ == "__main__":
    write(FIGURES)
