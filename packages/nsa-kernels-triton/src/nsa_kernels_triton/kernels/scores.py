"""Scores of selection blocks, Eq. 9 and 10.

score[j] = sum over the heads of a group and compressed blocks i of overlap(i, j) / d * p_i, where
p_i = exp(scale q.k_i - lse). With BETA = l'/d and ALPHA = l/d, compressed block i = BETA * j + e gives
min(ALPHA, BETA - e) * p_i to block j, its own, and what remains of ALPHA to block j + 1. So a score is made of two
numbers, each a sum over one block's own compressed blocks alone, whatever the tile it falls into:

    score[j] = own + what block j - 1 leaves to j

Every sum has the same shape for every j: equal probabilities give bitwise equal scores, and ties stay ties.

The first number is OWN[j], the second SPILL[j - 1]. Where a kernel itself adds it to all but every n-th block, SPILL
has places for those alone: SPILL[j / n - 1]. Rows are those of a chunk of query tiles, (tile * Hk + head) * QUERIES +
query; columns beyond the blocks that some query of the tile may choose hold anything.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import load_piece, logits, products, transposed
from nsa_kernels_triton.kernels.tiles import find_tile, key_rows


@triton.jit
def blocks_of_tile(
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    tile,
    part,
    batch_size,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    LOCAL: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(sequence, first row, end, shift, begin, stop): row r sits at position r + shift; steps of this program.

    A step is of BLOCKS selection blocks; the program's part is `part` of those that some query of the tile may choose.
    """
    sequence, first, end = find_tile(CU_SEQLENS_Q, tile, batch_size, QUERIES)
    first_key, _, shift = key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence)
    shift -= first_key
    current = (tl.minimum(first + QUERIES, end) - 1 + shift).to(tl.int32) // BLOCK_SIZE
    stop = tl.where((first < end) & (current >= TOPK), tl.cdiv(current - LOCAL + 1, BLOCKS), 0)
    begin = tl.program_id(1) * part
    return sequence, first, end, shift, begin, tl.minimum(stop, begin + part)


@triton.jit(do_not_specialize=["batch_size", "first_tile", "num_tiles", "part", "lse_head"])
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
    """OWN and SPILL [rows, width] fp32 of a chunk's tiles of QUERIES queries. Program (tile and head, part of blocks).

    A tile's rows are KEYS compressed blocks, its columns GROUP_WIDTH heads x QUERIES queries with the head outermost:
    thus a thread has all heads of a query, and Eq. 10 is a sum over its registers. `scale` contains log2(e).

    Limited by the tensor cores where a group is large, by the exponentials where it is small. The last tiles have the
    longest rows and come first.
    """
    COLUMNS: tl.constexpr = GROUP_WIDTH * QUERIES
    BLOCKS: tl.constexpr = KEYS // BETA if KEYS > BETA else 1
    TURNS: tl.constexpr = BETA // KEYS if BETA > KEYS else 1  # tiles that make one block
    head = tl.program_id(0) % num_kv_heads
    tile = num_tiles - 1 - tl.program_id(0) // num_kv_heads
    sequence, first, end, shift, begin, stop = blocks_of_tile(
        *(CU_SEQLENS_Q, CU_SEQLENS_K, first_tile + tile, part, batch_size, BLOCK_SIZE, TOPK, LOCAL, QUERIES, BLOCKS)
    )
    if begin < stop:
        column = tl.arange(0, COLUMNS)
        of_group = column // QUERIES
        row = first + column % QUERIES
        there = (of_group < GROUP) & (row < end)
        q_heads = (head * GROUP + of_group).to(tl.int64)
        q_rows = Q + row * q_row + q_heads * q_head
        q0 = transposed(load_piece(q_rows, there, 0, D0, DIM))
        q1 = transposed(load_piece(q_rows, there, D0, D1, DIM))
        lse = tl.load(LSE + q_heads * lse_head + row * lse_row, mask=there, other=float("inf"))
        bias = lse * -1.4426950408889634  # -inf of idle heads: they add 0
        first_compressed = tl.load(CU_COMPRESSED + sequence).to(tl.int64)
        last = tl.load(CU_COMPRESSED + sequence + 1) - 1 - first_compressed.to(tl.int32)
        key = tl.arange(0, KEYS)
        query = tl.arange(0, QUERIES)
        asked = (first + query < end)[None, :]
        line = (tile.to(tl.int64) * num_kv_heads + head) * QUERIES + query
        scores = line[None, :] * width + tl.arange(0, BLOCKS)[:, None]
        # Compressed blocks end d(ALPHA - 1) tokens behind their own block: only the current block's left neighbour may
        # have some that a query does not see yet.
        visible = (tl.maximum(first + query + shift + 1, 0) // (BLOCK_SIZE // BETA)).to(tl.int32) - ALPHA
        own_turns = tl.zeros([BLOCKS, QUERIES], tl.float32)
        spill_turns = tl.zeros([BLOCKS, QUERIES], tl.float32)
        for step in range(begin * TURNS, stop * TURNS):
            number = step // TURNS * BLOCKS
            offset = step * KEYS
            k_base = K + (first_compressed + offset) * k_row + head.to(tl.int64) * k_head
            k_rows = k_base + tl.minimum(key, last - offset) * k_row  # those beyond the last are of no block asked for
            k0 = load_piece(k_rows, None, 0, D0, DIM)
            k1 = load_piece(k_rows, None, D0, D1, DIM)
            p = tl.exp2(products(k0, k1, q0, q1) * scale + bias[None, :])
            p = tl.sum(tl.reshape(p, [KEYS, GROUP_WIDTH, QUERIES]), 1)
            if LOCAL == 1:
                p = tl.where((offset + key)[:, None] <= visible[None, :], p, 0.0)
            own_weight = tl.minimum(BETA - (step % TURNS * KEYS + key) % BETA, ALPHA)
            own = tl.sum(tl.reshape(p * own_weight.to(tl.float32)[:, None], [BLOCKS, KEYS // BLOCKS, QUERIES]), 1)
            if TURNS > 1:
                own += tl.where(step % TURNS > 0, own_turns, 0.0)
                own_turns = own
            tl.store(OWN + scores + number, own, mask=asked)
            if ALPHA > 1:
                weight = (ALPHA - own_weight).to(tl.float32)
                spill = tl.sum(tl.reshape(p * weight[:, None], [BLOCKS, KEYS // BLOCKS, QUERIES]), 1)
                if TURNS > 1:
                    spill += tl.where(step % TURNS > 0, spill_turns, 0.0)
                    spill_turns = spill
                tl.store(SPILL + scores + number, spill, mask=asked)


@triton.jit(do_not_specialize=["batch_size", "first_tile", "num_tiles", "part", "lse_head"])
def paired_block_scores_kernel(
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
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    LOCAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """`block_scores_kernel` for groups of 1, 2 or 4 and the usual l' = 2 l = 4 d, with local_blocks >= 2.

    SPILL is [rows, width / 2] for KEYS = 64 and [rows, width] for 32. A tile's rows are queries x heads, its columns
    KEYS compressed blocks, in an order that suits what a thread holds of a product: rows 8 apart and 16 * WARPS apart,
    columns 8 apart. The heads of a group take such rows; a block's four compressed blocks, and two neighbouring blocks,
    such columns. So all these sums stay within a thread.

    Limited by the exponentials, of which there are two per compressed block and head in groups of 1.
    """
    ROWS: tl.constexpr = GROUP * QUERIES
    TURNS: tl.constexpr = ROWS // (16 * WARPS)
    BLOCKS: tl.constexpr = KEYS // 4
    NEAR: tl.constexpr = BLOCKS // 8  # neighbouring blocks in a thread
    head = tl.program_id(0) % num_kv_heads
    tile = num_tiles - 1 - tl.program_id(0) // num_kv_heads
    sequence, first, end, _, begin, stop = blocks_of_tile(
        *(CU_SEQLENS_Q, CU_SEQLENS_K, first_tile + tile, part, batch_size, BLOCK_SIZE, TOPK, LOCAL, QUERIES, BLOCKS)
    )
    if begin < stop:
        index = tl.arange(0, ROWS)
        turn = index // (16 * WARPS)
        half = index // 8 % 2
        if GROUP == 1:
            of_group = index * 0
            place = index
        elif GROUP == 2:
            of_group = half
            place = index // 16 * 8 + index % 8
        else:
            tl.static_assert(GROUP == 4 and TURNS == 2)
            of_group = turn * 2 + half
            place = index // 16 % WARPS * 8 + index % 8
        row = first + place
        there = row < end
        q_heads = (head * GROUP + of_group).to(tl.int64)
        q_rows = Q + row * q_row + q_heads * q_head
        q0 = load_piece(q_rows, there, 0, D0, DIM)
        q1 = load_piece(q_rows, there, D0, D1, DIM)
        lse = tl.load(LSE + q_heads * lse_head + row * lse_row, mask=there, other=float("inf"))
        bias = lse * -1.4426950408889634
        doubled = bias + 1.0
        first_compressed = tl.load(CU_COMPRESSED + sequence).to(tl.int64)
        last = tl.load(CU_COMPRESSED + sequence + 1) - 1 - first_compressed.to(tl.int32)
        column = tl.arange(0, KEYS)
        key = 4 * (column % 8 * NEAR + column // 8 % NEAR) + column // BLOCKS
        query = tl.arange(0, QUERIES)
        asked = (first + query < end)[:, None]
        line = (tile.to(tl.int64) * num_kv_heads + head) * QUERIES + query
        own_rows = OWN + line[:, None] * width + tl.arange(0, BLOCKS)[None, :]
        spill_rows = SPILL + line[:, None] * (width // NEAR) + tl.arange(0, 8)[None, :]
        for step in range(begin, stop):
            offset = step * KEYS
            k_base = K + (first_compressed + offset) * k_row + head.to(tl.int64) * k_head
            k_rows = k_base + tl.minimum(key, last - offset) * k_row  # those beyond the last are of no block asked for
            k0 = load_piece(k_rows, None, 0, D0, DIM)
            k1 = load_piece(k_rows, None, D0, D1, DIM)
            s = tl.permute(tl.reshape(logits(q0, q1, k0, k1), [ROWS, 2, 2, BLOCKS]), [0, 3, 1, 2])
            even, odd = tl.split(s)
            s0, s2 = tl.split(even)
            s1, s3 = tl.split(odd)
            spill = tl.exp2(s3 * scale + bias[:, None])
            own = tl.exp2(s0 * scale + doubled[:, None]) + tl.exp2(s1 * scale + doubled[:, None])
            own += tl.exp2(s2 * scale + doubled[:, None]) + spill
            own = _sum_heads(own, GROUP, QUERIES, TURNS, WARPS, BLOCKS)
            spill = _sum_heads(spill, GROUP, QUERIES, TURNS, WARPS, BLOCKS)
            if NEAR == 2:
                left, right = tl.split(tl.permute(tl.reshape(own, [QUERIES, 2, 8]), [0, 2, 1]))
                from_left, spill = tl.split(tl.permute(tl.reshape(spill, [QUERIES, 2, 8]), [0, 2, 1]))
                own = tl.reshape(tl.join(left, right + from_left), [QUERIES, BLOCKS])
            else:
                tl.static_assert(NEAR == 1)
            tl.store(own_rows + step * BLOCKS, own, mask=asked)
            tl.store(spill_rows + step * 8, spill, mask=asked)


@triton.jit
def _sum_heads(
    x, GROUP: tl.constexpr, QUERIES: tl.constexpr, TURNS: tl.constexpr, WARPS: tl.constexpr, N: tl.constexpr
):
    """[rows of `paired_block_scores_kernel`, N] -> [QUERIES, N]."""
    if GROUP > 1:
        x = tl.sum(tl.reshape(x, [TURNS, WARPS, 2, 8, N]), 2)
        if GROUP == 4:
            x = tl.sum(x, 0)
        x = tl.reshape(x, [QUERIES, N])
    return x
