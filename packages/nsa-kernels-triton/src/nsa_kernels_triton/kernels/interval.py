"""Attention in which every query sees one interval of its sequence's keys: compressed blocks, or a window of tokens.

A program owns a tile of ROWS rows: adjacent queries of one sequence, each with the GROUP heads that share a kv head, so
that keys and values are loaded once for all of them and intervals differ little within the tile. It streams the keys
that any of its rows sees in tiles of KEYS, counted from the first such key. Tiles that all rows see need no mask.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.softmax import empty, finish, update
from nsa_kernels_triton.kernels.tiles import anew, find_tile, key_rows


@triton.jit(do_not_specialize=["batch_size", "total_q", "window_size"])
def interval_attention_kernel(
    Q,
    K,
    V,
    K_TILES,
    V_TILES,
    OUT,
    LSE,
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
    """OUT = softmax(scale' Q K^T) V over each query's interval, LSE its logarithm: OUT [Tq, Hq, V_DIM], LSE [Hq, Tq].

    The query at position t sees rows 0..num_compressed(t + 1) - 1 of its sequence in CU_COMPRESSED; without that,
    positions (t - w, t]. `scale` contains log2(e). Grid (tiles, Hk): neighbouring programs share keys.

    One loop asks of each tile whether it needs a mask: one pipeline, filled once. Loops of their own for the left, the
    unmasked and the right tiles were slower. K_TILES and V_TILES: see `ops.descriptors`; None of what has none.

    Limited by the tensor cores: 2 (Dk + Dv) operations for each query head and key of a visited tile.
    """
    tile = tl.program_id(0)
    if CU_COMPRESSED is not None:
        tile = tl.num_programs(0) - 1 - tile  # later queries see more: first the long tiles, so that none is left over
    sequence, first, end = find_tile(CU_SEQLENS_Q, tile, batch_size, ROWS // GROUP)
    if first < end:
        row = tl.arange(0, ROWS)
        query = row // GROUP
        there = (query < ROWS // GROUP) & (first + query < end)
        kv_head = tl.program_id(1).to(tl.int64)
        num_heads = GROUP * tl.num_programs(1)
        head = (row % GROUP).to(tl.int64)
        queries = Q + first * q_row + kv_head * GROUP * q_head + query * q_row + head * q_head
        q0 = load_piece(queries, there, 0, K0, DIM)
        q1 = load_piece(queries, there, K0, K1, DIM)

        # A row sees keys [start, stop), counted from packed row key_first; the tile's rows see any_start..any_stop
        # together, and each of them all_start..all_stop, which may be nothing.
        key_first, start, stop, any_start, any_stop, all_start, all_stop = interval_of(
            *(CU_SEQLENS_Q, CU_SEQLENS_K, CU_COMPRESSED, sequence, first, end, query, window_size),
            *(KERNEL_SIZE, KERNEL_STRIDE, ROWS // GROUP),
        )
        if CU_COMPRESSED is not None:
            start = None
        K += kv_head * k_head
        V += kv_head * v_head

        top, total, acc0, acc1 = empty(ROWS, V0, V1)
        # Rows outside of any_start..any_stop may hold anything, NaN included. The copy engine's last tile ends with the
        # last key instead, and hides what it has in common with the one before. Where there is less than a tile, or no
        # engine, the last key is loaded in their place.
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
            s = logits(q0, q1, load_piece(k_rows, None, 0, K0, DIM), load_piece(k_rows, None, K0, K1, DIM))
            if (tile_start < all_start) | (tile_start + NEAR > all_stop):
                s = hide(s, key + tile_start, start, stop, float("-inf"))
            v0 = load_piece(v_rows, None, 0, V0, V_DIM)
            v1 = load_piece(v_rows, None, V0, V1, V_DIM)
            top, total, acc0, acc1 = update(s, scale, top, total, acc0, acc1, v0, v1)
        if described:
            key = tl.arange(0, KEYS)
            for tile_start in tl.range(engine_start, any_stop, KEYS):
                begin = tl.minimum(tile_start, any_stop - KEYS)
                packed = (key_first + begin).to(tl.int32)
                s = logits(q0, None, K_TILES.load([packed, (kv_head * DIM).to(tl.int32)]), None)
                if (begin < all_start) | (tile_start + KEYS > all_stop):
                    s = hide(s, key + begin, start, stop, float("-inf"))
                    s = tl.where((key + begin >= tile_start)[None, :], s, float("-inf"))
                v0 = V_TILES.load([packed, (kv_head * V_DIM).to(tl.int32)])
                top, total, acc0, acc1 = update(s, scale, top, total, acc0, acc1, v0, None)

        lse, inverse = finish(top, total)
        row = anew(row, total_q)
        query = row // GROUP
        there = (query < ROWS // GROUP) & (first + query < end)
        head = (row % GROUP).to(tl.int64)
        outs = OUT + (first * num_heads + kv_head * GROUP) * V_DIM + (query * num_heads + head) * V_DIM
        store_piece(outs, acc0 * inverse, there, 0, V0, V_DIM)
        if V1 > 0:
            store_piece(outs, acc1 * inverse, there, V0, V1, V_DIM)
        tl.store(LSE + (kv_head * GROUP + head) * total_q + first + query, lse, mask=there)


@triton.jit
def interval_of(
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    CU_COMPRESSED,
    sequence,
    first,
    end,
    query,
    window_size,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """(key_first, start, stop, any_start, any_stop, all_start, all_stop) of a tile's rows: queries `first` + `query`.

    Of compressed blocks every row's first is 0, and `start` says nothing: Triton 3.6 has no None among several results.
    """
    key_first, _, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
    position = (first + shift - key_first).to(tl.int32)
    last = position + (tl.minimum(end - first, QUERIES) - 1).to(tl.int32)
    if CU_COMPRESSED is not None:
        key_first = tl.load(CU_COMPRESSED + sequence).to(tl.int64)
        stop = num_compressed(position + query, KERNEL_SIZE, KERNEL_STRIDE)
        start = stop
        any_start, all_start = 0, 0
        all_stop = num_compressed(position, KERNEL_SIZE, KERNEL_STRIDE)
        any_stop = num_compressed(last, KERNEL_SIZE, KERNEL_STRIDE)
    else:
        start = position + 1 - window_size + query
        stop = position + 1 + query
        any_start = tl.maximum(position + 1 - window_size, 0)
        all_start = tl.maximum(last + 1 - window_size, 0)
        all_stop = tl.maximum(position + 1, 0)
        any_stop = tl.maximum(last + 1, 0)
    return key_first, start, stop, any_start, any_stop, all_start, all_stop


@triton.jit
def num_compressed(position, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr):
    """Compressed blocks that end at or before a position, which may be negative."""
    return tl.maximum(position + (1 + KERNEL_STRIDE - KERNEL_SIZE), 0) // KERNEL_STRIDE


@triton.jit
def hide(x, key, start, stop, hidden):
    """`x` [rows, keys], `hidden` where a row does not see a key: outside [start, stop); no start hides none before."""
    seen = key[None, :] < stop[:, None]
    if start is not None:
        seen &= key[None, :] >= start[:, None]
    return tl.where(seen, x, hidden)
