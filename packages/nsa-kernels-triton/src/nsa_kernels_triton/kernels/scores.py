"""Scores of selection blocks, Eq. 9 and 10.

score[j] = sum over the heads of a group and compressed blocks i of overlap(i, j) / d * p_i, p_i = exp(scale q.k_i - lse).
With BETA = l'/d and ALPHA = l/d, compressed block i = BETA * j + e gives min(ALPHA, BETA - e) * p_i to block j, its own,
and what remains of ALPHA to block j + 1. So a score is made of two numbers, each a sum over one block's own compressed
blocks alone, whatever the tile it falls into:

    score[j] = OWN[j] + SPILL[j],    SPILL[j] = what block j - 1 leaves to j

Every sum has the same shape for every j: equal probabilities give bitwise equal scores, and ties stay ties.

Rows are relative to a chunk of query tiles: row ((tile * Hk + head) * queries a tile + query) of OWN and SPILL. Columns
beyond the blocks that some query of the tile may choose hold anything, and column 0 of SPILL holds nothing.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import load_piece, logits
from nsa_kernels_triton.kernels.tiles import find_tile, key_rows


@triton.jit(do_not_specialize=["first_tile", "num_tiles", "part"])
def block_scores_kernel(
    Q,
    K,
    LSE,
    OWN,
    SPILL,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    CU_COMPRESSED,
    batch_size,
    first_tile,
    num_tiles,
    part,
    width,
    q_row,
    q_head,
    k_row,
    k_head,
    lse_head,
    lse_row,
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    LOCAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """OWN and SPILL [rows, width] fp32 of a chunk's tiles of QUERIES queries; program (tile and head, part of the blocks).

    A tile's rows are KEYS compressed blocks, its columns GROUP_WIDTH heads x QUERIES queries with the head outermost:
    thus a thread has all heads of a query, and Eq. 10 is a sum over its registers. `scale` contains log2(e).

    Limited by the tensor cores where a group is large, by the exponentials where it is small. The last tiles have the
    longest rows and come first.
    """
    COLUMNS: tl.constexpr = GROUP_WIDTH * QUERIES
    BLOCKS: tl.constexpr = KEYS // BETA
    head = tl.program_id(0) % num_kv_heads
    tile = num_tiles - 1 - tl.program_id(0) // num_kv_heads
    sequence, first, end = find_tile(CU_SEQLENS_Q, first_tile + tile, batch_size, QUERIES)
    first_key, _, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
    shift -= first_key
    current = (tl.minimum(first + QUERIES, end) - 1 + shift).to(tl.int32) // BLOCK_SIZE
    stop = tl.where((first < end) & (current >= TOPK), current - LOCAL + 1, 0)  # blocks that some query may choose
    begin = tl.program_id(1) * part
    stop = tl.minimum(stop, begin + part)
    if begin < stop:
        column = tl.arange(0, COLUMNS)
        of_group = column // QUERIES
        row = first + column % QUERIES
        there = (of_group < GROUP) & (row < end)
        q_heads = (head * GROUP + of_group).to(tl.int64)
        q_rows = Q + row * q_row + q_heads * q_head
        q0 = load_piece(q_rows, there, 0, D0, DIM)
        q1 = load_piece(q_rows, there, D0, D1, DIM)
        lse = tl.load(LSE + q_heads * lse_head + row * lse_row, mask=there, other=float("inf"))
        bias = lse * -1.4426950408889634  # -inf of idle heads: they add 0
        first_compressed = tl.load(CU_COMPRESSED + sequence).to(tl.int64)
        last = tl.load(CU_COMPRESSED + sequence + 1) - 1 - first_compressed.to(tl.int32)
        key = tl.arange(0, KEYS)
        own = tl.minimum(BETA - key % BETA, ALPHA)
        query = tl.arange(0, QUERIES)
        block = tl.arange(0, BLOCKS)
        line = (tile.to(tl.int64) * num_kv_heads + head) * QUERIES + query
        scores = line[None, :] * width + block[:, None]
        # Compressed blocks end d(ALPHA - 1) tokens behind their own block: only the current block's left neighbour may
        # have some that a query does not see yet.
        visible = (tl.maximum(first + query + shift + 1, 0) // (BLOCK_SIZE // BETA)).to(tl.int32) - ALPHA
        for number in range(begin, stop, BLOCKS):
            offset = number * BETA
            k_base = K + (first_compressed + offset) * k_row + head * k_head
            k_rows = k_base + tl.minimum(key, last - offset) * k_row  # those beyond the last are of no block asked for
            k0 = load_piece(k_rows, None, 0, D0, DIM)
            k1 = load_piece(k_rows, None, D0, D1, DIM)
            p = tl.exp2(logits(k0, k1, q0, q1) * scale + bias[None, :])
            p = tl.sum(tl.reshape(p, [KEYS, GROUP_WIDTH, QUERIES]), 1)
            if LOCAL == 1:
                p = tl.where((offset + key)[:, None] <= visible[None, :], p, 0.0)
            weighted = tl.reshape(p * own.to(tl.float32)[:, None], [BLOCKS, BETA, QUERIES])
            tl.store(OWN + scores + number, tl.sum(weighted, 1))
            if ALPHA > 1:
                weighted = tl.reshape(p * (ALPHA - own).to(tl.float32)[:, None], [BLOCKS, BETA, QUERIES])
                tl.store(SPILL + scores + (number + 1), tl.sum(weighted, 1))
