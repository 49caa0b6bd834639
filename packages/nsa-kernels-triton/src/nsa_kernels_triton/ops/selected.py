"""Selected attention in one of two organisations, chosen by data: `configurations`, table `selected_attention`.

Query by query (`kernels.sharing`): neighbouring queries share the blocks that they chose. For large groups, and
wherever neighbours choose much the same. Block by block (`kernels.inverting`, `parts`, `merging`): the queries that
chose a block attend to it as one dense tile. For small groups, whose few rows would leave the tensor cores idle.

How much neighbours share is measured on the device (`ops.spread`) and known to a later call, so that nobody waits.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import Launch, launch
from nsa_kernels_triton.ops.descriptors import tiles_of
from nsa_kernels_triton.ops.launching import STREAMS, num_processors, on_device, rows, side_streams, take_turns
from nsa_kernels_triton.ops.spread import UNKNOWN, spread_of
from nsa_kernels_triton.tiles import LOG2_E, count_tiles, evenly, pieces, power_of_two, row_bytes

LISTS = 256 << 20  # bytes, about, for query by query's lists; a tile's own may exceed it
PARTS = 2 << 30  # bytes for block by block's parts; those of a tile and a head may exceed it
ENTRIES = 1024  # of block_indices that one warp sorts and merges


@torch.library.custom_op("nsa_kernels_triton::selected_attention", mutates_args=())
@on_device
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, Dv], lse [Hq, Tq]): see `TritonBackend.selected_attention`.

    `deterministic` leaves what was measured out of the choice: it may differ between runs.
    """
    call = _Call(q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, scale)
    if call.lse.numel() == 0 or call.num_slots == 0:
        return call.out.zero_(), call.lse.fill_(-torch.inf)
    spread = UNKNOWN if deterministic else spread_of(call.indices, call.cu_seqlens_q, call.cu_seqlens_k, block_size)
    config = launch("selected_attention", q.device, spread=spread, **call.case)
    if config["by_block"]:
        call.by_block(config)
    else:
        call.by_query(config)
    return call.out, call.lse


@selected_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[2]), lse


class _Call:
    """One call's tensors and sizes, and the launches of either organisation."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_indices: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        block_size: int,
        scale: float,
    ) -> None:
        self.q, self.k, self.v = rows(q), rows(k), rows(v)
        self.indices = block_indices.contiguous()
        self.cu_seqlens_q, self.cu_seqlens_k = cu_seqlens_q, cu_seqlens_k
        self.total_q, num_heads, self.head_dim = q.shape
        self.total_k, self.num_kv_heads, self.v_head_dim = v.shape
        self.group_size = num_heads // self.num_kv_heads
        self.batch_size = cu_seqlens_q.shape[0] - 1
        self.num_slots = block_indices.shape[2]
        self.block_size = block_size
        self.scale = scale * LOG2_E
        self.out = q.new_empty(self.total_q, num_heads, self.v_head_dim)
        self.lse = q.new_empty(num_heads, self.total_q, dtype=torch.float32)
        self.case = {
            "group_size": self.group_size,
            "block_size": block_size,
            "slots": self.num_slots,
            "row_bytes": row_bytes(q, v),
            "itemsize": q.element_size(),
        }

    def _heads(self, queries: int, tile_rows: int) -> dict[str, int]:
        """The constants that every attention kernel takes."""
        k0, k1 = pieces(self.head_dim)
        v0, v1 = pieces(self.v_head_dim)
        return {
            "GROUP_SIZE": self.group_size,
            "BLOCK_SIZE": self.block_size,
            "QUERIES": queries,
            "ROWS": tile_rows,
            **{"DK": self.head_dim, "K0": k0, "K1": k1, "DV": self.v_head_dim, "V0": v0, "V1": v1},
        }

    def _tiles(self, config: Launch, keys: int) -> tuple[Any, Any]:
        """Descriptors of `keys` rows of k and v where the configuration asks for them and both can have them."""
        described = (tiles_of(self.k, keys), tiles_of(self.v, keys)) if config["tma"] else (None, None)
        return (None, None) if any(x is None for x in described) else described

    def _strides(self) -> tuple[int, ...]:
        return tuple(x.stride(i) for x in (self.q, self.k, self.v) for i in (0, 1))

    def by_query(self, config: Launch) -> None:
        """Query by query: `config` has the rows of a tile, at most 32 queries of a group each."""
        from nsa_kernels_triton.kernels.sharing import shared_kernel, union_kernel

        tile_rows = max(config["rows"], power_of_two(self.group_size))
        queries = max(1, min(tile_rows // self.group_size, 32, ENTRIES // power_of_two(self.num_slots)))
        tiles = count_tiles(self.total_q, self.batch_size, queries)
        listed = self.num_kv_heads * queries * self.num_slots
        in_order = self.num_kv_heads * power_of_two(queries) * power_of_two(self.num_slots)
        chunk = min(tiles, max(1, LISTS // (8 * listed + 4 * in_order)))
        ordered = self.indices.new_empty(chunk * in_order)
        blocks, members = (self.indices.new_empty(chunk * listed) for _ in range(2))
        counts = self.indices.new_empty(chunk * self.num_kv_heads * 2)
        keys = min(config["keys"], self.block_size)
        kv_tiles = self._tiles(config, keys)
        union = launch("union", self.q.device)
        for first in range(0, tiles, chunk):
            grid = min(chunk, tiles - first), self.num_kv_heads
            union_kernel[grid](
                *(self.indices, self.cu_seqlens_q, self.cu_seqlens_k, ordered, blocks, members, counts),
                *(self.batch_size, self.num_kv_heads, self.num_slots, first, 1),
                BLOCK_SIZE=self.block_size,
                QUERIES=queries,
                QUERIES_2=power_of_two(queries),
                SLOTS=power_of_two(self.num_slots),
                STORE=True,
                **union.options,
            )
            shared_kernel[grid](
                *(self.q, self.k, self.v, *kv_tiles, blocks, members, counts),
                *(self.cu_seqlens_q, self.cu_seqlens_k),
                *(self.out, self.lse, self.batch_size, self.total_q, self.num_slots, first, self.scale),
                *self._strides(),
                NUM_KV_HEADS=self.num_kv_heads,
                STAGES=config.num_stages,
                KEYS=keys,
                **self._heads(queries, tile_rows),
                **config.options,
            )

    def by_block(self, config: Launch) -> None:
        """Block by block: `config` has the rows of a tile and how many rows of one kv head a chunk may have.

        Chunks take turns on side streams: while one waits for memory, another multiplies.
        """
        queries = config["rows"] // self.group_size
        part_bytes = self.group_size * (self.num_slots + 1) * (self.v_head_dim * self.q.element_size() + 4)
        tiles = count_tiles(self.total_q, self.batch_size, queries)
        most = config["chunk_rows"] // config["rows"] + 1  # 2^n queries may be one tile more than 2^n / queries
        chunk = evenly(tiles, min(most, PARTS // (STREAMS * queries * part_bytes)))
        chunk_rows = min(chunk * queries, self.total_q)
        streams = side_streams(self.q.device, chunk < tiles)
        heads = evenly(self.num_kv_heads, PARTS // (len(streams) * chunk_rows * part_bytes))
        chunks = [_Chunk(self, config, chunk_rows, heads) for _ in streams]
        take_turns(
            streams, range(0, tiles, chunk), lambda turn, first: chunks[turn].run(first, min(first + chunk, tiles))
        )


class _Chunk:
    """The lists and parts of a chunk of query tiles of the organisation block by block, and its launches."""

    def __init__(self, call: _Call, config: Launch, chunk_rows: int, heads: int) -> None:
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
        self.kv_tiles = call._tiles(config, call.block_size)

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
        constants = call._heads(self.queries, config["rows"])
        merged = {name: constants[name] for name in ("GROUP_SIZE", "QUERIES", "DV", "V0", "V1")}
        head_parts, most_items = self.part_lse[0].numel(), self.items.shape[1]
        programs = min(most_items * num_heads, num_processors(call.q.device) * config["programs"])
        near_kernel[end - first, num_heads](
            *(call.q, call.k, call.v, self.parts, self.part_lse, self.meta, call.cu_seqlens_q, call.cu_seqlens_k),
            *(call.batch_size, call.num_kv_heads, call.num_slots, first, first_head, head_parts, call.scale),
            *call._strides(),
            STAGES=near.num_stages,
            **constants,
            **near.options,
        )
        filed_kernel[(programs,)](
            *(call.q, call.k, call.v, *self.kv_tiles, self.items, self.item_tiles, self.num_items, self.filed),
            *(call.cu_seqlens_q, self.parts, self.part_lse, call.batch_size, most_items, self.filed.shape[1]),
            *(first, first_head, num_heads, head_parts, call.scale),
            *call._strides(),
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
