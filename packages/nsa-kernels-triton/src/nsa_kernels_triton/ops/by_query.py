"""Selected attention, query by query: the launches of `kernels.sharing` and `kernels.sharing_gradients`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from nsa_kernels_triton.configurations import Launch, launch
from nsa_kernels_triton.ops.selected_call import SelectedCall
from nsa_kernels_triton.tiles import count_tiles, evenly, pieces_alike, power_of_two

LISTS = 256 << 20  # bytes, about, for the shared lists; a tile's own may exceed it
ENTRIES = 1024  # of block_indices that one warp sorts and merges


class _Tiles(NamedTuple):
    """Tiles of neighbouring queries from number `first` on, with the lists of their blocks: see `union_kernel`."""

    first: int
    grid: tuple[int, int]
    lists: tuple[Tensor, Tensor, Tensor]


def by_query(call: SelectedCall, config: Launch) -> None:
    """The forward: `config` has the rows of a tile, at most 32 queries of a group each."""
    from nsa_kernels_triton.kernels.sharing import shared_kernel

    rows, queries, keys = _tile(call, config)
    constants = _constants(call, config, rows, queries, keys)
    (k0, k1), (v0, v1) = pieces_alike(call.head_dim, call.v_head_dim)
    widths = {"K0": k0, "K1": k1, "V0": v0, "V1": v1}
    padded = constants != constants | widths  # which tiles by a descriptor are not
    kv_tiles = (None, None) if padded else call.kv_tiles(config, keys)
    for tiles in _shared(call, queries):
        shared_kernel[tiles.grid](
            *(call.q, call.k, call.v, *kv_tiles, *tiles.lists, call.cu_seqlens_q, call.cu_seqlens_k),
            *(call.out, call.lse, call.batch_size, call.total_q, call.num_slots, tiles.first, call.scale),
            *call.strides(),
            **constants | widths,
        )


def dq_by_query(call: SelectedCall, config: Launch, grad_out: Tensor, lse_2: Tensor, delta: Tensor, dq: Tensor) -> None:
    """dq, from the gradient of the result and the statistics of its rows; `config` as of `by_query`."""
    from nsa_kernels_triton.kernels.sharing_gradients import shared_dq_kernel

    rows, queries, keys = _tile(call, config)
    kv_tiles = call.kv_tiles(config, keys)
    for tiles in _shared(call, queries):
        shared_dq_kernel[tiles.grid](
            *(call.q, call.k, call.v, *kv_tiles, grad_out, lse_2, delta, *tiles.lists),
            *(call.cu_seqlens_q, call.cu_seqlens_k, dq),
            *(call.batch_size, call.total_q, call.num_slots, tiles.first, call.scale),
            *(*call.strides(), grad_out.stride(0), grad_out.stride(1)),
            **_constants(call, config, rows, queries, keys),
        )


def _tile(call: SelectedCall, config: Launch) -> tuple[int, int, int]:
    """(rows, queries, keys) of a tile."""
    rows = max(config["rows"], power_of_two(call.group_size))
    queries = max(1, min(rows // call.group_size, 32, ENTRIES // power_of_two(call.num_slots)))
    return rows, queries, min(config["keys"], call.block_size)


def _constants(call: SelectedCall, config: Launch, rows: int, queries: int, keys: int) -> dict[str, Any]:
    sizes = {"NUM_KV_HEADS": call.num_kv_heads, "STAGES": config.num_stages, "KEYS": keys}
    return sizes | call.constants(queries, rows) | config.options


def _shared(call: SelectedCall, queries: int) -> Iterator[_Tiles]:
    """All tiles of `queries` queries, as many at a time as LISTS allows; their lists are written over by the next."""
    from nsa_kernels_triton.kernels.sharing import union_kernel

    tiles = count_tiles(call.total_q, call.batch_size, queries)
    listed = call.num_kv_heads * queries * call.num_slots
    in_order = call.num_kv_heads * power_of_two(queries) * power_of_two(call.num_slots)
    chunk = evenly(tiles, LISTS // (8 * listed + 4 * in_order))
    ordered = call.indices.new_empty(chunk * in_order)
    blocks, members = (call.indices.new_empty(chunk * listed) for _ in range(2))
    counts = call.indices.new_empty(chunk * call.num_kv_heads * 2)
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
        yield _Tiles(first, grid, (blocks, members, counts))
