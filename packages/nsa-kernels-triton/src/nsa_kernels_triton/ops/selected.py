"""Selected attention in one of two organisations, chosen by data: `configurations`, table `selected_attention`.

Query by query (`kernels.sharing`): neighbouring queries share the blocks that they chose. For large groups, and
wherever neighbours choose much the same. Block by block (`kernels.inverting`, `kernels.merging`): the queries that
chose a block attend to it as one dense tile. For small groups, whose few rows would leave the tensor cores idle.

How much neighbours share is measured on the device (`ops.spread`) and known to a later call, so that nobody waits.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import Launch, launch
from nsa_kernels_triton.ops.descriptors import tiles_of
from nsa_kernels_triton.ops.launching import num_processors, on_device, rows
from nsa_kernels_triton.ops.spread import UNKNOWN, spread_of
from nsa_kernels_triton.tiles import LOG2_E, count_tiles, pieces, power_of_two

WORKSPACE = 256 << 20  # bytes for query by query's lists, or for one head's parts; a tile's own may exceed it
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
        widest = max(sum(pieces(self.head_dim)), sum(pieces(self.v_head_dim)))
        self.case = {
            "group_size": self.group_size,
            "block_size": block_size,
            "slots": self.num_slots,
            "row_bytes": widest * q.element_size(),
            "itemsize": q.element_size(),
        }

    def _heads(self, queries: int, tile_rows: int, halves: bool = False) -> dict[str, int]:
        """The constants that every attention kernel takes; `halves`: values in two pieces that could be one."""
        k0, k1 = pieces(self.head_dim)
        v0, v1 = pieces(self.v_head_dim)
        if halves and self._halves():
            v0 = v1 = self.v_head_dim // 2
        return {
            "GROUP_SIZE": self.group_size,
            "BLOCK_SIZE": self.block_size,
            "QUERIES": queries,
            "ROWS": tile_rows,
            **{"DK": self.head_dim, "K0": k0, "K1": k1, "DV": self.v_head_dim, "V0": v0, "V1": v1},
        }

    def _halves(self) -> bool:
        """Whether a value's row is a power of two that can be cut in halves."""
        return self.v_head_dim >= 32 and pieces(self.v_head_dim) == (self.v_head_dim, 0)

    def _tiles(self, config: Launch, keys: int, parts: int = 1) -> tuple[Any, Any]:
        """Descriptors of `keys` rows of k and v where the configuration asks for them and both can have them."""
        described = (tiles_of(self.k, keys), tiles_of(self.v, keys, parts)) if config["tma"] else (None, None)
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
        chunk = min(tiles, max(1, WORKSPACE // (8 * listed + 4 * in_order)))
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
        """Block by block: `config` has the rows of a tile and how many rows of one kv head a chunk may have."""
        from nsa_kernels_triton.kernels.inverting import count_kernel, file_kernel, lay_out_kernel
        from nsa_kernels_triton.kernels.merging import filed_kernel, merge_kernel

        queries = config["rows"] // self.group_size
        num_kv_heads, num_slots = self.num_kv_heads, self.num_slots
        part = self.group_size * num_slots * (self.v_head_dim * self.q.element_size() + 4)
        tiles = count_tiles(self.total_q, self.batch_size, queries)
        most = min(config["chunk_rows"] // (queries * self.group_size), WORKSPACE // (queries * part))
        chunk = min(tiles, max(1, most))
        chunk_rows = min(chunk * queries, self.total_q)
        num_blocks = count_tiles(self.total_k, self.batch_size, self.block_size)
        most_tiles = chunk_rows * num_slots // queries + min(num_blocks, chunk_rows * num_slots)

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return self.indices.new_empty(shape, dtype=dtype)

        counts, offsets = ints(num_kv_heads, num_blocks), ints(num_kv_heads, num_blocks)
        key_rows, num_tiles = ints(num_blocks), ints(num_kv_heads)
        ranks, meta = ints(chunk_rows, num_kv_heads, num_slots), ints(chunk_rows, num_kv_heads)
        described = ints(num_kv_heads, most_tiles, dtype=torch.int64)
        filed = ints(num_kv_heads, most_tiles, queries)
        parts = self.q.new_empty(chunk_rows, num_slots, self.group_size, self.v_head_dim)
        part_lse = self.lse.new_empty(chunk_rows, num_slots, self.group_size)
        entries = {
            "BLOCK_SIZE": self.block_size,
            "QUERIES": queries,
            "QUERIES_2": power_of_two(queries),
            "SLOTS": power_of_two(num_slots),
        }
        halves = config["halves"] > 0
        kv_tiles = self._tiles(config, self.block_size, 1 + (halves and self._halves()))
        filing, laying = (
            launch("filing", self.q.device, entries=queries * num_slots),
            launch("laying_out", self.q.device),
        )
        merging = launch("merging", self.q.device, **self.case)
        programs = min(most_tiles, num_processors(self.q.device) * config["programs"])
        sizes = self.batch_size, num_kv_heads, num_slots
        for first in range(0, tiles, chunk):
            grid = min(chunk, tiles - first), num_kv_heads
            counts.zero_()
            count_kernel[grid](
                *(self.indices, self.cu_seqlens_q, self.cu_seqlens_k, counts, ranks, meta, key_rows),
                *(*sizes, num_blocks, first),
                **(entries | filing.options),
            )
            lay_out_kernel[(num_kv_heads,)](
                *(counts, key_rows, offsets, num_tiles, described, num_blocks, most_tiles),
                QUERIES=queries,
                WIDTH=laying["width"],
                **laying.options,
            )
            file_kernel[grid](
                *(self.indices, self.cu_seqlens_q, self.cu_seqlens_k, ranks, offsets, filed),
                *(*sizes, num_blocks, most_tiles, first),
                **(entries | filing.options),
            )
            for head in range(num_kv_heads):
                filed_kernel[(programs,)](
                    *(self.q, self.k, self.v, *kv_tiles, described, num_tiles, filed),
                    *(self.cu_seqlens_q, parts, part_lse),
                    *(self.batch_size, most_tiles, first, head, self.scale),
                    *self._strides(),
                    NUM_SLOTS=num_slots,
                    **self._heads(queries, config["rows"], halves),
                    **config.options,
                )
                merge_kernel[grid[:1]](
                    *(self.q, self.k, self.v, parts, part_lse, meta, self.cu_seqlens_q, self.cu_seqlens_k),
                    *(self.out, self.lse, self.batch_size, self.total_q, num_slots, first, head, self.scale),
                    *self._strides(),
                    NUM_KV_HEADS=num_kv_heads,
                    STAGES=merging.num_stages,
                    **self._heads(queries, config["rows"]),
                    **merging.options,
                )
