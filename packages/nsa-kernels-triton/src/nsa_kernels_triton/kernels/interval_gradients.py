"""Gradients of attention in which every query sees one interval of keys: see `kernels.interval` and `gradients`.

`interval_dq_kernel` walks the keys of a tile of rows, as the forward does; `interval_dkdv_kernel` the rows that see a
tile of keys. Each takes its logits anew: so nothing is added by two programs, and every sum has one order.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.gradients import LN_2, add_tile, no_sums
from nsa_kernels_triton.kernels.interval import hide, interval_of, num_compressed
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.tiles import anew, find_tile, key_rows


@triton.jit(do_not_specialize=["batch_size", "total_q", "window_size"])
def interval_dq_kernel(
    Q,
    K,
    V,
    K_TILES,
    V_TILES,
    GRAD_OUT,
    LSE_2,
    DELTA,
    DQ,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    CU_COMPRESSED,
    batch_size,
    total_q,
    window_size,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_row,
    grad_head,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """DQ [Tq, Hq, DIM] = scale sum over a query's keys of ds k. Arguments and grid of `interval_attention_kernel`.

    Limited by the tensor cores: 2 (2 Dk + Dv) operations for each query head and key of a visited tile.
    """
    tile = tl.program_id(0)
    if CU_COMPRESSED is not None:
        tile = tl.num_programs(0) - 1 - tile
    sequence, first, end = find_tile(CU_SEQLENS_Q, tile, batch_size, ROWS // GROUP)
    if first < end:
        row = tl.arange(0, ROWS)
        query = row // GROUP
        there = (query < ROWS // GROUP) & (first + query < end)
        kv_head = tl.program_id(1).to(tl.int64)
        num_heads = GROUP * tl.num_programs(1)
        head = kv_head * GROUP + row % GROUP
        queries = Q + first * q_row + query * q_row + head * q_head
        q0 = load_piece(queries, there, 0, K0, DIM)
        q1 = load_piece(queries, there, K0, K1, DIM)
        grads = GRAD_OUT + first * grad_row + query * grad_row + head * grad_head
        do0 = load_piece(grads, there, 0, V0, V_DIM)
        do1 = load_piece(grads, there, V0, V1, V_DIM)
        stats = (first + query) * num_heads + head
        lse = tl.load(LSE_2 + stats, mask=there, other=float("inf"))
        delta = tl.load(DELTA + stats, mask=there, other=0.0)

        key_first, start, stop, any_start, any_stop, all_start, all_stop = interval_of(
            *(CU_SEQLENS_Q, CU_SEQLENS_K, CU_COMPRESSED, sequence, first, end, query, window_size),
            *(KERNEL_SIZE, KERNEL_STRIDE, ROWS // GROUP),
        )
        if CU_COMPRESSED is not None:
            start = None
        K += kv_head * k_head
        V += kv_head * v_head
        acc0 = tl.zeros([ROWS, K0], tl.float32)
        acc1 = tl.zeros([ROWS, K1] if K1 > 0 else [1], tl.float32)
        # What stands in for rows of another sequence: see `interval_attention_kernel`.
        described: tl.constexpr = K_TILES is not None
        NEAR: tl.constexpr = KEYS // 4 if described and KEYS > 32 else KEYS
        engine_start = any_stop
        if described:
            engine_start = tl.where(any_stop - any_start < KEYS, any_stop, any_start)
        key = tl.arange(0, NEAR)
        for tile_start in tl.range(any_start, engine_start, NEAR, num_stages=1 if described else None):
            near = tl.minimum(key, any_stop - 1 - tile_start)
            packed = key_first + tile_start
            k_rows = K + packed * k_row + near * k_row
            v_rows = V + packed * v_row + near * v_row
            k0 = load_piece(k_rows, None, 0, K0, DIM)
            k1 = load_piece(k_rows, None, K0, K1, DIM)
            p = tl.exp2(logits(q0, q1, k0, k1) * scale - lse[:, None])
            if (tile_start < all_start) | (tile_start + NEAR > all_stop):
                p = hide(p, key + tile_start, start, stop, 0.0)
            dp = logits(do0, do1, load_piece(v_rows, None, 0, V0, V_DIM), load_piece(v_rows, None, V0, V1, V_DIM))
            ds = (p * (dp - delta[:, None])).to(k0.dtype)
            acc0 = tl.dot(ds, k0, acc0, input_precision="ieee")
            if k1 is not None:
                acc1 = tl.dot(ds, k1, acc1, input_precision="ieee")
        if described:
            key = tl.arange(0, KEYS)
            for tile_start in tl.range(engine_start, any_stop, KEYS):
                begin = tl.minimum(tile_start, any_stop - KEYS)
                packed = (key_first + begin).to(tl.int32)
                k0 = K_TILES.load([packed, (kv_head * DIM).to(tl.int32)])
                p = tl.exp2(logits(q0, None, k0, None) * scale - lse[:, None])
                if (begin < all_start) | (tile_start + KEYS > all_stop):
                    p = hide(p, key + begin, start, stop, 0.0)
                    p = tl.where((key + begin >= tile_start)[None, :], p, 0.0)
                v0 = V_TILES.load([packed, (kv_head * V_DIM).to(tl.int32)])
                ds = (p * (logits(do0, None, v0, None) - delta[:, None])).to(k0.dtype)
                acc0 = tl.dot(ds, k0, acc0, input_precision="ieee")
        row = anew(row, total_q)
        query = row // GROUP
        there = (query < ROWS // GROUP) & (first + query < end)
        head = kv_head * GROUP + row % GROUP
        outs = DQ + first * num_heads * DIM + (query * num_heads + head) * DIM
        store_piece(outs, acc0 * (scale * LN_2), there, 0, K0, DIM)
        if K1 > 0:
            store_piece(outs, acc1 * (scale * LN_2), there, K0, K1, DIM)


@triton.jit(do_not_specialize=["batch_size", "window_size", "splits", "split_elements_k", "split_elements_v"])
def interval_dkdv_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    LSE_2,
    DELTA,
    DK,
    DV,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    CU_COMPRESSED,
    batch_size,
    window_size,
    splits,
    split_elements_k,
    split_elements_v,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_row,
    grad_head,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """DK, DV of KEYS keys: sums over the rows that see them. Grid (key tiles, Hk, splits).

    Rows are (query, head of the group); each split takes every splits-th tile of ROWS of them and leaves its sums in a
    DK, DV of its own, split_elements_* after the one before.

    Limited by the tensor cores: 4 (Dk + Dv) operations for each query head and key of a visited tile.
    """
    tile = tl.program_id(0)
    if CU_COMPRESSED is not None:
        sequence, first, end = find_tile(CU_COMPRESSED, tile, batch_size, KEYS)
        ahead = (first - tl.load(CU_COMPRESSED + sequence)).to(tl.int32)
    else:
        sequence, first, end = find_tile(CU_SEQLENS_K, tile, batch_size, KEYS)
        ahead = (first - tl.load(CU_SEQLENS_K + sequence)).to(tl.int32)
    if first < end:
        QUERIES: tl.constexpr = ROWS // GROUP
        kv_head = tl.program_id(1).to(tl.int64)
        num_kv_heads = tl.num_programs(1)
        num_heads = GROUP * num_kv_heads
        split = tl.program_id(2)
        key = tl.arange(0, KEYS)
        near = tl.minimum(key, (end - 1 - first).to(tl.int32))
        k_rows = K + kv_head * k_head + first * k_row + near * k_row
        v_rows = V + kv_head * v_head + first * v_row + near * v_row
        k0 = load_piece(k_rows, None, 0, K0, DIM)
        k1 = load_piece(k_rows, None, K0, K1, DIM)
        v0 = load_piece(v_rows, None, 0, V0, V_DIM)
        v1 = load_piece(v_rows, None, V0, V1, V_DIM)

        # Packed query rows first_q..end_q hold the sequence; a row's position is its number less `origin`.
        first_q = tl.load(CU_SEQLENS_Q + sequence)
        end_q = tl.load(CU_SEQLENS_Q + sequence + 1)
        key_first, _, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
        origin = (key_first - shift).to(tl.int32)
        if CU_COMPRESSED is not None:
            start = tl.maximum(first_q, origin + ahead * KERNEL_STRIDE + KERNEL_SIZE - 1)
            stop = end_q
        else:
            start = tl.maximum(first_q, origin + ahead)
            last = origin + ahead + tl.minimum(end - first, KEYS).to(tl.int32) - 1
            stop = last + tl.minimum(window_size, end_q - last)  # their sum may not fit int32
        row = tl.arange(0, ROWS)
        query = row // GROUP
        head = kv_head * GROUP + row % GROUP
        head_q = head * q_head
        head_grad = head * grad_head
        dk0, dk1, dv0, dv1 = no_sums(KEYS, K0, K1, V0, V1)
        # Programs of neighbouring tiles of a window begin at the same queries, not each at its first: what one loads
        # the others find in the cache.
        turns = tl.cdiv(tl.maximum(stop - start, 0), QUERIES)
        offset = 0
        if CU_COMPRESSED is None:
            offset = turns - 1 - (start // QUERIES) % tl.maximum(turns, 1)
        for number in tl.range(split, turns, splits):
            turn = number
            if CU_COMPRESSED is None:
                turn = (number + offset) % turns
            begin = start + turn * QUERIES
            wide = tl.cast(begin, tl.int64)
            near_query = tl.minimum(query, stop - 1 - begin)
            q_rows = Q + wide * q_row + head_q + near_query * q_row
            grads = GRAD_OUT + wide * grad_row + head_grad + near_query * grad_row
            q0 = load_piece(q_rows, None, 0, K0, DIM)
            q1 = load_piece(q_rows, None, K0, K1, DIM)
            do0 = load_piece(grads, None, 0, V0, V_DIM)
            do1 = load_piece(grads, None, V0, V1, V_DIM)
            stats = wide * num_heads + near_query * num_heads + head
            lse = tl.load(LSE_2 + stats)
            delta = tl.load(DELTA + stats)
            p = tl.exp2(logits(k0, k1, q0, q1) * scale - lse[None, :])
            partial = (ROWS % GROUP > 0) | (begin + QUERIES > stop)
            position = begin - origin + query
            there = (query < QUERIES) & (begin + query < stop)
            if CU_COMPRESSED is not None:
                if partial | (ahead + KEYS > num_compressed(begin - origin, KERNEL_SIZE, KERNEL_STRIDE)):
                    seen = (ahead + key)[:, None] < num_compressed(position, KERNEL_SIZE, KERNEL_STRIDE)[None, :]
                    p = tl.where(seen & there[None, :], p, 0.0)
            else:
                latest = begin - origin + QUERIES - 1
                if partial | (ahead + KEYS - 1 > begin - origin) | (latest - ahead >= window_size):
                    seen = (ahead + key)[:, None] <= position[None, :]
                    seen &= (ahead + key)[:, None] > (position - window_size)[None, :]
                    p = tl.where(seen & there[None, :], p, 0.0)
            _ds, dk0, dk1, dv0, dv1 = add_tile(p, q0, q1, do0, do1, v0, v1, delta, dk0, dk1, dv0, dv1)
        key = anew(key, batch_size)
        there = first + key < end
        target = (first + key) * num_kv_heads + kv_head
        dk_rows = DK + split * split_elements_k + target * DIM
        dv_rows = DV + split * split_elements_v + target * V_DIM
        store_piece(dk_rows, dk0 * (scale * LN_2), there, 0, K0, DIM)
        store_piece(dv_rows, dv0, there, 0, V0, V_DIM)
        if K1 > 0:
            store_piece(dk_rows, dk1 * (scale * LN_2), there, K0, K1, DIM)
        if V1 > 0:
            store_piece(dv_rows, dv1, there, V0, V1, V_DIM)
