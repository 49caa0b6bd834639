"""A decode step, third kernel: the last choice among candidates, and attention to the chosen blocks, split over them.

Where no branch is split there is nothing to merge: this kernel also writes the gated sum.
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.decode_choice import current_block, store_forced
from nsa_kernels_triton.kernels.decode_compressed import load_queries
from nsa_kernels_triton.kernels.decode_merging import gated, merged, store_out
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.softmax import empty, update


@triton.jit
def chosen_candidates(
    KEYS, COUNT: tl.constexpr, COLUMNS: tl.constexpr, FREE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """(which of COUNT keys are the FREE greatest that are not -1, how many chosen ones come before each) [WIDTH]."""
    place = tl.arange(0, WIDTH)
    keys = tl.load(KEYS + place, mask=place < COUNT, other=-1)
    better = tl.zeros([WIDTH], tl.int32)
    for start in tl.static_range(0, COUNT, COLUMNS):
        other = start + tl.arange(0, COLUMNS)
        beside = tl.load(KEYS + other, mask=other < COUNT, other=-1)
        above = (beside[None, :] > keys[:, None]) | (
            (beside[None, :] == keys[:, None]) & (other[None, :] < place[:, None])
        )
        better += tl.sum(above.to(tl.int32), 1)
    won = (keys >= 0) & (better < FREE)
    return won, tl.cumsum(won.to(tl.int32), 0) - 1


@triton.jit
def listed(
    CANDIDATES, OUT, token, split, current,
    N: tl.constexpr, TOPK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PART: tl.constexpr,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Blocks of one split of the list [PART], -1 for none; the first split writes the list down, if COUNT > 0.

    COUNT candidates a token were left to choose from; with none the list is there already.
    """
    place = split * PART + tl.arange(0, PART)
    if COUNT == 0:
        blocks = tl.load(OUT + place, mask=place < TOPK, other=-1)
    else:
        FREE: tl.constexpr = TOPK - INIT - LOCAL
        if split == 0:
            store_forced(OUT, current, TOPK, INIT, LOCAL)
        blocks = tl.where((place < TOPK) & (place <= current), place, -1)
        if current >= TOPK:
            KEYS = CANDIDATES + token * COUNT
            won, rank = chosen_candidates(KEYS, COUNT, COLUMNS, FREE, WIDTH)
            numbers = tl.load(KEYS + N * COUNT + tl.arange(0, WIDTH), mask=won, other=0)
            if split == 0:
                tl.store(OUT + INIT + rank, numbers, mask=won)
            mine = won[None, :] & (rank[None, :] + INIT == place[:, None])
            free = tl.sum(tl.where(mine, numbers[None, :], 0), 1)
            blocks = tl.where(place < INIT, place, tl.where(place < TOPK - LOCAL, free, current + 1 - TOPK + place))
            blocks = tl.where(place < TOPK, blocks, -1)
    return blocks


@triton.jit(do_not_specialize=["scale"])
def decode_selected_kernel(
    Q,
    SCRATCH,
    LENGTHS,
    COUNTS,
    K_SLC,
    V_SLC,
    K_SLC_TABLE,
    V_SLC_TABLE,
    BLOCK_INDICES,
    GATES,
    OUT,
    scale,
    region,
    slc_table,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    PAGE: tl.constexpr,
    DK: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
    CMP_SPLITS: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr,
    ADDED: tl.constexpr,
    M_AT: tl.constexpr,
    L_AT: tl.constexpr,
    O_AT: tl.constexpr,
    WIN_M_AT: tl.constexpr,
    WIN_L_AT: tl.constexpr,
    WIN_O_AT: tl.constexpr,
    SLC_M_AT: tl.constexpr,
    SLC_L_AT: tl.constexpr,
    SLC_O_AT: tl.constexpr,
    CANDIDATES_AT: tl.constexpr,
):
    """One token's heads of one kv head, PART of its TOPK blocks. Grid (B * N * SPLITS * HEADS).

    MERGE (SPLITS is 1): also add the branches up. CMP_SPLITS, WINDOW_SPLITS, ADDED: see `decode_merging`.

    Limited by the bytes of the blocks, or the latency from candidates to numbers of blocks, pages and rows.
    """
    pid = tl.program_id(0)
    head = pid % HEADS
    split = pid // HEADS % SPLITS
    token = pid // (HEADS * SPLITS) % N
    sequence = pid // (HEADS * SPLITS * N)
    member = tl.arange(0, ROWS)
    there = member < GROUP
    q0, q1 = load_queries(Q, sequence, head, token, member, there, N, HEADS, GROUP, DK, K0, K1)
    here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
    current = current_block(LENGTHS, COUNTS, sequence, token, BLOCK_SIZE)
    position = tl.load(LENGTHS + sequence) - tl.load(COUNTS + sequence) + token
    out = BLOCK_INDICES + ((sequence * N + token) * HEADS + head).to(tl.int64) * TOPK
    candidates = (here + CANDIDATES_AT).to(tl.pointer_type(tl.int32))
    blocks = listed(candidates, out, token, split, current, N, TOPK, INIT, LOCAL, PART, COUNT, COLUMNS, WIDTH)
    if current < 0:
        blocks = tl.full([PART], -1, tl.int32)

    SAME: tl.constexpr = V_SLC_TABLE is None
    PER_PAGE: tl.constexpr = PAGE // BLOCK_SIZE
    PIECES: tl.constexpr = BLOCK_SIZE // KEYS
    known = blocks >= 0
    pages = tl.load(K_SLC_TABLE + sequence.to(tl.int64) * slc_table + blocks // PER_PAGE, mask=known, other=-1)
    v_pages = pages
    if not SAME:
        v_pages = tl.load(V_SLC_TABLE + sequence.to(tl.int64) * slc_table + blocks // PER_PAGE, mask=known, other=-1)
    place = tl.arange(0, PART)
    key = tl.arange(0, KEYS)
    m, norm, acc0, acc1 = empty(ROWS, V0, V1)
    for step in tl.range(0, PART * PIECES):
        mine = place == step // PIECES
        block = tl.sum(tl.where(mine, blocks, 0), 0)
        page = tl.sum(tl.where(mine, pages, 0), 0)
        within = step % PIECES * KEYS + key
        at = block * BLOCK_SIZE + within
        seen = (block >= 0) & (at <= position)
        row = page.to(tl.int64) * PAGE + (block % PER_PAGE) * BLOCK_SIZE + within
        v_row, v_page = row, page
        if not SAME:
            v_page = tl.sum(tl.where(mine, v_pages, 0), 0)
            v_row = v_page.to(tl.int64) * PAGE + (block % PER_PAGE) * BLOCK_SIZE + within
        k_rows = K_SLC + (row * HEADS + head) * DK
        loaded = seen & (page >= 0)
        s = logits(q0, q1, load_piece(k_rows, loaded, 0, K0, DK), load_piece(k_rows, loaded, K0, K1, DK))
        s = tl.where(seen[None, :], s, float("-inf"))
        v_rows = V_SLC + (v_row * HEADS + head) * DV
        v_loaded = seen & (v_page >= 0)
        v0 = load_piece(v_rows, v_loaded, 0, V0, DV)
        v1 = load_piece(v_rows, v_loaded, V0, V1, DV)
        m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)

    first = token * GROUP
    if MERGE:
        inverse = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)[:, None]
        row = first + member
        number = ((sequence * N + token) * HEADS + head).to(tl.int64) * GROUP + member
        column = tl.arange(0, V0)
        o_cmp = merged(here + M_AT, here + L_AT, here + O_AT, row, there, column, CMP_SPLITS, ADDED, SIZE, DV)
        o_win = merged(
            *(here + WIN_M_AT, here + WIN_L_AT, here + WIN_O_AT, row, there, column, WINDOW_SPLITS, False, SIZE, DV)
        )
        out = gated(GATES + number * 3, there, o_cmp, acc0 * inverse, o_win)
        store_out(OUT + number * DV, out, there, current >= 0, column, DV)
        if V1 > 0:
            column = V0 + tl.arange(0, V1)
            o_cmp = merged(here + M_AT, here + L_AT, here + O_AT, row, there, column, CMP_SPLITS, ADDED, SIZE, DV)
            o_win = merged(
                *(here + WIN_M_AT, here + WIN_L_AT, here + WIN_O_AT, row, there, column, WINDOW_SPLITS, False, SIZE, DV)
            )
            out = gated(GATES + number * 3, there, o_cmp, acc1 * inverse, o_win)
            store_out(OUT + number * DV, out, there, current >= 0, column, DV)
    else:
        # Rows beyond the group are other tokens': they are left alone.
        at = tl.where(there, first + member, 0)
        tl.store(here + SLC_M_AT + split * SIZE + at, m, mask=there)
        tl.store(here + SLC_L_AT + split * SIZE + at, norm, mask=there)
        rows = here + SLC_O_AT + (split * SIZE + at).to(tl.int64) * DV
        store_piece(rows, acc0, there, 0, V0, DV)
        if V1 > 0:
            store_piece(rows, acc1, there, V0, V1, DV)
