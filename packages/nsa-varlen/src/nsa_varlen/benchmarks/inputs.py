"""Queries whose neighbours choose much the same blocks, as those of a language do."""

import torch
from torch import Tensor

SMOOTHED = 1024  # steps of a random walk that a query is the sum of


def smooth_queries(
    batch: int, tokens: int, heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Tensor:
    """Packed queries [batch * tokens, heads, head_dim], each unit normal, that change slowly from one to the next.

    Query t of a head is the sum of SMOOTHED normal steps t + 1 ... t + SMOOTHED, scaled: neighbours share all but two.

    Example:
        >>> q = smooth_queries(2, 100, 1, 64, dtype=torch.float64, device="cpu", seed=0)
        >>> neighbours = torch.nn.functional.cosine_similarity(q[1:100], q[:99], -1)
        >>> q.shape, bool((neighbours > 0.99).all())
        (torch.Size([200, 1, 64]), True)
    """
    generator = torch.Generator(device).manual_seed(seed)
    made = torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device=device)
    for sequence in made:
        for head in range(heads):  # one at a time: sums are taken in fp64
            shape = tokens + SMOOTHED, head_dim
            walk = torch.randn(shape, generator=generator, dtype=torch.float64, device=device).cumsum(0)
            sequence[:, head] = (walk[SMOOTHED:] - walk[:-SMOOTHED]) * SMOOTHED**-0.5
    return made.flatten(0, 1)
