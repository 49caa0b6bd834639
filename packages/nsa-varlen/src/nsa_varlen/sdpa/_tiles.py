"""Cuts a ragged batch into tiles: a run of packed queries with the span of packed keys that they may see."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, TypeVar

from torch import Tensor

from nsa_varlen.layout import VarlenLayout

# A tile may hold several whole sequences while its keys stay this few: short sequences share tiles, long ones do not
# compute against one another's keys.
SHARED_KEYS = 1024

Position = TypeVar("Position", int, Tensor)
# position of a query -> the keys [low, high) of its sequence that it sees; both ascend with the position
Visible = Callable[[Position], tuple[Position, Position]]


class Tile(NamedTuple):
    """Packed queries [q0, q1); packed keys [k0, k1) that some of them see, and [all0, all1) that all of them see.

    Where all0 >= all1, no key is seen by all. `sequences` is how many the tile holds.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    all0: int
    all1: int
    sequences: int = 1


def plan_tiles(
    layout: VarlenLayout, key_starts: list[int], first_seeing: int, visible: Visible, rows: int
) -> list[Tile]:
    """Tiles of at most `rows` queries, in order; queries that see nothing belong to none.

    Args:
        key_starts: packed row of each sequence's first key, on the host.
        first_seeing: least position that sees a key.
        visible: keys that a position sees.
    """
    tiles: list[Tile] = []
    offsets = zip(*(pairwise(cu.tolist()) for cu in (layout.host.cu_seqlens_q, layout.host.cu_seqlens_k)), strict=True)
    for ((start, end), (begin_k, end_k)), first_key in zip(offsets, key_starts, strict=True):
        shift = (end_k - begin_k) - end  # position of packed query i is i + shift
        for q0 in range(max(start, first_seeing - shift), end, rows):
            q1 = min(q0 + rows, end)
            low, all_high = visible(q0 + shift)
            all_low, high = visible(q1 - 1 + shift)
            tile = Tile(q0, q1, first_key + low, first_key + high, first_key + all_low, first_key + all_high)
            last = tiles[-1] if tiles else None
            if last and last.q1 == q0 and q1 - last.q0 <= rows and tile.k1 - last.k0 <= SHARED_KEYS:
                tiles[-1] = Tile(last.q0, q1, last.k0, tile.k1, tile.all0, last.all1, last.sequences + 1)
            else:
                tiles.append(tile)
    return tiles
