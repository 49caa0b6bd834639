"""Selected attention, query by query: the launches of `kernels.sharing`."""

from nsa_kernels_triton.configurations import Launch, launch
from nsa_kernels_triton.ops.selected_call import SelectedCall
from nsa_kernels_triton.tiles import count_tiles, evenly, power_of_two

LISTS = 256 << 20  # bytes, about, for the shared lists; a tile's own may exceed it
ENTRIES = 1024  # of block_indices that one warp sorts and merges


def by_query(call: SelectedCall, config: Launch) -> None:
    """Query by query: `config` has the rows of a tile, at most 32 queries of a group each."""
    from nsa_kernels_triton.kernels.sharing import shared_kernel, union_kernel

    tile_rows = max(config["rows"], power_of_two(call.group_size))
    queries = max(1, min(tile_rows // call.group_size, 32, ENTRIES // power_of_two(call.num_slots)))
    tiles = count_tiles(call.total_q, call.batch_size, queries)
    listed = call.num_kv_heads * queries * call.num_slots
    in_order = call.num_kv_heads * power_of_two(queries) * power_of_two(call.num_slots)
    chunk = evenly(tiles, LISTS // (8 * listed + 4 * in_order))
    ordered = call.indices.new_empty(chunk * in_order)
    blocks, members = (call.indices.new_empty(chunk * listed) for _ in range(2))
    counts = call.indices.new_empty(chunk * call.num_kv_heads * 2)
    keys = min(config["keys"], call.block_size)
    kv_tiles = call.kv_tiles(config, keys)
    union = launch("union", call.q.device)
    for first in range(0, tiles, chunk):
        grid = min(chunk, tiles - first), call.num_kv_heads
        union_kernel[grid](
            *(call.indices, call.cu_seqlens_q, call.cu_seqlens_k, ordered, blocks, members, counts),
            *(call.batch_size, call.num_kv_heads, call.num_slots, first, 1),
            BLOCK_SIZE=call.block_size,
            QUERIES=queries,
            QUERIES_2=power_of_two(queries),
            SLOTS=power_of_two(call.num_slots),
            STORE=True,
            **union.options,
        )
        shared_kernel[grid](
            *(call.q, call.k, call.v, *kv_tiles, blocks, members, counts),
            *(call.cu_seqlens_q, call.cu_seqlens_k),
            *(call.out, call.lse, call.batch_size, call.total_q, call.num_slots, first, call.scale),
            *call.strides(),
            NUM_KV_HEADS=call.num_kv_heads,
            STAGES=config.num_stages,
            KEYS=keys,
            **call.constants(queries, tile_rows),
            **config.options,
        )
