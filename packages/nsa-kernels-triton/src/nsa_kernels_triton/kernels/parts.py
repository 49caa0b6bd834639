"""Selected attention, block by block, second half: each query's parts, over the blocks that it chose.

`filed_kernel` computes what `kernels.inverting` filed: dense tiles of query rows against one block. `near_kernel`
attends to the blocks that were left out, all of a query's at once. Either stores a part with its log-sum-exp; a query
with n filed blocks has parts 0 to n, the last of them the near one. `kernels.merging` adds them.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.inverting import CHOSE_FIRST, CHOSE_OWN, CHOSE_PREVIOUS, FAR_SHIFT
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.softmax import empty, mean, update
from nsa_kernels_triton.kernels.tiles import anew, chunk_start, find_tile, key_rows


@triton.jit(
    do_not_specialize=["batch_size", "most_items", "most_tiles", "first_tile", "first_head", "num_heads", "head_parts"]
)
def filed_kernel(
    Q,
    K,
    V,
    K_TILES,
    V_TILES,
    ITEMS,
    ITEM_TILES,
    NUM_ITEMS,
    FILED,
    CU_SEQLENS_Q,
    PARTS,
    PART_LSE,
    batch_size,
    most_items,
    most_tiles,
    first_tile,
    first_head,
    num_heads,
    head_parts,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    NUM_SLOTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    DK: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """PARTS [heads, chunk rows, 1 + num_slots, G, DV], PART_LSE [heads, chunk rows, 1 + num_slots, G], in base 2.

    Of `num_heads` kv heads from `first_head` on; `head_parts` is how many parts one of them has room for. Persistent:
    every n-th item is a program's, one head's after the other, so that all are at much the same place and one head's
    keys, values and queries stay in the L2 cache. An item's keys and values are loaded once for all its tiles. Every
    key of these blocks is visible to every query filed under them. WIDE: a chunk's queries may be 2^31 elements apart;
    a head's parts are not.

    Limited by the bytes of the parts, where queries arrive in time.
    """
    base = chunk_start(CU_SEQLENS_Q, first_tile, batch_size, QUERIES)
    row = tl.arange(0, ROWS)
    query = row // GROUP_SIZE
    member = row % GROUP_SIZE
    filed_at = tl.minimum(query, QUERIES - 1)
    key = tl.arange(0, BLOCK_SIZE)
    programs = tl.num_programs(0)
    begin = tl.program_id(0)
    for number in range(num_heads):
        head = tl.cast(first_head + number, tl.int64)
        num_items = tl.load(NUM_ITEMS + head)
        items = ITEMS + head * most_items
        item_tiles = ITEM_TILES + head * most_items
        filed_here = FILED + head * most_tiles * QUERIES
        q_here = Q + base * q_row + head * GROUP_SIZE * q_head
        parts = PARTS + tl.cast(number, tl.int64) * head_parts * DV
        part_lses = PART_LSE + tl.cast(number, tl.int64) * head_parts
        for item in tl.range(begin, num_items, programs, num_stages=1):
            described = tl.load(items + item)
            tile = tl.load(item_tiles + item).to(tl.int64)
            start = described & 0xFFFFFFFF
            count = (described >> 32).to(tl.int32)
            if K_TILES is None:
                k_rows = K + head * k_head + start * k_row + key * k_row
                v_rows = V + head * v_head + start * v_row + key * v_row
                k0 = load_piece(k_rows, None, 0, K0, DK)
                k1 = load_piece(k_rows, None, K0, K1, DK)
                v0 = load_piece(v_rows, None, 0, V0, DV)
                v1 = load_piece(v_rows, None, V0, V1, DV)
            else:
                k0 = K_TILES.load([start.to(tl.int32), (head * DK).to(tl.int32)])
                v0 = V_TILES.load([start.to(tl.int32), (head * DV).to(tl.int32)])
                k1 = None
                v1 = None
            turns = tl.cdiv(count, QUERIES)
            following = tl.load(filed_here + tile * QUERIES + filed_at)
            for turn in tl.range(0, turns, num_stages=STAGES):
                there = query < count - turn * QUERIES
                place = tl.where(there, following, 0)
                following = tl.load(filed_here + (tile + tl.minimum(turn + 1, turns - 1)) * QUERIES + filed_at)
                chunk_row = place // NUM_SLOTS
                if WIDE:
                    q_rows = q_here + chunk_row.to(tl.int64) * q_row + member.to(tl.int64) * q_head
                else:
                    q_rows = q_here + (chunk_row * q_row + member * q_head)
                q0 = load_piece(q_rows, there, 0, K0, DK)
                q1 = load_piece(q_rows, there, K0, K1, DK)
                s = logits(q0, q1, k0, k1)
                top = tl.max(s, 1) * scale
                top = tl.where(top == float("-inf"), 0.0, top)  # logits that overflowed: weights of 0, no NaN
                p = tl.exp2(s * scale - top[:, None])
                total = tl.sum(p, 1)
                weighed = tl.where(total > 0, total, 1.0)  # not `mean`: in its order a tile takes 33 registers more
                inverse = (1.0 / weighed)[:, None]
                part = (place + chunk_row) * GROUP_SIZE + member
                part_rows = parts + part * DV
                out0 = tl.dot(p.to(v0.dtype), v0, input_precision="ieee") * inverse
                store_piece(part_rows, out0, there, 0, V0, DV, ".cs")
                if v1 is not None:
                    out1 = tl.dot(p.to(v1.dtype), v1, input_precision="ieee") * inverse
                    store_piece(part_rows, out1, there, V0, V1, DV, ".cs")
                part_lse = tl.where(total > 0, top + tl.log2(weighed), float("-inf"))
                tl.store(part_lses + part, part_lse, mask=there)
        begin += tl.cdiv(num_items, programs) * programs - num_items  # whose turn it is with the next head's first item
        begin = tl.where(begin < programs, begin, begin - programs)


@triton.jit(do_not_specialize=["batch_size", "first_tile", "first_head", "head_parts"])
def near_kernel(
    Q,
    K,
    V,
    PARTS,
    PART_LSE,
    META,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    batch_size,
    num_kv_heads,
    num_slots,
    first_tile,
    first_head,
    head_parts,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    DK: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The last part of each query of a tile: block 0, the one before its own and its own. Grid (tiles, heads).

    Neighbours share these blocks. Limited by latency and tensor cores.
    """
    sequence, first, end = find_tile(CU_SEQLENS_Q, first_tile + tl.program_id(0), batch_size, QUERIES)
    if first < end:
        base = chunk_start(CU_SEQLENS_Q, first_tile, batch_size, QUERIES)
        first_key, end_key, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
        row = tl.arange(0, ROWS)
        query = row // GROUP_SIZE
        member = row % GROUP_SIZE
        there = (query < QUERIES) & (first + query < end)
        least = (first + shift - first_key).to(tl.int32)
        most = (tl.minimum(first + QUERIES, end) - 1 + shift - first_key).to(tl.int32)
        position = least + query
        own = tl.where(position >= 0, position // BLOCK_SIZE, -1)
        kv_head = tl.program_id(1).to(tl.int64) + first_head
        heads = kv_head * GROUP_SIZE + member
        q_rows = Q + first * q_row + query * q_row + heads * q_head
        q0 = load_piece(q_rows, there, 0, K0, DK)
        q1 = load_piece(q_rows, there, K0, K1, DK)
        K += kv_head * k_head
        V += kv_head * v_head
        meta = tl.load(META + (first - base + query) * num_kv_heads + kv_head, mask=there, other=0)
        m, norm, acc0, acc1 = empty(ROWS, V0, V1)
        lowest = tl.maximum(tl.maximum(least, 0) // BLOCK_SIZE - 1, 0)
        highest = tl.where(most >= 0, most // BLOCK_SIZE, -1)
        key = tl.arange(0, BLOCK_SIZE)
        for i in tl.range(tl.where(highest < 0, 0, lowest - 1), highest + 1, num_stages=STAGES):
            block = tl.where(i < lowest, 0, i)  # block 0 before the others
            chosen = tl.where(i < lowest, meta & CHOSE_FIRST, 0)
            chosen = tl.where((i >= lowest) & (block == own), meta & CHOSE_OWN, chosen)
            chosen = tl.where((i >= lowest) & (block == own - 1), meta & CHOSE_PREVIOUS, chosen) != 0
            start = first_key + block * BLOCK_SIZE
            near = tl.minimum(key, (end_key - 1 - start).to(tl.int32))  # beyond the sequence its last key stands in
            k_rows = K + start * k_row + near * k_row
            v_rows = V + start * v_row + near * v_row
            s = logits(q0, q1, load_piece(k_rows, None, 0, K0, DK), load_piece(k_rows, None, K0, K1, DK))
            visible = chosen[:, None] & ((block * BLOCK_SIZE + key)[None, :] <= position[:, None])
            s = tl.where(visible, s, float("-inf"))
            v0 = load_piece(v_rows, None, 0, V0, DV)
            v1 = load_piece(v_rows, None, V0, V1, DV)
            m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)
        lse, inverse = mean(m, norm)
        row = anew(row, batch_size)
        query = row // GROUP_SIZE
        member = row % GROUP_SIZE
        there = (query < QUERIES) & (first + query < end)
        meta = tl.load(META + (first - base + query) * num_kv_heads + kv_head, mask=there, other=0)
        number = (first - base + query) * (num_slots + 1) + (meta >> FAR_SHIFT)
        part = tl.program_id(1).to(tl.int64) * head_parts + number * GROUP_SIZE + member
        part_rows = PARTS + part * DV
        store_piece(part_rows, acc0 * inverse, there, 0, V0, DV)
        if V1 > 0:
            store_piece(part_rows, acc1 * inverse, there, V0, V1, DV)
        tl.store(PART_LSE + part, lse, mask=there)
