"""Cuts a ragged batch into tiles: a run of packed queries with the span of packed keys that they may see."""

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

# A tile may hold several whole sequences while its keys stay this few: short sequences share tiles, long ones do not
# compute against one another's keys.
SHARED_KEYS = 1024


class Tile(NamedTuple):
    """Packed queries [q0, q1); packed keys [k0, k1) that some of them see, and [all0, all1) that all of them see.

    Where all0 >= all1, no key is seen by all.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    all0: int
    all1: int


def plan_tiles(low: Tensor, high: Tensor, cu_seqlens_q: Tensor, rows: int) -> list[Tile]:
    """Tiles of at most `rows` queries where query i sees the packed keys [low[i], high[i]).

    All arguments live on the host. low and high ascend with the query, over the whole batch among those that see
    anything. Queries that see nothing belong to no tile.
    """
    lows, highs = low.tolist(), high.tolist()
    tiles: list[Tile] = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        for first in range(start, end, rows):
            q0, q1 = first, min(first + rows, end)
            while q0 < q1 and lows[q0] >= highs[q0]:
                q0 += 1
            if q0 == q1:
                continue
            tile = Tile(q0, q1, k0=lows[q0], k1=highs[q1 - 1], all0=lows[q1 - 1], all1=highs[q0])
            last = tiles[-1] if tiles else None
            if last and last.q1 == q0 and q1 - last.q0 <= rows and tile.k1 - last.k0 <= SHARED_KEYS:
                tiles[-1] = Tile(last.q0, q1, last.k0, tile.k1, all0=tile.all0, all1=last.all1)
            else:
                tiles.append(tile)
    return tiles
