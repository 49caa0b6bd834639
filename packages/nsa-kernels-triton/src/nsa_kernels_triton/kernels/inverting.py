"""Selected attention, block by block, first half: which queries chose each block.

A chunk of query tiles is inverted at a time: counted, its counts turned into tiles of at most QUERIES queries a block
and items of some tiles, and the queries filed under their block. Three of a query's blocks are left out: block 0, its
own and the one before, which most queries choose and which `kernels.parts` attends to densely; META says which of them
it chose.

Blocks of all sequences are numbered like tiles: block j of sequence b is cu_seqlens_k[b] // BLOCK_SIZE + b + j.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.sharing import chosen_blocks, named_before
from nsa_kernels_triton.kernels.tiles import chunk_start, find_tile, key_rows

CHOSE_OWN = tl.constexpr(1)
CHOSE_PREVIOUS = tl.constexpr(2)
CHOSE_FIRST = tl.constexpr(4)
FAR_SHIFT = tl.constexpr(3)  # above these bits: how many other blocks the query chose


@triton.jit
def far_blocks(
    INDICES,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    tile,
    head,
    batch_size,
    num_kv_heads,
    num_slots,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERIES_2: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Of a tile's entries [QUERIES_2, SLOTS]: (first row, end, block, far, own block, number of block 0, key row 0)."""
    sequence, first, end = find_tile(CU_SEQLENS_Q, tile, batch_size, QUERIES)
    first_key, _, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
    query = tl.arange(0, QUERIES_2)
    slot = tl.arange(0, SLOTS)
    row = first + query
    position = (row + shift - first_key).to(tl.int32)
    there = (query < QUERIES) & (row < end)
    block = chosen_blocks(
        INDICES + head * num_slots,
        row[:, None],
        there[:, None],
        position[:, None],
        slot[None, :],
        num_kv_heads,
        num_slots,
        BLOCK_SIZE,
    )
    entries = INDICES + head * num_slots
    repeated = named_before(entries, block, row, there, position, slot, num_kv_heads, num_slots, BLOCK_SIZE)
    own = tl.where(position >= 0, position // BLOCK_SIZE, -1)
    far = (block > 0) & (block < own[:, None] - 1) & ~repeated
    number = first_key // BLOCK_SIZE + sequence
    return first, end, block, far, own, number, first_key


@triton.jit(do_not_specialize=["batch_size", "num_blocks", "first_tile"])
def count_kernel(
    INDICES,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    COUNTS,
    RANKS,
    META,
    KEY_ROWS,
    batch_size,
    num_kv_heads,
    num_slots,
    num_blocks,
    first_tile,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERIES_2: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """How many queries of the chunk chose each block, and the how-manieth each is. Grid (Hk, tiles).

    COUNTS [Hk, num_blocks], zero before. RANKS [chunk rows, Hk, num_slots]. META [chunk rows, Hk]: what `CHOSE_*` and
    `FAR_SHIFT` say. KEY_ROWS [num_blocks]: first packed key row of each block that was chosen.
    """
    head = tl.program_id(0)
    first, end, block, far, own, number, first_key = far_blocks(
        INDICES,
        CU_SEQLENS_Q,
        CU_SEQLENS_K,
        first_tile + tl.program_id(1),
        head,
        batch_size,
        num_kv_heads,
        num_slots,
        BLOCK_SIZE,
        QUERIES,
        QUERIES_2,
        SLOTS,
    )
    if first < end:
        base = chunk_start(CU_SEQLENS_Q, first_tile, batch_size, QUERIES)
        rank = tl.atomic_add(COUNTS + head * num_blocks + number + block, 1, mask=far, sem="relaxed")
        tl.store(KEY_ROWS + number + block, (first_key + block * BLOCK_SIZE).to(tl.int32), mask=far)
        query = tl.arange(0, QUERIES_2)
        slot = tl.arange(0, SLOTS)
        there = (query < QUERIES) & (first + query < end)
        row = (first - base + query) * num_kv_heads + head
        tl.store(RANKS + row[:, None] * num_slots + slot[None, :], rank, mask=far)
        chose_own = tl.max((block == own[:, None]).to(tl.int32), 1) * (own >= 0).to(tl.int32)
        chose_previous = tl.max((block == own[:, None] - 1).to(tl.int32), 1) * (own >= 1).to(tl.int32)
        chose_first = tl.max((block == 0).to(tl.int32), 1) * (own >= 2).to(tl.int32)
        meta = chose_own * CHOSE_OWN + chose_previous * CHOSE_PREVIOUS + chose_first * CHOSE_FIRST
        tl.store(META + row, meta + (tl.sum(far.to(tl.int32), 1) << FAR_SHIFT), mask=there)


@triton.jit(do_not_specialize=["num_blocks", "most_items"])
def lay_out_kernel(
    COUNTS,
    KEY_ROWS,
    OFFSETS,
    NUM_ITEMS,
    ITEMS,
    ITEM_TILES,
    num_blocks,
    most_items,
    QUERIES: tl.constexpr,
    TURNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Tiles of at most QUERIES queries of one block, and items of at most TURNS of its tiles. Grid (Hk,).

    OFFSETS [Hk, num_blocks]: each block's first tile. ITEMS [Hk, most_items]: key row | queries << 32. ITEM_TILES
    likewise: an item's first tile.
    """
    head = tl.program_id(0)
    COUNTS += head * num_blocks
    OFFSETS += head * num_blocks
    ITEMS += head.to(tl.int64) * most_items
    ITEM_TILES += head.to(tl.int64) * most_items
    laid = 0
    told = 0
    for first in range(0, num_blocks, WIDTH):
        block = first + tl.arange(0, WIDTH)
        count = tl.load(COUNTS + block, mask=block < num_blocks, other=0)
        key_row = tl.load(KEY_ROWS + block, mask=count > 0, other=0).to(tl.int64)
        tiles = (count + QUERIES - 1) // QUERIES
        items = (tiles + TURNS - 1) // TURNS
        tile = laid + tl.cumsum(tiles, 0) - tiles
        item = told + tl.cumsum(items, 0) - items
        tl.store(OFFSETS + block, tile, mask=block < num_blocks)
        for i in range(tl.max(items, 0)):
            queries = tl.minimum(TURNS * QUERIES, count - i * (TURNS * QUERIES)).to(tl.int64)
            tl.store(ITEMS + item + i, key_row | (queries << 32), mask=i < items)
            tl.store(ITEM_TILES + item + i, tile + i * TURNS, mask=i < items)
        laid += tl.sum(tiles, 0)
        told += tl.sum(items, 0)
    tl.store(NUM_ITEMS + head, told)


@triton.jit(do_not_specialize=["batch_size", "num_blocks", "most_tiles", "first_tile"])
def file_kernel(
    INDICES,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    RANKS,
    OFFSETS,
    FILED,
    batch_size,
    num_kv_heads,
    num_slots,
    num_blocks,
    most_tiles,
    first_tile,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERIES_2: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """FILED [Hk, tiles, QUERIES]: chunk row * num_slots + number among its query's far blocks. Grid (Hk, tiles)."""
    head = tl.program_id(0)
    first, end, block, far, _, number, _ = far_blocks(
        INDICES,
        CU_SEQLENS_Q,
        CU_SEQLENS_K,
        first_tile + tl.program_id(1),
        head,
        batch_size,
        num_kv_heads,
        num_slots,
        BLOCK_SIZE,
        QUERIES,
        QUERIES_2,
        SLOTS,
    )
    if first < end:
        base = chunk_start(CU_SEQLENS_Q, first_tile, batch_size, QUERIES)
        row = (first - base + tl.arange(0, QUERIES_2))[:, None]
        rank = tl.load(
            RANKS + (row * num_kv_heads + head) * num_slots + tl.arange(0, SLOTS)[None, :], mask=far, other=0
        )
        offset = tl.load(OFFSETS + head * num_blocks + number + block, mask=far, other=0)
        among = tl.cumsum(far.to(tl.int32), 1) - 1
        place = (head.to(tl.int64) * most_tiles + offset) * QUERIES + rank
        tl.store(FILED + place, (row * num_slots + among).to(tl.int32), mask=far)
