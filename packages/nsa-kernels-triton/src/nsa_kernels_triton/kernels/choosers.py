"""Which queries chose each block: the inverse of block_indices, in an order that does not depend on timing.

A chunk of cells is inverted at a time. A cell is CELL neighbouring queries of one sequence; for each block that they
chose, MARKS holds a bit for each that did. Bits are set in any order and are the same: a query's place in its block's
list is the number of bits before its own. Cells of a chunk with all blocks are a matrix, whose size bounds the chunk.

Blocks of all sequences are numbered like tiles: block j of sequence b is cu_seqlens_k[b] // BLOCK_SIZE + b + j.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.sharing import chosen_blocks, named_before
from nsa_kernels_triton.kernels.tiles import chunk_start, find_tile, key_rows
from nsa_kernels_triton.kernels.topk import popcount


@triton.jit
def cell_blocks(
    INDICES,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    cell,
    head,
    batch_size,
    num_kv_heads,
    num_slots,
    BLOCK_SIZE: tl.constexpr,
    CELL: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Of a cell's entries [CELL, SLOTS]: (first row, end of the sequence, number of the block, whether it counts)."""
    sequence, first, end = find_tile(CU_SEQLENS_Q, cell, batch_size, CELL)
    first_key, _, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
    row = first + tl.arange(0, CELL)
    slot = tl.arange(0, SLOTS)
    position = (row + shift - first_key).to(tl.int32)
    there = row < end
    entries = INDICES + head * num_slots
    block = chosen_blocks(
        entries, row[:, None], there[:, None], position[:, None], slot[None, :], num_kv_heads, num_slots, BLOCK_SIZE
    )
    repeated = named_before(entries, block, row, there, position, slot, num_kv_heads, num_slots, BLOCK_SIZE)
    number = (first_key // BLOCK_SIZE + sequence).to(tl.int32)
    return first, end, number + block, (block >= 0) & ~repeated


@triton.jit(do_not_specialize=["batch_size", "num_blocks", "first_cell"])
def mark_kernel(
    INDICES,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    MARKS,
    CHOSEN,
    batch_size,
    num_kv_heads,
    num_slots,
    num_blocks,
    first_cell,
    BLOCK_SIZE: tl.constexpr,
    CELL: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """MARKS [Hk, cells, num_blocks, 2], zero before: the bits of a cell. CHOSEN [chunk rows, Hk]: blocks of a query.

    Grid (Hk, cells). Limited by latency and atomics.
    """
    head = tl.program_id(0)
    first, end, number, counts = cell_blocks(
        INDICES,
        CU_SEQLENS_Q,
        CU_SEQLENS_K,
        first_cell + tl.program_id(1),
        head,
        batch_size,
        num_kv_heads,
        num_slots,
        BLOCK_SIZE,
        CELL,
        SLOTS,
    )
    if first < end:
        base = chunk_start(CU_SEQLENS_Q, first_cell, batch_size, CELL)
        query = tl.arange(0, CELL)
        marks = MARKS + (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_blocks * 2
        bits = (1 << query)[:, None] + tl.zeros([CELL, SLOTS], tl.int32)
        tl.atomic_or(marks + number * 2, bits, mask=counts, sem="relaxed")
        chosen = CHOSEN + (first - base + query) * num_kv_heads + head
        tl.store(chosen, tl.sum(counts.to(tl.int32), 1), mask=first + query < end)


@triton.jit(do_not_specialize=["num_blocks", "num_cells"])
def tally_kernel(MARKS, TALLIES, num_blocks, num_cells, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """TALLIES [Hk, segments, num_blocks]: bits set in each DEPTH cells. Grid (blocks / WIDTH, Hk, segments).

    Limited by bytes: the matrix is read.
    """
    block = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    marks, there = segment(MARKS, block, num_blocks, num_cells, DEPTH)
    many = popcount(tl.load(marks, mask=there, other=0))
    tallies = TALLIES + (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * num_blocks
    tl.store(tallies + block, tl.sum(many, 0), mask=block < num_blocks)


@triton.jit(do_not_specialize=["num_blocks", "num_cells"])
def rank_kernel(
    MARKS,
    TALLIES,
    COUNTS,
    num_blocks,
    num_cells,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Beside each cell's bits, how many are set in the cells before; COUNTS [Hk, num_blocks]: in all of them.

    Grid as of `tally_kernel`. Limited by bytes: the matrix is read and half of it written.
    """
    block = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    known = block < num_blocks
    before = tl.zeros([WIDTH], tl.int32)
    tallies = TALLIES + tl.program_id(1) * tl.num_programs(2) * num_blocks + block
    for earlier in range(tl.program_id(2)):
        before += tl.load(tallies + earlier * num_blocks, mask=known, other=0)
    marks, there = segment(MARKS, block, num_blocks, num_cells, DEPTH)
    many = popcount(tl.load(marks, mask=there, other=0))
    tl.store(marks + 1, before[None, :] + tl.cumsum(many, 0) - many, mask=there)
    if tl.program_id(2) == tl.num_programs(2) - 1:
        tl.store(COUNTS + tl.program_id(1) * num_blocks + block, before + tl.sum(many, 0), mask=known)


@triton.jit
def segment(MARKS, block, num_blocks, num_cells, DEPTH: tl.constexpr):
    """(pointers, which are there) [DEPTH, blocks] to the marks of a program's head and segment of cells."""
    cell = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
    there = (cell < num_cells)[:, None] & (block < num_blocks)[None, :]
    row = tl.program_id(1).to(tl.int64) * num_cells + cell
    return MARKS + row[:, None] * num_blocks * 2 + block[None, :] * 2, there


@triton.jit(do_not_specialize=["num_blocks", "most_items"])
def items_kernel(
    COUNTS,
    STARTS,
    SLOTS,
    ITEMS,
    NUM_ITEMS,
    num_blocks,
    most_items,
    QUERIES: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where each block's list starts, at a multiple of QUERIES, and items of at most PIECE of its queries. Grid (Hk,).

    STARTS, SLOTS [Hk, num_blocks]: place of its first query; of a block of several items, the first of as many slots
    for what they sum up, else -1. ITEMS [Hk, most_items, 4]: block, first place, queries, slot or -1.
    """
    head = tl.program_id(0)
    COUNTS += head * num_blocks
    STARTS += head * num_blocks
    SLOTS += head * num_blocks
    ITEMS += head.to(tl.int64) * most_items * 4
    listed = 0
    told = 0
    slots = 0
    for first in range(0, num_blocks, WIDTH):
        block = first + tl.arange(0, WIDTH)
        count = tl.load(COUNTS + block, mask=block < num_blocks, other=0)
        items = (count + PIECE - 1) // PIECE
        split = tl.where(items > 1, items, 0)
        room = (count + QUERIES - 1) // QUERIES * QUERIES
        start = listed + tl.cumsum(room, 0) - room
        item = told + tl.cumsum(items, 0) - items
        slot = tl.where(items > 1, slots + tl.cumsum(split, 0) - split, -1)
        tl.store(STARTS + block, start, mask=block < num_blocks)
        tl.store(SLOTS + block, slot, mask=block < num_blocks)
        for i in range(tl.max(items, 0)):
            has = i < items
            target = ITEMS + (item + i).to(tl.int64) * 4
            tl.store(target, block, mask=has)
            tl.store(target + 1, start + i * PIECE, mask=has)
            tl.store(target + 2, tl.minimum(PIECE, count - i * PIECE), mask=has)
            tl.store(target + 3, tl.where(items > 1, slot + i, -1), mask=has)
        listed += tl.sum(room, 0)
        told += tl.sum(items, 0)
        slots += tl.sum(split, 0)
    tl.store(NUM_ITEMS + head, told)


@triton.jit(do_not_specialize=["batch_size", "num_blocks", "most_listed", "first_cell"])
def list_kernel(
    INDICES,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    MARKS,
    STARTS,
    LISTED,
    PLACES,
    batch_size,
    num_kv_heads,
    num_slots,
    num_blocks,
    most_listed,
    first_cell,
    BLOCK_SIZE: tl.constexpr,
    CELL: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """LISTED [Hk, most_listed]: the chunk rows that chose each block, ascending. Grid (Hk, cells).

    PLACES [chunk rows, Hk, num_slots]: where a query is listed, for each of its blocks.
    """
    head = tl.program_id(0)
    first, end, number, counts = cell_blocks(
        INDICES,
        CU_SEQLENS_Q,
        CU_SEQLENS_K,
        first_cell + tl.program_id(1),
        head,
        batch_size,
        num_kv_heads,
        num_slots,
        BLOCK_SIZE,
        CELL,
        SLOTS,
    )
    if first < end:
        base = chunk_start(CU_SEQLENS_Q, first_cell, batch_size, CELL)
        query = tl.arange(0, CELL)
        marks = MARKS + (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_blocks * 2 + number * 2
        before = popcount(tl.load(marks, mask=counts, other=0) & ((1 << query) - 1)[:, None])
        rank = before + tl.load(marks + 1, mask=counts, other=0)
        start = tl.load(STARTS + head * num_blocks + number, mask=counts, other=0)
        among = tl.cumsum(counts.to(tl.int32), 1) - 1
        place = start + rank
        row = (first - base + query)[:, None]
        tl.store(LISTED + head.to(tl.int64) * most_listed + place, row.to(tl.int32) + tl.zeros_like(place), mask=counts)
        tl.store(PLACES + (row * num_kv_heads + head) * num_slots + among, place, mask=counts)
