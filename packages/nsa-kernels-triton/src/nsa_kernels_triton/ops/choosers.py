"""Which queries chose each block: the launches of `kernels.choosers` and what they write."""

from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.ops.selected_call import SelectedCall
from nsa_kernels_triton.tiles import count_tiles, power_of_two

CELL = 32  # queries whose choice of a block is the bits of one int32
MARKS = 256 << 20  # bytes for the marks of a chunk, about; those of a cell and a head may exceed it
MOST_CELLS = 65_535  # of a CUDA grid


class Choosers:
    """Lists of the queries of a chunk of at most `cells` cells, for some kv heads, by the block that they chose.

    Bytes, beside MARKS: 8 for each entry of block_indices, 8 more for each query of a block's last, partial tile.

    Fields:
        counts, starts, slots, items, num_items, taken, listed, chosen, places: as `kernels.choosers` says. `taken` is 0.
        most_slots: how many slots there may be. tiles: how many tiles of `queries` the lists of a head may take.
    """

    def __init__(self, call: SelectedCall, cells: int, heads: int, queries: int, piece: int) -> None:
        self.call, self.queries, self.piece = call, queries, piece
        self.num_blocks = count_blocks(call)
        rows = min(cells * CELL, call.total_q)
        entries = rows * call.num_slots
        different = min(self.num_blocks, entries)
        self.tiles = entries // queries + different
        self.most_slots = 2 * entries // piece  # those of a block of more than a piece are less than twice its pieces
        self.ranking = launch("ranking", call.q.device)
        segments = -(-cells // self.ranking["depth"])

        def ints(*shape: int) -> Tensor:
            return call.indices.new_empty(shape)

        self._marks, self._tallies = ints(heads * cells * self.num_blocks * 2), ints(heads * segments * self.num_blocks)
        self.counts, self.starts, self.slots = (ints(heads, self.num_blocks) for _ in range(3))
        self.items, self.num_items, self.taken = ints(heads, entries // piece + different, 4), ints(heads), ints(1)
        self.listed = ints(heads, self.tiles * queries)
        self.chosen = ints(rows, call.num_kv_heads)
        self.places = ints(rows, call.num_kv_heads, call.num_slots)

    def find(self, own: slice, first: int, end: int) -> None:
        """Fill the fields for the kv heads `own` and cells `first` to `end`."""
        from nsa_kernels_triton.kernels.choosers import (
            items_kernel,
            list_kernel,
            mark_kernel,
            rank_kernel,
            tally_kernel,
        )

        call, num_blocks, ranking = self.call, self.num_blocks, self.ranking
        heads, cells = own.stop - own.start, end - first
        marking, itemizing = (launch(name, call.q.device) for name in ("marking", "itemizing"))
        chosen = call.indices[:, own], call.cu_seqlens_q, call.cu_seqlens_k
        sizes = call.batch_size, call.num_kv_heads, call.num_slots, num_blocks
        entries = {
            "BLOCK_SIZE": call.block_size,
            "CELL": CELL,
            "SLOTS": power_of_two(call.num_slots),
            **marking.options,
        }
        segments = {"WIDTH": ranking["width"], "DEPTH": ranking["depth"], **ranking.options}
        grid = -(-num_blocks // ranking["width"]), heads, -(-cells // ranking["depth"])
        marks = self._marks[: heads * cells * num_blocks * 2].zero_()
        self.taken.zero_()
        mark_kernel[heads, cells](*chosen, marks, self.chosen, *sizes, first, **entries)
        tally_kernel[grid](marks, self._tallies, num_blocks, cells, **segments)
        rank_kernel[grid](marks, self._tallies, self.counts, num_blocks, cells, **segments)
        items_kernel[(heads,)](
            *(self.counts, self.starts, self.slots, self.items, self.num_items, num_blocks, self.items.shape[1]),
            QUERIES=self.queries,
            PIECE=self.piece,
            WIDTH=itemizing["width"],
            **itemizing.options,
        )
        list_kernel[heads, cells](
            *(*chosen, marks, self.starts, self.listed, self.places, *sizes, self.listed.shape[1], first),
            **entries,
        )


def count_blocks(call: SelectedCall) -> int:
    """How many numbers the blocks of all sequences take."""
    return count_tiles(call.total_k, call.batch_size, call.block_size)
