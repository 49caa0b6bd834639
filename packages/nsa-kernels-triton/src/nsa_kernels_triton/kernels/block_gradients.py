"""Gradients of selected attention, block by block: the queries that chose a block (`kernels.choosers`) as dense tiles.

`block_gradients_kernel` sums dk and dv of a block over them, and leaves what the block adds to each query's dq as a
part. `fold_kernel` adds the sums of blocks that several programs shared, `sum_parts_kernel` the parts of a query. A
chunk of queries is taken at a time, all in a fixed order: results are bitwise the same in every run. Heads are those of
the pointers: a launch may be for some of a tensor's, from the first that they point to.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.inverting import chunk_start
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.tiles import anew, find_tile, key_rows


@triton.jit(
    do_not_specialize=["batch_size", "most_items", "most_listed", "most_slots", "first_cell", "num_heads", "head_parts"]
)
def block_gradients_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    LSE_2,
    DELTA,
    ITEMS,
    NUM_ITEMS,
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
    head_parts,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_row,
    grad_head,
    NUM_SLOTS: tl.constexpr,
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
    STAGES: tl.constexpr,
):
    """Adds to DK [Tk, heads, DIM], DV [Tk, heads, V_DIM], fp32, not yet scaled, for the first `num_heads` kv heads.

    PARTS [heads, chunk rows, NUM_SLOTS, BLOCK_SIZE / KEYS, G, DIM], not yet scaled; None where dq is taken elsewhere.
    SLOTS_DK, SLOTS_DV [heads, slots, BLOCK_SIZE, dim]: sums of items that share a block. Persistent: every n-th item is
    a program's, one head's after the other, so that one head's queries stay in the L2 cache. Tiles are [keys, rows]:
    so p and ds are in the layout that the products with do and q take from registers.

    Limited by the tensor cores, 4 (Dk + Dv) + 2 Dk operations for each query head and chosen key, where queries arrive
    in time.
    """
    QUERIES: tl.constexpr = ROWS // GROUP_SIZE
    SUBS: tl.constexpr = BLOCK_SIZE // KEYS
    base = chunk_start(CU_SEQLENS_Q, first_cell, batch_size, CELL)
    row = tl.arange(0, ROWS)
    query = row // GROUP_SIZE
    member = row % GROUP_SIZE
    programs = tl.num_programs(0)
    begin = tl.program_id(0)
    for number in range(num_heads):
        head = tl.cast(number, tl.int64)
        num_items = tl.load(NUM_ITEMS + head) * SUBS
        listed_here = LISTED + head * most_listed
        q_here = Q + base * q_row + head * GROUP_SIZE * q_head + member * q_head
        grad_here = GRAD_OUT + base * grad_row + head * GROUP_SIZE * grad_head + member * grad_head
        stats_here = base * (NUM_KV_HEADS * GROUP_SIZE) + head * GROUP_SIZE + member
        for item in tl.range(begin, num_items, programs, num_stages=1):
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
            dk0 = tl.zeros([KEYS, K0], tl.float32)
            dk1 = tl.zeros([KEYS, K1] if K1 > 0 else [1], tl.float32)
            dv0 = tl.zeros([KEYS, V0], tl.float32)
            dv1 = tl.zeros([KEYS, V1] if V1 > 0 else [1], tl.float32)
            turns = tl.cdiv(count, QUERIES)
            following = tl.load(listed_here + start + tl.minimum(query, count - 1))
            for turn in tl.range(0, turns, num_stages=STAGES):
                place = following
                there = (query < QUERIES) & (turn * QUERIES + query < count)
                ahead_of = tl.minimum((turn + 1) * QUERIES + query, count - 1)
                following = tl.load(listed_here + start + ahead_of)
                chunk_row = place // NUM_SLOTS
                wide = chunk_row.to(tl.int64)
                q0 = load_piece(q_here + wide * q_row, there, 0, K0, DIM)
                q1 = load_piece(q_here + wide * q_row, there, K0, K1, DIM)
                do0 = load_piece(grad_here + wide * grad_row, there, 0, V0, V_DIM)
                do1 = load_piece(grad_here + wide * grad_row, there, V0, V1, V_DIM)
                stats = stats_here + wide * (NUM_KV_HEADS * GROUP_SIZE)
                lse = tl.load(LSE_2 + stats, mask=there, other=float("inf"))
                delta = tl.load(DELTA + stats, mask=there, other=0.0)
                p = tl.exp2(logits(k0, k1, q0, q1) * scale - lse[None, :])
                # Lists ascend: behind their first query all see a block that it sees wholly.
                earliest = tl.load(listed_here + start + turn * QUERIES) // NUM_SLOTS + origin
                if earliest < ahead + KEYS - 1:
                    p = tl.where((ahead + key)[:, None] <= (origin + chunk_row)[None, :], p, 0.0)
                dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision="ieee")
                if do1 is not None:
                    dv1 = tl.dot(p.to(do0.dtype), do1, dv1, input_precision="ieee")
                ds = (p * (logits(v0, v1, do0, do1) - delta[None, :])).to(q0.dtype)
                dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
                if q1 is not None:
                    dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
                if PARTS is not None:
                    part = head * head_parts + ((place * SUBS + item % SUBS) * GROUP_SIZE + member)
                    ds_rows = tl.trans(ds)
                    part0 = tl.dot(ds_rows, k0, input_precision="ieee")
                    store_piece(PARTS + part * DIM, part0, there, 0, K0, DIM, ".cs")
                    if k1 is not None:
                        part1 = tl.dot(ds_rows, k1, input_precision="ieee")
                        store_piece(PARTS + part * DIM, part1, there, K0, K1, DIM, ".cs")
            key = anew(key, batch_size)
            if slot < 0:
                mine = first + key < end
                target = (first + key) * num_heads + head
                add_rows(DK + target * DIM, dk0, dk1, mine, K0, K1, DIM)
                add_rows(DV + target * V_DIM, dv0, dv1, mine, V0, V1, V_DIM)
            else:
                whole = key >= 0
                target = (head * most_slots + slot) * BLOCK_SIZE + sub + key
                store_piece(SLOTS_DK + target * DIM, dk0, whole, 0, K0, DIM)
                store_piece(SLOTS_DV + target * V_DIM, dv0, whole, 0, V0, V_DIM)
                if K1 > 0:
                    store_piece(SLOTS_DK + target * DIM, dk1, whole, K0, K1, DIM)
                if V1 > 0:
                    store_piece(SLOTS_DV + target * V_DIM, dv1, whole, V0, V1, V_DIM)
        begin += tl.cdiv(num_items, programs) * programs - num_items  # whose turn it is with the next head's first item
        begin = tl.where(begin < programs, begin, begin - programs)


@triton.jit
def add_rows(ROWS, x0, x1, there, X0: tl.constexpr, X1: tl.constexpr, DIM: tl.constexpr):
    """Add x0, x1 to the rows at the pointers ROWS: this program's alone."""
    store_piece(ROWS, load_piece(ROWS, there, 0, X0, DIM) + x0, there, 0, X0, DIM)
    if X1 > 0:
        store_piece(ROWS, load_piece(ROWS, there, X0, X1, DIM) + x1, there, X0, X1, DIM)


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
    PIECE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
):
    """Add the slots of each block that has some to DK and DV, in their order. Grid (num_blocks, heads, block / KEYS)."""
    block = tl.program_id(0)
    number = tl.program_id(1)
    slot = tl.load(SLOTS + number * num_blocks + block)
    if slot >= 0:
        items = tl.cdiv(tl.load(COUNTS + number * num_blocks + block), PIECE)
        _, first, end = find_tile(CU_SEQLENS_K, block, batch_size, BLOCK_SIZE)
        key = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
        there = first + key < end
        source = (number.to(tl.int64) * most_slots + slot) * BLOCK_SIZE + key
        dk0 = tl.zeros([KEYS, K0], tl.float32)
        dk1 = tl.zeros([KEYS, K1] if K1 > 0 else [1], tl.float32)
        dv0 = tl.zeros([KEYS, V0], tl.float32)
        dv1 = tl.zeros([KEYS, V1] if V1 > 0 else [1], tl.float32)
        for _ in range(items):
            dk0 += load_piece(SLOTS_DK + source * DIM, there, 0, K0, DIM)
            dv0 += load_piece(SLOTS_DV + source * V_DIM, there, 0, V0, V_DIM)
            if K1 > 0:
                dk1 += load_piece(SLOTS_DK + source * DIM, there, K0, K1, DIM)
            if V1 > 0:
                dv1 += load_piece(SLOTS_DV + source * V_DIM, there, V0, V1, V_DIM)
            source += BLOCK_SIZE
        target = (first + key) * tl.num_programs(1) + number
        add_rows(DK + target * DIM, dk0, dk1, there, K0, K1, DIM)
        add_rows(DV + target * V_DIM, dv0, dv1, there, V0, V1, V_DIM)


@triton.jit(do_not_specialize=["batch_size", "first_cell", "end_cell", "head_parts"])
def sum_parts_kernel(
    PARTS,
    CHOSEN,
    CU_SEQLENS_Q,
    DQ,
    batch_size,
    num_kv_heads,
    num_slots,
    first_cell,
    end_cell,
    head_parts,
    scale,
    GROUP_SIZE: tl.constexpr,
    SUBS: tl.constexpr,
    CELL: tl.constexpr,
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
    parts = tl.load(CHOSEN + query * num_kv_heads + kv_head, mask=there, other=0) * SUBS
    source = kv_head * head_parts + query * num_slots * (SUBS * GROUP_SIZE) + member
    acc0 = tl.zeros([ROWS, K0], tl.float32)
    acc1 = tl.zeros([ROWS, K1] if K1 > 0 else [1], tl.float32)
    for i in tl.range(0, tl.max(parts, 0), num_stages=STAGES):
        has = i < parts
        part_rows = PARTS + (source + i * GROUP_SIZE) * DIM
        acc0 += load_piece(part_rows, has, 0, K0, DIM).to(tl.float32)
        if K1 > 0:
            acc1 += load_piece(part_rows, has, K0, K1, DIM).to(tl.float32)
    heads = kv_head * GROUP_SIZE + member
    dq_rows = DQ + ((base + query) * (num_kv_heads * GROUP_SIZE) + heads) * DIM
    store_piece(dq_rows, acc0 * scale, there, 0, K0, DIM)
    if K1 > 0:
        store_piece(dq_rows, acc1 * scale, there, K0, K1, DIM)
