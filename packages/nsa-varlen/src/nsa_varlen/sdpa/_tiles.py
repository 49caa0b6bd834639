"""Cuts a ragged batch into tiles: a run of packed queries with the span of packed keys that they may see."""

from typing import NamedTuple

from torch import Tensor

# A tile may hold several whole sequences while its keys stay this few: short sequences share tiles, long ones do not
# compute against one another's keys.
SHARED_KEYS = 1024


class Tile(NamedTuple):
    """Packed queries [q0, q1) and the packed keys [k0, k1) that some of them see."""

    q0: int
    q1: int
    k0: int
    k1: int


def plan_tiles(low: Tensor, high: Tensor, cu_seqlens_q: Tensor, rows: int) -> list[Tile]:
    """Tiles of at most `rows` queries where query i sees the packed keys [low[i], high[i]).

    All arguments live on the host. Within a sequence low and high ascend with the query. Queries that see nothing
    belong to no tile.
    """
    lows, highs = low.tolist(), high.tolist()
    tiles: list[Tile] = []
    offsets = cu_seqlens_q.tolist()
    for start, end in zip(offsets, offsets[1:], strict=False):
        for q0 in range(start, end, rows):
            q1 = min(q0 + rows, end)
            while q0 < q1 and lows[q0] >= highs[q0]:
                q0 += 1
            if q0 == q1:
                continue
            tile = Tile(q0, q1, lows[q0], highs[q1 - 1])
            last = tiles[-1] if tiles else None
            if last and last.q1 == q0 and q1 - last.q0 <= rows and tile.k1 - last.k0 <= SHARED_KEYS:
                tiles[-1] = Tile(last.q0, q1, last.k0, tile.k1)
            else:
                tiles.append(tile)
    return tiles
