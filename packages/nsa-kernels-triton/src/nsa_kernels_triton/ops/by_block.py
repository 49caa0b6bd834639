"""Selected attention, block by block: the launches of `kernels.inverting`, `kernels.parts` and `kernels.merging`."""

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import Launch, launch
from nsa_kernels_triton.ops.launching import STREAMS, num_processors, side_streams, take_turns
from nsa_kernels_triton.ops.selected_call import SelectedCall
from nsa_kernels_triton.tiles import count_tiles, evenly, power_of_two

PARTS = 2 << 30  # bytes for parts; those of a tile and a head may exceed it


def by_block(call: SelectedCall, config: Launch) -> None:
    """Block by block: `config` has the rows of a tile and how many rows of one kv head a chunk may have.

    Chunks take turns on side streams: while one waits for memory, another multiplies.
    """
    queries = config["rows"] // call.group_size
    part_bytes = call.group_size * (call.num_slots + 1) * (call.v_head_dim * call.q.element_size() + 4)
    tiles = count_tiles(call.total_q, call.batch_size, queries)
    most = config["chunk_rows"] // config["rows"] + 1  # 2^n queries may be one tile more than 2^n / queries
    chunk = evenly(tiles, min(most, PARTS // (STREAMS * queries * part_bytes)))
    chunk_rows = min(chunk * queries, call.total_q)
    streams = side_streams(call.q.device, chunk < tiles)
    heads = evenly(call.num_kv_heads, PARTS // (len(streams) * chunk_rows * part_bytes))
    chunks = [_Chunk(call, config, chunk_rows, heads) for _ in streams]
    take_turns(streams, range(0, tiles, chunk), lambda turn, first: chunks[turn].run(first, min(first + chunk, tiles)))


class _Chunk:
    """The lists and parts of a chunk of query tiles of the organisation block by block, and its launches."""

    def __init__(self, call: SelectedCall, config: Launch, chunk_rows: int, heads: int) -> None:
        self.call, self.config, self.heads = call, config, heads
        self.queries = queries = config["rows"] // call.group_size
        num_kv_heads, num_slots, turns = call.num_kv_heads, call.num_slots, config["turns"]
        query_parts = call.group_size * (num_slots + 1)
        num_blocks = count_tiles(call.total_k, call.batch_size, call.block_size)
        chosen = min(num_blocks, chunk_rows * num_slots)  # most different blocks
        most_tiles = chunk_rows * num_slots // queries + chosen
        most_items = chunk_rows * num_slots // (queries * turns) + chosen

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return call.indices.new_empty(shape, dtype=dtype)

        self.counts, self.offsets = ints(num_kv_heads, num_blocks), ints(num_kv_heads, num_blocks)
        self.key_rows, self.num_items = ints(num_blocks), ints(num_kv_heads)
        self.ranks, self.meta = ints(chunk_rows, num_kv_heads, num_slots), ints(chunk_rows, num_kv_heads)
        self.items = ints(num_kv_heads, most_items, dtype=torch.int64)
        self.item_tiles = ints(num_kv_heads, most_items)
        self.filed = ints(num_kv_heads, most_tiles, queries)
        self.parts = call.q.new_empty(heads, chunk_rows, query_parts, call.v_head_dim)
        self.part_lse = call.lse.new_empty(heads, chunk_rows, query_parts)
        self.kv_tiles = call.kv_tiles(config, call.block_size)

    def run(self, first: int, end: int) -> None:
        """Tiles `first` to `end`."""
        self._invert(first, end)
        for first_head in range(0, self.call.num_kv_heads, self.heads):
            self._attend(first, end, first_head, min(self.heads, self.call.num_kv_heads - first_head))

    def _invert(self, first: int, end: int) -> None:
        from nsa_kernels_triton.kernels.inverting import count_kernel, file_kernel, lay_out_kernel

        call, num_slots = self.call, self.call.num_slots
        (num_kv_heads, num_blocks), most_items = self.counts.shape, self.items.shape[1]
        filing = launch("filing", call.q.device, entries=self.queries * num_slots)
        laying = launch("laying_out", call.q.device)
        entries = {
            "BLOCK_SIZE": call.block_size,
            "QUERIES": self.queries,
            "QUERIES_2": power_of_two(self.queries),
            "SLOTS": power_of_two(num_slots),
            **filing.options,
        }
        chosen = call.indices, call.cu_seqlens_q, call.cu_seqlens_k
        sizes = call.batch_size, num_kv_heads, num_slots
        self.counts.zero_()
        count_kernel[num_kv_heads, end - first](
            *(*chosen, self.counts, self.ranks, self.meta, self.key_rows, *sizes, num_blocks, first),
            **entries,
        )
        lay_out_kernel[(num_kv_heads,)](
            *(self.counts, self.key_rows, self.offsets, self.num_items, self.items, self.item_tiles),
            *(num_blocks, most_items),
            QUERIES=self.queries,
            TURNS=self.config["turns"],
            WIDTH=laying["width"],
            **laying.options,
        )
        file_kernel[num_kv_heads, end - first](
            *(*chosen, self.ranks, self.offsets, self.filed, *sizes, num_blocks, self.filed.shape[1], first),
            **entries,
        )

    def _attend(self, first: int, end: int, first_head: int, num_heads: int) -> None:
        from nsa_kernels_triton.kernels.merging import merge_kernel
        from nsa_kernels_triton.kernels.parts import filed_kernel, near_kernel

        call, config = self.call, self.config
        near, merging = (launch(name, call.q.device) for name in ("near", "merging"))
        constants = call.constants(self.queries, config["rows"])
        merged = {name: constants[name] for name in ("GROUP_SIZE", "QUERIES", "DV", "V0", "V1")}
        head_parts, most_items = self.part_lse[0].numel(), self.items.shape[1]
        programs = min(most_items * num_heads, num_processors(call.q.device) * config["programs"])
        near_kernel[end - first, num_heads](
            *(call.q, call.k, call.v, self.parts, self.part_lse, self.meta, call.cu_seqlens_q, call.cu_seqlens_k),
            *(call.batch_size, call.num_kv_heads, call.num_slots, first, first_head, head_parts, call.scale),
            *call.strides(),
            STAGES=near.num_stages,
            **constants,
            **near.options,
        )
        filed_kernel[(programs,)](
            *(call.q, call.k, call.v, *self.kv_tiles, self.items, self.item_tiles, self.num_items, self.filed),
            *(call.cu_seqlens_q, self.parts, self.part_lse, call.batch_size, most_items, self.filed.shape[1]),
            *(first, first_head, num_heads, head_parts, call.scale),
            *call.strides(),
            NUM_SLOTS=call.num_slots,
            WIDE=self.meta.shape[0] * call.q.stride(0) + call.group_size * call.q.stride(1) >= 2**31,
            STAGES=config.num_stages,
            **constants,
            **config.options,
        )
        merge_kernel[-(-self.meta.shape[0] * call.group_size // merging["rows"]), num_heads](
            *(self.parts, self.part_lse, self.meta, call.cu_seqlens_q, call.out, call.lse, call.batch_size),
            *(call.total_q, call.num_kv_heads, call.num_slots, first, end, first_head, head_parts),
            ROWS=merging["rows"],
            STAGES=merging.num_stages,
            **merged,
            **merging.options,
        )
