"""What a list of selected blocks means, whatever its order: shared by all that read one."""

import torch
from torch import Tensor


def distinct_blocks(block_indices: Tensor) -> Tensor:
    """Each row's blocks once: [..., N] to int64 [..., N], ascending but for -1 where an entry repeats the one before.

    Negative entries keep a negative value.

    Example:
        >>> distinct_blocks(torch.tensor([5, 2, -1, 5])).tolist()
        [-1, 2, 5, -1]
    """
    indices = block_indices.long().sort(-1).values
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[..., 1:] = indices[..., 1:] == indices[..., :-1]
    return indices.masked_fill(repeated, -1)
