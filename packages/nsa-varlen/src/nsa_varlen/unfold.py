"""The raw tokens of each compressed block, gathered: what every compression starts from."""

import torch
from torch import Tensor

from nsa_varlen.arguments import check_layout, check_rows
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout


def unfold_blocks(x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """Tokens `x[i*d : i*d + l]` of every complete block of every sequence: [Tk, H, D] -> [Tc, l, H, D].

    Differentiable; holds l/d copies of x.

    Raises:
        TypeError, ValueError: x does not fit the layout's keys.

    Example:
        >>> geometry = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=3)
        >>> x = torch.arange(3.0).reshape(3, 1, 1)
        >>> unfold_blocks(x, VarlenLayout.from_lengths([3]), geometry).flatten(1).tolist()
        [[0.0, 1.0], [1.0, 2.0]]
    """
    check_layout(layout, blocks)
    check_rows("x", x, layout.total_k, layout)
    first = layout.compressed_starts(blocks) + layout.cu_seqlens_k.long()[layout.sequence_of_compressed(blocks)]
    return x[first[:, None] + torch.arange(blocks.kernel_size, device=x.device)]
