"""Keys of selected blocks, gathered side by side for a packed call.

Shapes: R queries of a chunk, N listed blocks each, P = R * Hk pairs of query and kv head, S = N * l' places for the
keys of a pair.
"""

import torch
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.arguments import KV
from nsa_varlen.block_indices import distinct_blocks
from nsa_varlen.kv_rows import all_rows, take_head_rows
from torch import Tensor

from nsa_fa2.kernel import Segments

NOTHING = torch.iinfo(torch.int64).max  # in place of a block that adds no key: sorts behind every block


class Chunk:
    """Some queries: a packed call has one sequence for each (query, kv head), its G heads as queries.

    The keys that a pair sees come first, for only the last of its blocks can be the one that the query stands in. The
    places left over are a sequence that nobody reads.

    ```
    l'=4, N=3, blocks 0, 2 and -1, t=9       keys 0 1 2 3 8 9 | . . . . . .
    ```

    Fields:
        rows: the queries. sequence: of each, int64 [R].
        block: what fills the places, relative to the sequence, int64 [R, Hk, N]: those seen, ascending, then any.
        num_keys: that a pair sees, int64 [R, Hk].
        segments: of the call.
    """

    def __init__(
        self, rows: slice, block_indices: Tensor, num_heads: int, layout: VarlenLayout, blocks: BlockGeometry
    ) -> None:
        self.rows = rows
        self.sequence = layout.sequence_of_queries()[rows]
        position = layout.positions()[rows, None, None]
        current = torch.div(position, blocks.block_size, rounding_mode="floor")
        block = distinct_blocks(block_indices[rows])
        block = block.masked_fill((block < 0) | (block > current), NOTHING).sort(-1).values
        seen = block != NOTHING
        unseen_of_current = blocks.block_size - 1 - position[..., 0] % blocks.block_size
        self.num_keys = seen.sum(-1) * blocks.block_size - (block == current).any(-1) * unseen_of_current
        # Places that no block takes read one of the first, not all the same one: its gradient gets zeros.
        self.block = torch.where(seen, block, torch.arange(block.shape[-1], device=block.device))
        self.segments = self._segments(num_heads // block.shape[1], block.shape[-1] * blocks.block_size)

    def _segments(self, group: int, places: int) -> Segments:
        pairs = self.num_keys.numel()
        pair = torch.arange(pairs, dtype=torch.int32, device=self.block.device)
        boundary = torch.arange(2 * pairs + 1, dtype=torch.int32, device=self.block.device)
        ends = torch.stack((pair * places, pair * places + self.num_keys.flatten().int()), -1).flatten()
        offsets_k = torch.nn.functional.pad(ends, (0, 1), value=pairs * places)
        return Segments((boundary + 1) // 2 * group, offsets_k, max(2, group), places)

    def queries(self, x: Tensor) -> Tensor:
        """[T, Hq, D] -> [P * G, 1, D]."""
        return x[self.rows].flatten(0, 1)[:, None]


class ByRow:
    """Each key on its own, from where it is: for few queries over many keys, which need not be copied all."""

    def __init__(self, k: KV, v: KV, layout: VarlenLayout, blocks: BlockGeometry) -> None:
        self.k, self.v, self.layout, self.blocks = k, v, layout, blocks

    def gather(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """k [P * S, 1, Dk] and v [P * S, 1, Dv]."""
        offsets = self.layout.cu_seqlens_k
        within = torch.arange(self.blocks.block_size, device=offsets.device)
        key = (chunk.block[..., None] * self.blocks.block_size + within).flatten(2)
        last = (offsets.diff().long()[chunk.sequence] - 1).clamp_min(0)
        key = torch.minimum(key, last[:, None, None])
        k_rows, v_rows = take_head_rows(self.k, self.v, chunk.sequence, key, offsets)
        return k_rows.flatten(0, 2)[:, None], v_rows.flatten(0, 2)[:, None]


class ByBlock:
    """Whole blocks, from a copy of the keys in which a block of a head is one piece of memory.

    The copy has the blocks of all sequences one after another, the last of each filled up with zeros.
    """

    def __init__(self, k: KV, v: KV, layout: VarlenLayout, blocks: BlockGeometry) -> None:
        self.block_size = blocks.block_size
        self.count = layout.total_k // blocks.block_size + layout.batch_size  # at least as many as there are
        self.first, self.place = self.derive(layout, blocks)
        self.k, self.v = (self._copied(all_rows(x, layout)) for x in (k, v))

    @staticmethod
    def derive(layout: VarlenLayout, blocks: BlockGeometry) -> tuple[Tensor, Tensor]:
        """Number of each sequence's first block, int64 [B], and place of each key among the blocks, int64 [Tk]."""
        first = layout.block_offsets(blocks)

        def build() -> Tensor:
            return first[layout.sequence_of_keys()] * blocks.block_size + layout.key_positions()

        return first, layout.derive(("nsa_fa2", "places", blocks.block_size), build)

    def _copied(self, x: Tensor) -> Tensor:
        """[Tk, Hk, D] -> [Hk * count, l' * D]."""
        padded = x.new_zeros(self.count * self.block_size, *x.shape[1:]).index_copy_(0, self.place, x)
        return padded.transpose(0, 1).reshape(-1, self.block_size * x.shape[2])

    def _index(self, chunk: Chunk) -> Tensor:
        """Which rows of the copies a chunk reads: int64 [P * N]."""
        block = (chunk.block + self.first[chunk.sequence, None, None]).clamp_max_(self.count - 1)
        heads = torch.arange(block.shape[1], device=block.device)[:, None]
        return (block + heads * self.count).flatten()

    def gather(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """k [P * S, 1, Dk] and v [P * S, 1, Dv]."""
        index = self._index(chunk)
        k, v = (x.index_select(0, index).view(-1, 1, x.shape[1] // self.block_size) for x in (self.k, self.v))
        return k, v

    def scatter(self, chunk: Chunk, grads: Tensor, out: Tensor) -> None:
        """Add gradients of what `gather` gave, [P * S, 1, D], to out, which lies as the copy."""
        out.index_add_(0, self._index(chunk), grads.reshape(-1, out.shape[1]).to(out.dtype))

    def packed(self, x: Tensor, like: Tensor) -> Tensor:
        """What lies as the copy of `like` [Tk, Hk, D], in its shape and dtype."""
        rows = x.view(like.shape[1], -1, like.shape[2]).index_select(1, self.place)
        return rows.transpose(0, 1).to(like.dtype, memory_format=torch.contiguous_format)


def gatherer(k: KV, v: KV, block_indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> ByRow | ByBlock:
    """By block where queries choose at least as many blocks as there are, which copying all of them is worth."""
    there_are = block_indices.shape[1] * (layout.total_k // blocks.block_size + layout.batch_size)
    return (ByBlock if block_indices.numel() >= there_are else ByRow)(k, v, layout, blocks)
