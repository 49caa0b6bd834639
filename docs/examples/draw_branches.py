"""Draws what one query head may look at in each branch, from the masks themselves: `hatch run demo:draw`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference

OUT = Path(__file__).parents[1] / "images" / "branches.png"
BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=8, topk=4, local_blocks=1, window_size=8)
TOKENS = 96
SEEN, UNSEEN, CHOSEN = "#0072B2", "#F0F0F0", "#D55E00"  # safe for colour-blind readers


def queries_and_keys(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random q and k [tokens, 1, 16]: neighbouring queries ask for much the same, as in a trained model."""
    torch.manual_seed(seed)
    q = 4 * torch.randn(tokens, 1, 16).cumsum(0) / torch.arange(1, tokens + 1)[:, None, None].sqrt()
    return q, torch.randn(tokens, 1, 16)


def branch_masks() -> list[tuple[str, str, torch.Tensor]]:
    """Title, axis label and bool [queries, keys] of each branch, for random queries and keys."""
    layout = VarlenLayout.from_lengths([TOKENS])
    q, k = queries_and_keys(TOKENS, seed=4)
    k_cmp = reference.compress_mean(k, layout, BLOCKS)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, layout, BLOCKS)
    indices = reference.select_blocks(q, k_cmp, lse, layout, BLOCKS)
    return [
        ("compressed: every finished block, as one key", "compressed block", masks.compressed_mask(layout, BLOCKS)),
        (
            f"selected: the {BLOCKS.topk} blocks that score best",
            "key",
            masks.selected_mask(indices, layout, BLOCKS)[:, 0],
        ),
        (f"window: the last {BLOCKS.window_size} keys", "key", masks.window_mask(layout, BLOCKS)),
    ]


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    for axis, (title, label, mask) in zip(axes, branch_masks(), strict=True):
        colour = CHOSEN if title.startswith("selected") else SEEN
        palette = matplotlib.colors.ListedColormap([UNSEEN, colour])
        axis.imshow(mask.int(), cmap=palette, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(label)
        axis.set_ylabel("query")
    figure.suptitle(
        f"What a query reads: {TOKENS} tokens, compressed blocks of {BLOCKS.kernel_size} every {BLOCKS.kernel_stride}, "
        f"selection blocks of {BLOCKS.block_size}. A learned gate per head sums the three results.",
        fontsize=11,
    )
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
