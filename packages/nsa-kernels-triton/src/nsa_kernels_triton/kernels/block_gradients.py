"""Gradients of selected attention, block by block: the queries that chose a block (`kernels.choosers`) as dense tiles.

`block_gradients_kernel` sums dk and dv of a block over them, and leaves what the block adds to each query's dq as a
part. `fold_kernel` adds the sums of blocks that several programs shared, `sum_parts_kernel` the parts of a query. A
chunk of queries is taken at a time, all in a fixed order: results are bitwise the same in every run. Heads are those of
the pointers: a launch may be for some of a tensor's, from the first that they point to.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.gradients import LN_2, add_tile, no_sums
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.tiles import anew, chunk_start, find_tile, key_rows


@triton.jit(do_not_specialize=["batch_size", "most_items", "most_listed", "most_slots", "first_cell", "num_heads"])
def block_gradients_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    LSE_2,
    DELTA,
    ITEMS,
    NUM_ITEMS,
    TAKEN,
    LISTED,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    DK,
    DV,
    SLOTS_DK,
    SLOTS_DV,
    PARTS,
    batch_size,
    most_items,
    most_listed,
    most_slots,
    first_cell,
    num_heads,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_row,
    grad_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CELL: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    WIDE: tl.constexpr,
    ONCE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """DK [Tk, heads, DIM], DV [Tk, heads, V_DIM] of the first `num_heads` kv heads, and parts of dq.

    Sums of a chunk are added to DK and DV, fp32, not yet scaled; ONCE, where there is no other chunk, they are written
    as what DK [Tk, NUM_KV_HEADS, DIM] and DV hold. SLOTS_DK, SLOTS_DV [heads, slots, BLOCK_SIZE, dim], fp32, take sums
    of items that share a block. PARTS [heads, BLOCK_SIZE / KEYS, tiles, ROWS, DIM], not yet scaled, tiles as lists have
    them, or None where dq is taken elsewhere. WIDE: a chunk's queries may be 2^31 elements apart.

    Persistent: a program takes the next item, counted by TAKEN, 0 before, one head's after the other: so its queries
    stay in the L2 cache. Which program does it changes no result.

    Limited by the tensor cores, 4 (Dk + Dv) + 2 Dk operations for each query head and chosen key, where queries arrive
    in time.
    """
    QUERIES: tl.constexpr = ROWS // GROUP_SIZE
    SUBS: tl.constexpr = BLOCK_SIZE // KEYS
    base = chunk_start(CU_SEQLENS_Q, first_cell, batch_size, CELL)
    row = tl.arange(0, ROWS)
    query = row // GROUP_SIZE
    member = row % GROUP_SIZE
    number = -1
    listed_before = 0
    listed_up_to = 0
    taken = tl.atomic_add(TAKEN, 1, sem="relaxed")
    while number < num_heads:
        if taken >= listed_up_to:  # of a later head
            number += 1
            listed_before = listed_up_to
            if number < num_heads:
                listed_up_to += tl.load(NUM_ITEMS + number) * SUBS
        else:
            head = tl.cast(number, tl.int64)
            item = taken - listed_before
            listed_here = LISTED + head * most_listed
            q_here = Q + base * q_row + head * GROUP_SIZE * q_head
            grad_here = GRAD_OUT + base * grad_row + head * GROUP_SIZE * grad_head
            stats_here = base * (NUM_KV_HEADS * GROUP_SIZE) + head * GROUP_SIZE
            described = ITEMS + (head * most_items + item // SUBS) * 4
            block = tl.load(described)
            start = tl.load(described + 1)
            count = tl.load(described + 2)
            slot = tl.load(described + 3)
            sequence, first, end = find_tile(CU_SEQLENS_K, block, batch_size, BLOCK_SIZE)
            first_key, _, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
            sub = item % SUBS * KEYS
            first += sub
            ahead = (first - first_key).to(tl.int32)
            origin = (base + shift - first_key).to(tl.int32)  # position of chunk row 0
            key = tl.arange(0, KEYS)
            near = tl.minimum(key, (end - 1 - first).to(tl.int32))  # beyond the sequence its last key stands in
            k_rows = K + head * k_head + first * k_row + near * k_row
            v_rows = V + head * v_head + first * v_row + near * v_row
            k0 = load_piece(k_rows, None, 0, K0, DIM)
            k1 = load_piece(k_rows, None, K0, K1, DIM)
            v0 = load_piece(v_rows, None, 0, V0, V_DIM)
            v1 = load_piece(v_rows, None, V0, V1, V_DIM)
            dk0, dk1, dv0, dv1 = no_sums(KEYS, K0, K1, V0, V1)
            turns = tl.cdiv(count, QUERIES)
            following = tl.load(listed_here + start + tl.minimum(query, count - 1))
            for turn in tl.range(0, turns, num_stages=STAGES):
                chunk_row = following
                following = tl.load(listed_here + start + tl.minimum((turn + 1) * QUERIES + query, count - 1))
                if WIDE:
                    q_rows = q_here + (chunk_row.to(tl.int64) * q_row + member.to(tl.int64) * q_head)
                    grads = grad_here + (chunk_row.to(tl.int64) * grad_row + member.to(tl.int64) * grad_head)
                else:
                    q_rows = q_here + (chunk_row * q_row + member * q_head)
                    grads = grad_here + (chunk_row * grad_row + member * grad_head)
                # Behind the list its last query stands in.
                q0 = load_piece(q_rows, None, 0, K0, DIM)
                q1 = load_piece(q_rows, None, K0, K1, DIM)
                do0 = load_piece(grads, None, 0, V0, V_DIM)
                do1 = load_piece(grads, None, V0, V1, V_DIM)
                stats = stats_here + (chunk_row * (NUM_KV_HEADS * GROUP_SIZE) + member)
                lse = tl.load(LSE_2 + stats)
                delta = tl.load(DELTA + stats)
                p = tl.exp2(logits(k0, k1, q0, q1) * scale - lse[None, :])
                # Lists ascend: behind their first query all see a block that it sees wholly.
                earliest = tl.load(listed_here + start + turn * QUERIES) + origin
                if (ROWS % GROUP_SIZE > 0) | (turn == turns - 1) | (earliest < ahead + KEYS - 1):
                    seen = (ahead + key)[:, None] <= (origin + chunk_row)[None, :]
                    there = (query < QUERIES) & (turn * QUERIES + query < count)
                    p = tl.where(seen & there[None, :], p, 0.0)
                ds, dk0, dk1, dv0, dv1 = add_tile(p, q0, q1, do0, do1, v0, v1, delta, dk0, dk1, dv0, dv1)
                if PARTS is not None:
                    tile = (head * SUBS + item % SUBS) * (most_listed // QUERIES) + start // QUERIES + turn
                    parts = PARTS + (tile * ROWS + row) * DIM
                    store_piece(parts, key_products(ds, k0, ROWS), row >= 0, 0, K0, DIM)
                    if k1 is not None:
                        store_piece(parts, key_products(ds, k1, ROWS), row >= 0, K0, K1, DIM)
            key = anew(key, batch_size)
            if slot < 0:
                mine = first + key < end
                target = (first + key) * (NUM_KV_HEADS if ONCE else num_heads) + head
                hand_in(DK + target * DIM, dk0, scale * LN_2, mine, 0, K0, DIM, ONCE)
                hand_in(DV + target * V_DIM, dv0, 1.0, mine, 0, V0, V_DIM, ONCE)
                if K1 > 0:
                    hand_in(DK + target * DIM, dk1, scale * LN_2, mine, K0, K1, DIM, ONCE)
                if V1 > 0:
                    hand_in(DV + target * V_DIM, dv1, 1.0, mine, V0, V1, V_DIM, ONCE)
            else:
                whole = key >= 0
                target = (head * most_slots + slot) * BLOCK_SIZE + sub + key
                store_piece(SLOTS_DK + target * DIM, dk0, whole, 0, K0, DIM)
                store_piece(SLOTS_DV + target * V_DIM, dv0, whole, 0, V0, V_DIM)
                if K1 > 0:
                    store_piece(SLOTS_DK + target * DIM, dk1, whole, K0, K1, DIM)
                if V1 > 0:
                    store_piece(SLOTS_DV + target * V_DIM, dv1, whole, V0, V1, V_DIM)
            taken = tl.atomic_add(TAKEN, 1, sem="relaxed")


@triton.jit
def key_products(ds, k, ROWS: tl.constexpr):
    """ds^T k, [rows, width] from ds [keys, rows], with whichever of the two has 64 rows as the one that needs them."""
    if ROWS >= 64:
        part = tl.dot(tl.trans(ds), k, input_precision="ieee")
    else:
        part = tl.trans(tl.dot(tl.trans(k), ds, input_precision="ieee"))
    return part


@triton.jit
def hand_in(ROWS, x, scale, there, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ONCE: tl.constexpr):
    """Add x [n, WIDTH] to the rows at the pointers ROWS [n], this program's alone; ONCE, write it there, scaled."""
    if ONCE:
        store_piece(ROWS, x * scale, there, START, WIDTH, DIM)
    else:
        store_piece(ROWS, load_piece(ROWS, there, START, WIDTH, DIM) + x, there, START, WIDTH, DIM)


@triton.jit(do_not_specialize=["batch_size", "num_blocks", "most_slots"])
def fold_kernel(
    COUNTS,
    SLOTS,
    SLOTS_DK,
    SLOTS_DV,
    CU_SEQLENS_K,
    DK,
    DV,
    batch_size,
    num_blocks,
    most_slots,
    scale,
    PIECE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ONCE: tl.constexpr,
):
    """Hand in the slots of each block that has some, in their order. Grid (num_blocks, heads, block / KEYS).

    DK, DV, ONCE: as of `block_gradients_kernel`; `scale` is that of the logits.
    """
    block = tl.program_id(0)
    number = tl.program_id(1)
    slot = tl.load(SLOTS + number * num_blocks + block)
    if slot >= 0:
        items = tl.cdiv(tl.load(COUNTS + number * num_blocks + block), PIECE)
        _, first, end = find_tile(CU_SEQLENS_K, block, batch_size, BLOCK_SIZE)
        key = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
        there = first + key < end
        source = (number.to(tl.int64) * most_slots + slot) * BLOCK_SIZE + key
        target = (first + key) * (NUM_KV_HEADS if ONCE else tl.num_programs(1)) + number
        dk_rows = SLOTS_DK + source * DIM
        dv_rows = SLOTS_DV + source * V_DIM
        dk0 = sum_slots(dk_rows, items, there, 0, K0, DIM, BLOCK_SIZE)
        dv0 = sum_slots(dv_rows, items, there, 0, V0, V_DIM, BLOCK_SIZE)
        hand_in(DK + target * DIM, dk0, scale * LN_2, there, 0, K0, DIM, ONCE)
        hand_in(DV + target * V_DIM, dv0, 1.0, there, 0, V0, V_DIM, ONCE)
        if K1 > 0:
            dk1 = sum_slots(dk_rows, items, there, K0, K1, DIM, BLOCK_SIZE)
            hand_in(DK + target * DIM, dk1, scale * LN_2, there, K0, K1, DIM, ONCE)
        if V1 > 0:
            dv1 = sum_slots(dv_rows, items, there, V0, V1, V_DIM, BLOCK_SIZE)
            hand_in(DV + target * V_DIM, dv1, 1.0, there, V0, V1, V_DIM, ONCE)


@triton.jit
def sum_slots(
    ROWS, count, there, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The sum of `count` >= 1 slots, in their order; the first one's rows are at the pointers ROWS."""
    total = load_piece(ROWS, there, START, WIDTH, DIM)
    for slot in range(1, count):
        total += load_piece(ROWS + slot * (BLOCK_SIZE * DIM), there, START, WIDTH, DIM)
    return total


@triton.jit(do_not_specialize=["batch_size", "first_cell", "end_cell", "most_tiles"])
def sum_parts_kernel(
    PARTS,
    PLACES,
    CHOSEN,
    CU_SEQLENS_Q,
    DQ,
    batch_size,
    num_kv_heads,
    num_slots,
    first_cell,
    end_cell,
    most_tiles,
    scale,
    GROUP_SIZE: tl.constexpr,
    SUBS: tl.constexpr,
    CELL: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    STAGES: tl.constexpr,
):
    """DQ of a chunk's rows, pairs of a query and a member of the group: `scale` times the sum of its parts.

    Grid (row tiles, heads). Limited by bytes: the parts are read once.
    """
    base = chunk_start(CU_SEQLENS_Q, first_cell, batch_size, CELL)
    rows = (chunk_start(CU_SEQLENS_Q, end_cell, batch_size, CELL) - base).to(tl.int32) * GROUP_SIZE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    query = (row // GROUP_SIZE).to(tl.int64)
    member = row % GROUP_SIZE
    kv_head = tl.program_id(1).to(tl.int64)
    count = tl.load(CHOSEN + query * num_kv_heads + kv_head, mask=there, other=0)
    places = PLACES + (query * num_kv_heads + kv_head) * num_slots
    acc0 = tl.zeros([ROWS, K0], tl.float32)
    acc1 = tl.zeros([ROWS, K1] if K1 > 0 else [1], tl.float32)
    for i in tl.range(0, tl.max(count, 0), num_stages=STAGES):
        has = i < count
        place = tl.load(places + i, mask=has, other=0)
        for sub in tl.static_range(SUBS):
            tile = (kv_head * SUBS + sub) * most_tiles + place // TILE_QUERIES
            part_rows = PARTS + (tile * TILE_ROWS + place % TILE_QUERIES * GROUP_SIZE + member) * DIM
            acc0 += load_piece(part_rows, has, 0, K0, DIM).to(tl.float32)
            if K1 > 0:
                acc1 += load_piece(part_rows, has, K0, K1, DIM).to(tl.float32)
    heads = kv_head * GROUP_SIZE + member
    dq_rows = DQ + ((base + query) * (num_kv_heads * GROUP_SIZE) + heads) * DIM
    store_piece(dq_rows, acc0 * scale, there, 0, K0, DIM)
    if K1 > 0:
        store_piece(dq_rows, acc1 * scale, there, K0, K1, DIM)
