"""Selected attention, block by block, second half: each block's queries attend to it, then a query's parts are merged.

`filed_kernel` computes what `kernels.inverting` filed: dense tiles of query rows against one block, each row's part
stored with its log-sum-exp. `merge_kernel` attends to the blocks that were left out, and adds the parts.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.inverting import CHOSE_FIRST, CHOSE_OWN, CHOSE_PREVIOUS, FAR_SHIFT, chunk_start
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.softmax import empty, finish, update
from nsa_kernels_triton.kernels.tiles import find_tile, key_rows


@triton.jit(do_not_specialize=["batch_size", "most_tiles", "first_tile", "head"])
def filed_kernel(
    Q,
    K,
    V,
    K_TILES,
    V_TILES,
    TILES,
    NUM_TILES,
    FILED,
    CU_SEQLENS_Q,
    PARTS,
    PART_LSE,
    batch_size,
    most_tiles,
    first_tile,
    head,
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
):
    """Parts of one kv head: PARTS [chunk rows, num_slots, G, DV], PART_LSE [chunk rows, num_slots, G], in base 2.

    Persistent: a program takes every n-th tile, and reads what the next one is while it computes. Every key of these
    blocks is visible to every query filed under them. Where DV is a power of two, V0 and V1 may be its halves: one
    after the other they take half the registers, and more programs share an SM. Limited by the latency of dependent
    loads and by the bytes of q and of the parts.
    """
    base = chunk_start(CU_SEQLENS_Q, first_tile, batch_size, QUERIES)
    head = tl.cast(head, tl.int64)
    num_tiles = tl.load(NUM_TILES + head)
    TILES += head * most_tiles
    FILED += head * most_tiles * QUERIES
    row = tl.arange(0, ROWS)
    query = row // GROUP_SIZE
    member = row % GROUP_SIZE
    filed_at = tl.minimum(query, QUERIES - 1)
    key = tl.arange(0, BLOCK_SIZE)
    Q += base * q_row + head * GROUP_SIZE * q_head
    K += head * k_head
    V += head * v_head
    tile = tl.program_id(0)
    if tile < num_tiles:
        described = tl.load(TILES + tile)
        filed = tl.load(FILED + tile * QUERIES + filed_at)
        while tile < num_tiles:
            start = described & 0xFFFFFFFF
            there = query < (described >> 32)
            place = tl.where(there, filed, 0)
            q_rows = Q + (place // NUM_SLOTS).to(tl.int64) * q_row + member.to(tl.int64) * q_head
            q0 = load_piece(q_rows, there, 0, K0, DK)
            q1 = load_piece(q_rows, there, K0, K1, DK)
            if K_TILES is None:
                k_rows = K + start * k_row + key * k_row
                v_rows = V + start * v_row + key * v_row
                s = logits(q0, q1, load_piece(k_rows, None, 0, K0, DK), load_piece(k_rows, None, K0, K1, DK))
                v0 = load_piece(v_rows, None, 0, V0, DV)
                v1 = load_piece(v_rows, None, V0, V1, DV)
            else:
                s = logits(q0, None, K_TILES.load([start.to(tl.int32), (head * DK).to(tl.int32)]), None)
                v0 = V_TILES.load([start.to(tl.int32), (head * DV).to(tl.int32)])
                v1 = None
                if V1 > 0:
                    v1 = V_TILES.load([start.to(tl.int32), (head * DV + V0).to(tl.int32)])
            tile += tl.num_programs(0)
            following = tl.minimum(tile, num_tiles - 1)
            described = tl.load(TILES + following)
            filed = tl.load(FILED + following * QUERIES + filed_at)
            top = tl.max(s, 1) * scale
            top = tl.where(top == float("-inf"), 0.0, top)  # logits that overflowed: weights of 0, no NaN
            p = tl.exp2(s * scale - top[:, None])
            total = tl.sum(p, 1)
            weighed = tl.where(total > 0, total, 1.0)
            inverse = (1.0 / weighed)[:, None]
            part = place.to(tl.int64) * GROUP_SIZE + member
            part_rows = PARTS + part * DV
            out0 = tl.dot(p.to(v0.dtype), v0, input_precision="ieee") * inverse
            store_piece(part_rows, out0, there, 0, V0, DV)
            if v1 is not None:
                out1 = tl.dot(p.to(v1.dtype), v1, input_precision="ieee") * inverse
                store_piece(part_rows, out1, there, V0, V1, DV)
            part_lse = tl.where(total > 0, top + tl.log2(weighed), float("-inf"))
            tl.store(PART_LSE + part, part_lse, mask=there)


@triton.jit(do_not_specialize=["batch_size", "total_q", "first_tile", "head"])
def merge_kernel(
    Q,
    K,
    V,
    PARTS,
    PART_LSE,
    META,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    OUT,
    LSE,
    batch_size,
    total_q,
    num_slots,
    first_tile,
    head,
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
    DK: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out, lse of one kv head: a query's own block, the one before and block 0, then its parts. Grid (tiles,).

    Limited by bytes: the parts are read once.
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
        kv_head = tl.cast(head, tl.int64)
        heads = kv_head * GROUP_SIZE + member
        q_rows = Q + first * q_row + query * q_row + heads * q_head
        q0 = load_piece(q_rows, there, 0, K0, DK)
        q1 = load_piece(q_rows, there, K0, K1, DK)
        K += kv_head * k_head
        V += kv_head * v_head
        meta = tl.load(META + (first - base + query) * NUM_KV_HEADS + kv_head, mask=there, other=0)
        m, norm, acc0, acc1 = empty(ROWS, V0, V1)
        lowest = tl.maximum(tl.maximum(least, 0) // BLOCK_SIZE - 1, 0)
        highest = tl.where(most >= 0, most // BLOCK_SIZE, -1)
        key = tl.arange(0, BLOCK_SIZE)
        for i in tl.range(tl.where(highest < 0, 0, lowest - 1), highest + 1):
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
        num_far = meta >> FAR_SHIFT
        part = ((first - base + query) * num_slots) * GROUP_SIZE + member
        for i in tl.range(0, tl.max(num_far, 0), num_stages=STAGES):
            has = i < num_far
            part_lse = tl.load(PART_LSE + part + i * GROUP_SIZE, mask=has, other=float("-inf"))
            part_rows = PARTS + (part + i * GROUP_SIZE) * DV
            top = tl.maximum(m, part_lse)
            shifted = tl.where(top == float("-inf"), 0.0, top)
            decay = tl.exp2(m - shifted)
            weight = tl.exp2(part_lse - shifted)
            norm = norm * decay + weight
            out0 = load_piece(part_rows, has, 0, V0, DV).to(tl.float32)
            acc0 = acc0 * decay[:, None] + out0 * weight[:, None]
            if V1 > 0:
                out1 = load_piece(part_rows, has, V0, V1, DV).to(tl.float32)
                acc1 = acc1 * decay[:, None] + out1 * weight[:, None]
            m = top
        lse, inverse = finish(m, norm)
        out_rows = OUT + ((first + query) * (NUM_KV_HEADS * GROUP_SIZE) + heads) * DV
        store_piece(out_rows, acc0 * inverse, there, 0, V0, DV)
        if V1 > 0:
            store_piece(out_rows, acc1 * inverse, there, V0, V1, DV)
        tl.store(LSE + heads * total_q + first + query, lse, mask=there)
