"""dq of selected attention, query by query: neighbouring queries share the blocks that they chose."""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.gradients import LN_2
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.tiles import anew, find_tile, key_rows


@triton.jit(do_not_specialize=["batch_size", "total_q", "first_tile"])
def shared_dq_kernel(
    Q,
    K,
    V,
    K_TILES,
    V_TILES,
    GRAD_OUT,
    LSE_2,
    DELTA,
    BLOCKS,
    MEMBERS,
    COUNTS,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    DQ,
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
    grad_row,
    grad_head,
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
    """DQ of QUERIES neighbouring queries and one kv head over the blocks listed for them. Grid (tiles, Hk).

    Lists, tiles and limits as of `kernels.sharing.shared_kernel`; three products a tile instead of two.
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
        grads = GRAD_OUT + first * grad_row + query * grad_row + heads * grad_head
        do0 = load_piece(grads, there, 0, V0, DV)
        do1 = load_piece(grads, there, V0, V1, DV)
        stats = (first + query) * (NUM_KV_HEADS * GROUP_SIZE) + heads
        lse = tl.load(LSE_2 + stats, mask=there, other=float("inf"))
        delta = tl.load(DELTA + stats, mask=there, other=0.0)
        K += head * k_head
        V += head * v_head
        parts: tl.constexpr = BLOCK_SIZE // KEYS
        target = program.to(tl.int64) * NUM_KV_HEADS + head
        BLOCKS += target * (QUERIES * num_slots)
        MEMBERS += target * (QUERIES * num_slots)
        num_whole = tl.load(COUNTS + target * 2)
        num_distinct = tl.load(COUNTS + target * 2 + 1)
        acc0 = tl.zeros([ROWS, K0], tl.float32)
        acc1 = tl.zeros([ROWS, K1] if K1 > 0 else [1], tl.float32)
        key = tl.arange(0, KEYS)
        # Without the copy engine, or where a sequence has less than a tile, the last key stands in for what is beyond.
        # The engine takes the last KEYS rows instead, and hides those that are not of the block.
        described: tl.constexpr = K_TILES is not None
        streamed = 0
        if described:
            streamed = tl.where(end_key - first_key < KEYS, 0, num_distinct)
        for i in tl.range(streamed * parts, num_distinct * parts, num_stages=1 if described else STAGES):
            ahead = tl.load(BLOCKS + i // parts) * BLOCK_SIZE + i % parts * KEYS
            member = ((tl.load(MEMBERS + i // parts) >> query) & 1) != 0
            start = first_key + ahead
            near = tl.minimum(key, (end_key - 1 - start).to(tl.int32))
            k_rows = K + start * k_row + near * k_row
            v_rows = V + start * v_row + near * v_row
            k0 = load_piece(k_rows, None, 0, K0, DK)
            k1 = load_piece(k_rows, None, K0, K1, DK)
            p = tl.exp2(logits(q0, q1, k0, k1) * scale - tl.where(member, lse, float("inf"))[:, None])
            if i >= num_whole * parts:
                p = tl.where((ahead + key)[None, :] <= position[:, None], p, 0.0)
            dp = logits(do0, do1, load_piece(v_rows, None, 0, V0, DV), load_piece(v_rows, None, V0, V1, DV))
            ds = (p * (dp - delta[:, None])).to(k0.dtype)
            acc0 = tl.dot(ds, k0, acc0, input_precision="ieee")
            if k1 is not None:
                acc1 = tl.dot(ds, k1, acc1, input_precision="ieee")
        if described:
            for i in tl.range(0, streamed * parts, num_stages=STAGES):
                ahead = tl.load(BLOCKS + i // parts) * BLOCK_SIZE + i % parts * KEYS
                member = ((tl.load(MEMBERS + i // parts) >> query) & 1) != 0
                begin = tl.minimum(first_key + ahead, end_key - KEYS)
                k0 = K_TILES.load([begin.to(tl.int32), (head * DK).to(tl.int32)])
                p = tl.exp2(logits(q0, None, k0, None) * scale - tl.where(member, lse, float("inf"))[:, None])
                if i >= num_whole * parts:
                    seen = (begin - first_key).to(tl.int32) + key
                    p = tl.where((seen >= ahead)[None, :] & (seen[None, :] <= position[:, None]), p, 0.0)
                v0 = V_TILES.load([begin.to(tl.int32), (head * DV).to(tl.int32)])
                ds = (p * (logits(do0, None, v0, None) - delta[:, None])).to(k0.dtype)
                acc0 = tl.dot(ds, k0, acc0, input_precision="ieee")
        row = anew(row, num_distinct)
        query = row // GROUP_SIZE
        there = (query < QUERIES) & (first + query < end)
        heads = head * GROUP_SIZE + row % GROUP_SIZE
        dq_rows = DQ + ((first + query) * (NUM_KV_HEADS * GROUP_SIZE) + heads) * DK
        store_piece(dq_rows, acc0 * (scale * LN_2), there, 0, K0, DK)
        if K1 > 0:
            store_piece(dq_rows, acc1 * (scale * LN_2), there, K0, K1, DK)
