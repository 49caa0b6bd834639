"""The three branches as dense boolean masks, straight from their definitions. For the oracle, tests and pictures.

Each mask is [Tq, ...] over packed keys, True where the query may look; a query never sees another sequence.
"""

import torch
from torch import Tensor

from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout


def causal_mask(layout: VarlenLayout) -> Tensor:
    """Key position s <= query position t, bottom-right aligned: bool [Tq, Tk].

    Example:
        >>> causal_mask(VarlenLayout.from_lengths([2], [4])).int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    same = layout.sequence_of_queries()[:, None] == layout.sequence_of_keys()
    return same & (layout.key_positions() <= layout.positions()[:, None])


def window_mask(layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """Key position in (t - w, t]: w keys, the query's own included: bool [Tq, Tk].

    Example:
        >>> window_mask(VarlenLayout.from_lengths([4]), BlockGeometry(window_size=2)).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    recent = layout.key_positions() > layout.positions()[:, None] - blocks.window_size
    return causal_mask(layout) & recent


def compressed_mask(layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """Compressed block i is visible once all its tokens are: i*d + l - 1 <= t. bool [Tq, Tc].

    Example:
        >>> geometry = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=3)
        >>> compressed_mask(VarlenLayout.from_lengths([4]), geometry).int().tolist()
        [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    same = layout.sequence_of_queries()[:, None] == layout.sequence_of_compressed(blocks)
    last_token = layout.compressed_starts(blocks) + blocks.kernel_size - 1
    return same & (last_token <= layout.positions()[:, None])


def selected_mask(block_indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """Key position s <= t whose block s // l' is listed for the query and kv head: bool [Tq, Hk, Tk].

    `block_indices` int [Tq, Hk, N] is relative to the sequence; -1, duplicates and blocks beyond the sequence add
    nothing.

    Example:
        >>> geometry = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=3)
        >>> indices = torch.tensor([[[0, -1, 1]]])
        >>> selected_mask(indices, VarlenLayout.from_lengths([1], [6]), geometry).int().tolist()
        [[[1, 1, 1, 1, 0, 0]]]
    """
    block_of_key = torch.div(layout.key_positions(), blocks.block_size, rounding_mode="floor")
    listed = torch.zeros(*block_indices.shape[:2], layout.total_k, dtype=torch.bool, device=block_indices.device)
    for slot in block_indices.unbind(-1):
        listed |= slot[..., None] == block_of_key
    return listed & causal_mask(layout)[:, None]


def candidate_blocks(layout: VarlenLayout, blocks: BlockGeometry) -> tuple[Tensor, Tensor]:
    """Selection blocks that a query may choose and those it must (Eq. 11): two bool [Tq, Nb] masks.

    With cur = t // l': candidates are j <= cur; forced are j < init_blocks and cur - local_blocks < j, among them.
    Nb covers the longest sequence.

    Example:
        >>> geometry = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=3, local_blocks=1)
        >>> candidate, forced = candidate_blocks(VarlenLayout.from_lengths([1], [6]), geometry)
        >>> candidate.int().tolist(), forced.int().tolist()
        ([[1, 1, 1]], [[1, 0, 1]])
    """
    current = torch.div(layout.positions(), blocks.block_size, rounding_mode="floor")[:, None]
    block = torch.arange(blocks.num_blocks(layout.max_seqlen_k), device=layout.device)
    candidate = block <= current
    forced = candidate & ((block < blocks.init_blocks) | (block > current - blocks.local_blocks))
    return candidate, forced
