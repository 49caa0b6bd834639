"""How much of what a query selects its neighbour selected too."""

import torch
from nsa_varlen.keeping import outside_inference
from torch import Tensor

NOBODY = -2  # a position that is right before no query's


class ChosenBlocks:
    """What the last query of each sequence of a cache selected, for the comparison with the next step's first.

    Fields:
        blocks: int32 [B, Hk, topk].
        position: int64 [B], of those queries; `NOBODY` before there is one.
    """

    def __init__(self, batch_size: int, num_kv_heads: int, topk: int, device: torch.device) -> None:
        self.blocks = outside_inference(torch.full)(
            (batch_size, num_kv_heads, topk), -1, dtype=torch.int32, device=device
        )
        self.position = outside_inference(torch.full)((batch_size,), NOBODY, dtype=torch.int64, device=device)

    def keep(self, block_indices: Tensor, position: Tensor, last: Tensor, there: Tensor) -> None:
        """A step: of sequence b, row last[b] of its [T, Hk, topk] and [T] is the last query, if there[b]."""
        last = last.clamp_min(0)
        self.blocks.copy_(block_indices[last].where(there[:, None, None], self.blocks))
        self.position.copy_(position[last].where(there, self.position))

    def forget(self, sequence: int) -> None:
        """The next query of this sequence has no neighbour: it goes on from what others selected."""
        self.position[sequence : sequence + 1].fill_(NOBODY)


def overlap(
    block_indices: Tensor, position: Tensor, sequence: Tensor, before: ChosenBlocks | None, rows: int
) -> Tensor:
    """Sum over neighbouring queries and kv heads of |I_t ∩ I_(t-1)| / |I_t|, and how many there are: fp64 [2].

    Args:
        block_indices: int32 [T, Hk, topk], T at least 1, each row's entries distinct; -1 is none.
        position, sequence: int64 [T], of the queries; negative positions are padding.
        before: what the sequences' last queries selected in an earlier step; None if there was none.
        rows: how many rows are looked at, at most: the last ones.

    Example:
        >>> indices = torch.tensor([[[0, 1, 2, -1]], [[0, 2, 3, 4]]], dtype=torch.int32)
        >>> overlap(indices, torch.tensor([190, 191]), torch.tensor([0, 0]), None, 256).tolist()
        [0.5, 1.0]
    """
    start = max(0, len(position) - rows)
    lead = min(1, start)  # the row before those that are looked at
    now, at, of = (x[start - lead :] for x in (block_indices, position, sequence))
    earlier, earlier_at, earlier_of = (x.roll(1, 0) for x in (now, at, of))
    first = of != earlier_of
    first[:1].fill_(True)
    if before is None:
        neighbours = (at > 0) & ~first  # a sequence's rows follow one another
    else:
        earlier = before.blocks[of].where(first[:, None, None], earlier)
        neighbours = (at > 0) & (before.position[of].where(first, earlier_at) == at - 1)
    return _shares(now[lead:], earlier[lead:], neighbours[lead:])


def overlap_of_single(block_indices: Tensor, position: Tensor, before: ChosenBlocks) -> Tensor:
    """The same for one query of each sequence, [B, Hk, topk] and [B], which `before` keeps: a decode step's usual case.

    Example:
        >>> before = ChosenBlocks(1, 1, 2, torch.device("cpu"))
        >>> for blocks, position in (([0, 1], 127), ([0, 2], 128)):
        ...     indices = torch.tensor([[blocks]], dtype=torch.int32)
        ...     found = overlap_of_single(indices, torch.tensor([position]), before)
        >>> found.tolist()
        [0.5, 1.0]
    """
    found = _shares(block_indices, before.blocks, (position > 0) & (before.position == position - 1))
    there = position >= 0
    before.blocks.copy_(block_indices.where(there[:, None, None], before.blocks))
    before.position.copy_(position.where(there, before.position))
    return found


def _shares(now: Tensor, earlier: Tensor, neighbours: Tensor) -> Tensor:
    """Of rows [R, Hk, topk] against the earlier ones, where bool [R] says that they are neighbours."""
    listed = now >= 0
    common = ((now[..., None] == earlier[..., None, :]).any(-1) & listed).sum(-1)
    shares = common / listed.sum(-1).clamp_min(1).double()
    there = neighbours[:, None].expand(shares.shape)
    return torch.stack((shares.where(there, 0.0), there.double())).sum((1, 2))
