"""Selected attention, query by query: neighbouring queries share the blocks that they chose.

`union_kernel` lists the blocks that the queries of a tile chose between them, each with the queries that did, as bits;
`shared_kernel` streams that list once for all of them. The fewer different blocks neighbours choose, the less is read.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.softmax import empty, finish, update
from nsa_kernels_triton.kernels.tiles import anew, find_tile, key_rows


@triton.jit
def chosen_blocks(INDICES, row, seen, position, slot, num_kv_heads, num_slots, BLOCK_SIZE: tl.constexpr):
    """Entries of block_indices at (row, slot): -1 where there is none, or it begins after `position`."""
    inside = seen & (slot < num_slots)
    block = tl.load(INDICES + row * (num_kv_heads * num_slots) + slot, mask=inside, other=-1)
    known = (position >= 0) & (block <= position // BLOCK_SIZE)  # not block * BLOCK_SIZE: entries may be of any size
    return tl.where(known, tl.maximum(block, -1), -1)


@triton.jit
def named_before(INDICES, block, row, there, position, slot, num_kv_heads, num_slots, BLOCK_SIZE: tl.constexpr):
    """Whether an earlier slot of the same row holds the same block: duplicates count once. [rows, slots]

    Rows that ascend, with none before the end, hold no duplicates; where all do, the slots are not compared.
    """
    behind = there[:, None] & (slot > 0)[None, :]
    before = chosen_blocks(
        *(INDICES, row[:, None], behind, position[:, None], (slot - 1)[None, :], num_kv_heads, num_slots, BLOCK_SIZE)
    )
    falls = behind & (block >= 0) & ((before < 0) | (block <= before))
    repeated = block < -1
    if tl.max(tl.max(falls.to(tl.int32), 1), 0) > 0:
        for other in range(num_slots):
            named = chosen_blocks(
                INDICES, row, there, position, other + tl.zeros_like(position), num_kv_heads, num_slots, BLOCK_SIZE
            )
            repeated = repeated | ((block == named[:, None]) & (other < slot)[None, :])
    return repeated


@triton.jit(do_not_specialize=["batch_size", "first_tile", "tile_step"])
def union_kernel(
    INDICES,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    ORDERED,
    BLOCKS,
    MEMBERS,
    COUNTS,
    batch_size,
    num_kv_heads,
    num_slots,
    first_tile,
    tile_step,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERIES_2: tl.constexpr,
    SLOTS: tl.constexpr,
    STORE: tl.constexpr,
):
    """Distinct blocks of QUERIES neighbouring queries. Grid (tiles, Hk), tile first_tile + tile_step * program.

    COUNTS [tiles, Hk, 2]: how many blocks are wholly visible to every query of the tile, and how many there are in all.
    BLOCKS, MEMBERS [tiles, Hk, QUERIES * num_slots]: those blocks, ascending, so that the wholly visible ones come
    first; bit i of MEMBERS is set for each query i of the tile that chose the block.

    Each query's entries are sorted into ORDERED [tiles, Hk, QUERIES_2, SLOTS], then all queries' lists merged, block by
    block. Limited by latency: a step is a load and a minimum over the queries.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    sequence, first, end = find_tile(CU_SEQLENS_Q, first_tile + program * tile_step, batch_size, QUERIES)
    target = program.to(tl.int64) * num_kv_heads + head
    num_whole = 0
    num_distinct = 0
    if first < end:
        first_key, _end_key, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
        INDICES += head * num_slots
        NONE: tl.constexpr = 0x7FFFFFFF
        query = tl.arange(0, QUERIES_2)
        slot = tl.arange(0, SLOTS)
        row = first + query
        there = (row < end) & (query < QUERIES)
        position = (row + shift - first_key).to(tl.int32)
        block = chosen_blocks(
            INDICES, row[:, None], there[:, None], position[:, None], slot[None, :], num_kv_heads, num_slots, BLOCK_SIZE
        )
        repeated = named_before(INDICES, block, row, there, position, slot, num_kv_heads, num_slots, BLOCK_SIZE)
        lists = ORDERED + target * (QUERIES_2 * SLOTS) + query * SLOTS
        ordered = tl.sort(tl.where((block < 0) | repeated, NONE, block), 1)
        tl.store(lists[:, None] + slot[None, :], ordered)
        tl.debug_barrier()  # what one thread stored another loads
        least = (first + shift - first_key).to(tl.int32)
        BLOCKS += target * (QUERIES * num_slots)
        MEMBERS += target * (QUERIES * num_slots)
        at = tl.zeros([QUERIES_2], tl.int32)
        heads_of_lists = tl.load(lists)
        lowest = tl.min(heads_of_lists, 0)
        while lowest != NONE:
            chose = heads_of_lists == lowest
            if STORE:
                tl.store(BLOCKS + num_distinct, lowest)
                tl.store(MEMBERS + num_distinct, tl.sum(chose.to(tl.int32) << query, 0))
            num_distinct += 1
            num_whole += ((lowest + 1) * BLOCK_SIZE <= least + 1).to(tl.int32)
            at += chose.to(tl.int32)
            following = tl.load(lists + at, mask=chose & (at < SLOTS), other=NONE)
            heads_of_lists = tl.where(chose, following, heads_of_lists)
            lowest = tl.min(heads_of_lists, 0)
    tl.store(COUNTS + target * 2, num_whole)
    tl.store(COUNTS + target * 2 + 1, num_distinct)


@triton.jit
def update_members(s, member, scale, m, norm, acc0, acc1, v0, v1):
    """`softmax.update` of rows that are members; the others stay as they are.

    Their exponentials vanish because they are taken below a maximum of infinity: a choice per row, not per logit.
    """
    top = tl.where(member, tl.maximum(m, tl.max(s, 1) * scale), m)
    shift = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s * scale - tl.where(member, shift, float("inf"))[:, None])
    decay = tl.exp2(m - shift)
    norm = norm * decay + tl.sum(p, 1)
    acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * decay[:, None], input_precision="ieee")
    if v1 is not None:
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * decay[:, None], input_precision="ieee")
    return top, norm, acc0, acc1


@triton.jit(do_not_specialize=["batch_size", "total_q", "first_tile"])
def shared_kernel(
    Q,
    K,
    V,
    K_TILES,
    V_TILES,
    BLOCKS,
    MEMBERS,
    COUNTS,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    OUT,
    LSE,
    batch_size,
    total_q,
    num_slots,
    first_tile,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DK: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out, lse of QUERIES neighbouring queries and one kv head over the blocks listed for them. Grid (tiles, Hk).

    Rows of the tile are (query, head of the group); a block is taken in tiles of KEYS. Limited by what the L2 cache
    delivers where neighbours choose different blocks, by tensor-core issue where they share them.
    """
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, first, end = find_tile(CU_SEQLENS_Q, first_tile + program, batch_size, QUERIES)
    if first < end:
        first_key, end_key, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
        row = tl.arange(0, ROWS)
        query = row // GROUP_SIZE
        there = (query < QUERIES) & (first + query < end)
        position = (first + shift - first_key).to(tl.int32) + query
        heads = head * GROUP_SIZE + row % GROUP_SIZE
        q_rows = Q + first * q_row + query * q_row + heads * q_head
        q0 = load_piece(q_rows, there, 0, K0, DK)
        q1 = load_piece(q_rows, there, K0, K1, DK)
        K += head * k_head
        V += head * v_head
        key = tl.arange(0, KEYS)
        parts: tl.constexpr = BLOCK_SIZE // KEYS
        target = program.to(tl.int64) * NUM_KV_HEADS + head
        BLOCKS += target * (QUERIES * num_slots)
        MEMBERS += target * (QUERIES * num_slots)
        num_whole = tl.load(COUNTS + target * 2)
        num_distinct = tl.load(COUNTS + target * 2 + 1)
        m, norm, acc0, acc1 = empty(ROWS, V0, V1)
        # Of the one or two blocks that hold the queries, keys behind a query are hidden, and rows beyond the end may
        # hold anything, NaN included. The copy engine takes the last KEYS rows of the sequence instead, and hides those
        # that are not of the block. Without it, or where there are fewer, the last key is loaded in their place: of a
        # large tile a quarter of the keys at a time, for more would cost the other loop its registers.
        described: tl.constexpr = K_TILES is not None
        streamed = num_whole
        if described:
            streamed = tl.where(end_key - first_key < KEYS, num_whole, num_distinct)
        NEAR: tl.constexpr = KEYS // 4 if ROWS > 64 and KEYS > 32 else KEYS
        near_parts: tl.constexpr = BLOCK_SIZE // NEAR
        near_key = tl.arange(0, NEAR)
        for i in tl.range(streamed * near_parts, num_distinct * near_parts, num_stages=1):
            block = tl.load(BLOCKS + i // near_parts)
            member = ((tl.load(MEMBERS + i // near_parts) >> query) & 1) != 0
            ahead = block * BLOCK_SIZE + i % near_parts * NEAR
            start = first_key + ahead
            near = tl.minimum(near_key, (end_key - 1 - start).to(tl.int32))
            k_rows = K + start * k_row + near * k_row
            v_rows = V + start * v_row + near * v_row
            s = logits(q0, q1, load_piece(k_rows, None, 0, K0, DK), load_piece(k_rows, None, K0, K1, DK))
            visible = member[:, None] & ((ahead + near_key)[None, :] <= position[:, None])
            s = tl.where(visible, s, float("-inf"))
            v0 = load_piece(v_rows, None, 0, V0, DV)
            v1 = load_piece(v_rows, None, V0, V1, DV)
            m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)
        for i in tl.range(0, streamed * parts, num_stages=STAGES):
            block = tl.load(BLOCKS + i // parts)
            member = ((tl.load(MEMBERS + i // parts) >> query) & 1) != 0
            ahead = block * BLOCK_SIZE + i % parts * KEYS
            start = first_key + ahead
            if described:
                begin = tl.minimum(start, end_key - KEYS)
                s = logits(q0, None, K_TILES.load([begin.to(tl.int32), (head * DK).to(tl.int32)]), None)
                if i >= num_whole * parts:
                    seen = (begin - first_key).to(tl.int32) + key
                    visible = (seen >= ahead)[None, :] & (seen[None, :] <= position[:, None])
                    s = tl.where(visible, s, float("-inf"))
                v0 = V_TILES.load([begin.to(tl.int32), (head * DV).to(tl.int32)])
                v1 = None
            else:
                k_rows = K + start * k_row + key * k_row
                v_rows = V + start * v_row + key * v_row
                s = logits(q0, q1, load_piece(k_rows, None, 0, K0, DK), load_piece(k_rows, None, K0, K1, DK))
                v0 = load_piece(v_rows, None, 0, V0, DV)
                v1 = load_piece(v_rows, None, V0, V1, DV)
            m, norm, acc0, acc1 = update_members(s, member, scale, m, norm, acc0, acc1, v0, v1)
        lse, inverse = finish(m, norm)
        row = anew(row, num_distinct)
        query = row // GROUP_SIZE
        there = (query < QUERIES) & (first + query < end)
        heads = head * GROUP_SIZE + row % GROUP_SIZE
        out_rows = OUT + ((first + query) * (NUM_KV_HEADS * GROUP_SIZE) + heads) * DV
        store_piece(out_rows, acc0 * inverse, there, 0, V0, DV)
        if V1 > 0:
            store_piece(out_rows, acc1 * inverse, there, V0, V1, DV)
        tl.store(LSE + heads * total_q + first + query, lse, mask=there)
