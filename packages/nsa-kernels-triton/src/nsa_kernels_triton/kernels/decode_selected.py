"""A decode step, third kernel: the window, the last choice among candidates, and the chosen blocks.

The window and the blocks are split in the same way. Where they are not, this kernel also writes the gated sum.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa_kernels_triton.kernels.decode_choosing import store_forced
from nsa_kernels_triton.kernels.decode_merging import gated, merged, store_out
from nsa_kernels_triton.kernels.decode_rows import query_rows, store_some
from nsa_kernels_triton.kernels.decode_window import attend_to_window
from nsa_kernels_triton.kernels.pieces import load_piece, logits
from nsa_kernels_triton.kernels.softmax import empty, mean, update


@triton.jit
def ranked(KEYS, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """How many of COUNT keys are better than each [WIDTH]; of equal ones the first is. Huge where a key is -1."""
    place = tl.arange(0, WIDTH)
    keys = tl.load(KEYS + place, mask=place < COUNT, other=-1)
    rank = tl.where(keys >= 0, 0, 1 << 20)
    for start in tl.static_range(0, COUNT, ROWS):
        other = start + tl.arange(0, ROWS)
        beside = tl.load(KEYS + other, mask=other < COUNT, other=-1)
        better = beside[:, None] > keys[None, :]
        better = better | ((beside[:, None] == keys[None, :]) & (other[:, None] < place[None, :]))
        rank += tl.sum(better.to(tl.int32), 0)
    return rank


@triton.jit(do_not_specialize=["scale", "window_size"])
def decode_selected_kernel(
    Q,
    SCRATCH,
    LENGTHS,
    COUNTS,
    K_SLC,
    V_SLC,
    K_SLC_TABLE,
    V_SLC_TABLE,
    K_WIN,
    V_WIN,
    K_WIN_TABLE,
    V_WIN_TABLE,
    NEW_K_WIN,
    NEW_V_WIN,
    BLOCK_INDICES,
    GATES,
    OUT,
    scale,
    window_size,
    region,
    slc_table,
    win_table,
    k_win_row,
    v_win_row,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    PAGE: tl.constexpr,
    WIN_PAGE: tl.constexpr,
    DK: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WIN_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    COUNT: tl.constexpr,
    COMPARED: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
    CMP_SPLITS: tl.constexpr,
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
    EARLY: tl.constexpr,
    FRESH: tl.constexpr,
):
    """One token's heads of one kv head, PART of its TOPK blocks. Grid (B * N * SPLITS * HEADS).

    MERGE (SPLITS is 1): also add the branches up. CMP_SPLITS, ADDED: see `decode_merging`. FRESH: there are new rows,
    and the kernel that stores them may still run.

    Limited by the bytes of the blocks, or the latency from candidates to numbers of blocks, pages and rows.
    """
    if EARLY:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    head = pid % HEADS
    split = pid // HEADS % SPLITS
    token = pid // (HEADS * SPLITS) % N
    sequence = pid // (HEADS * SPLITS * N)
    member = tl.arange(0, ROWS)
    there = member < GROUP
    q_rows = query_rows(Q, sequence, head, token, member, N, HEADS, GROUP, DK)
    q0 = load_piece(q_rows, there, 0, K0, DK)
    q1 = load_piece(q_rows, there, K0, K1, DK)
    here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
    length = tl.load(LENGTHS + sequence)
    count = tl.load(COUNTS + sequence)
    before = length - count
    position = tl.where(token < count, before + token, -1)

    # The window needs nothing of the kernels before, which may still run; not even new rows from its pages, if FRESH.
    WIN_SAME: tl.constexpr = V_WIN_TABLE is None
    win_pages = K_WIN_TABLE + sequence.to(tl.int64) * win_table
    v_win_pages = win_pages
    if not WIN_SAME:
        v_win_pages = V_WIN_TABLE + sequence.to(tl.int64) * win_table
    earliest = tl.maximum(position + 1 - window_size, 0)
    first = earliest // WIN_KEYS
    tiles = tl.cdiv(position + 1, WIN_KEYS) - first
    part = tl.cdiv(tiles, SPLITS)
    begin = first + split * part
    stop = tl.minimum(begin + part, first + tiles)
    stored = position  # in pages, up to here
    if FRESH:
        stored = tl.minimum(position, before - 1)
    last = tl.maximum(position, 0) // WIN_PAGE
    m, norm, acc0, acc1 = empty(ROWS, V0, V1)
    m, norm, acc0, acc1 = attend_to_window(
        q0,
        q1,  # None within a tuple is more than Triton 3.6 takes
        *(K_WIN, V_WIN, win_pages, v_win_pages, begin, stop, earliest, stored, last, head, scale),
        *(m, norm, acc0, acc1, HEADS, WIN_PAGE, DK, K0, K1, DV, V0, V1, WIN_KEYS, WIN_SAME),
    )
    if FRESH:  # noqa: SIM102 - constants decide what is compiled
        if split == 0:
            FEW: tl.constexpr = 16 if N < 16 else 32
            new_row = sequence.to(tl.int64) * N
            for start in tl.static_range(0, N, FEW):
                new = start + tl.arange(0, FEW)
                at = before + new
                seen = (at >= earliest) & (at <= position)
                has_page = seen & (at // WIN_PAGE < win_table)
                page = tl.load(win_pages + at // WIN_PAGE, mask=has_page, other=-1)
                loaded = page >= 0
                if not WIN_SAME:
                    page = tl.load(v_win_pages + at // WIN_PAGE, mask=has_page, other=-1)
                v_loaded = page >= 0
                k_rows = NEW_K_WIN + (new_row + new) * k_win_row + head * DK
                s = logits(q0, q1, load_piece(k_rows, loaded, 0, K0, DK), load_piece(k_rows, loaded, K0, K1, DK))
                s = tl.where(seen[None, :], s, float("-inf"))
                v_rows = NEW_V_WIN + (new_row + new) * v_win_row + head * DV
                v0 = load_piece(v_rows, v_loaded, 0, V0, DV)
                v1 = load_piece(v_rows, v_loaded, V0, V1, DV)
                m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)
    member_row = token * GROUP + tl.where(there, member, 0)
    if MERGE:
        _, inverse = mean(m, norm)
        win0 = acc0 * inverse
        win1 = acc1
        if V1 > 0:
            win1 = acc1 * inverse
    else:
        store_some(here + WIN_M_AT + split * SIZE, here + WIN_L_AT + split * SIZE, here + WIN_O_AT + split * SIZE * DV,
                   member_row, there, m, norm, acc0, acc1, DV, V0, V1)  # fmt: skip

    if EARLY:
        gdc_wait()
    current = tl.where(position >= 0, position // BLOCK_SIZE, -1)
    out = BLOCK_INDICES + ((sequence * N + token) * HEADS + head).to(tl.int64) * TOPK
    candidates = (here + CANDIDATES_AT).to(tl.pointer_type(tl.int32))
    SAME: tl.constexpr = V_SLC_TABLE is None
    PER_PAGE: tl.constexpr = PAGE // BLOCK_SIZE
    PIECES: tl.constexpr = BLOCK_SIZE // KEYS
    FREE: tl.constexpr = TOPK - INIT - LOCAL
    place = tl.arange(0, PART)
    entry = split * PART + place
    table = K_SLC_TABLE + sequence.to(tl.int64) * slc_table
    if COUNT == 0:
        blocks = tl.load(out + entry, mask=entry < tl.where(current >= 0, TOPK, 0), other=-1)
        pages = tl.load(table + blocks // PER_PAGE, mask=blocks >= 0, other=-1)
    else:
        # Forced blocks, or all of few, need no choice: their pages are on the way meanwhile.
        few = current < TOPK
        leading = entry < tl.where(few, TOPK, INIT)
        blocks = tl.where(leading, entry, current + 1 - TOPK + entry)
        sure = (leading | ((entry >= INIT + FREE) & (entry < TOPK))) & (blocks <= current)
        pages = tl.load(table + blocks // PER_PAGE, mask=sure, other=-1)
        blocks = tl.where(sure, blocks, -1)
        rank = tl.full([WIDTH], 1 << 20, tl.int32)
        numbers = tl.full([WIDTH], 0, tl.int32)
        if not few:
            KEYS_OF = candidates + token * COUNT
            listed = tl.arange(0, WIDTH)
            rank = ranked(KEYS_OF, COUNT, WIDTH, COMPARED)
            numbers = tl.load(KEYS_OF + N * COUNT + listed, mask=listed < COUNT, other=0)
            its_pages = tl.load(KEYS_OF + 2 * (N * COUNT) + listed, mask=listed < COUNT, other=0)
            mine = (rank < FREE)[None, :] & (rank[None, :] + INIT == entry[:, None])
            free = (entry >= INIT) & (entry < INIT + FREE)
            blocks = tl.where(free, tl.sum(tl.where(mine, numbers[None, :], 0), 1), blocks)
            pages = tl.where(free, tl.sum(tl.where(mine, its_pages[None, :], 0), 1), pages)

    known = blocks >= 0
    v_pages = pages
    if not SAME:
        v_pages = tl.load(V_SLC_TABLE + sequence.to(tl.int64) * slc_table + blocks // PER_PAGE, mask=known, other=-1)
    key = tl.arange(0, KEYS)
    m, norm, acc0, acc1 = empty(ROWS, V0, V1)
    for step in tl.range(0, PART * PIECES):
        mine = place == step // PIECES
        block = tl.sum(tl.where(mine, blocks, 0), 0)
        page = tl.sum(tl.where(mine, pages, 0), 0)
        within = step % PIECES * KEYS + key
        latest = tl.where(block >= 0, position - block * BLOCK_SIZE, -1)
        seen = within <= latest
        row = page.to(tl.int64) * PAGE + (block % PER_PAGE) * BLOCK_SIZE + within
        v_row, v_page = row, page
        if not SAME:
            v_page = tl.sum(tl.where(mine, v_pages, 0), 0)
            v_row = v_page.to(tl.int64) * PAGE + (block % PER_PAGE) * BLOCK_SIZE + within
        k_rows = K_SLC + (row * HEADS + head) * DK
        loaded = within <= tl.where(page >= 0, latest, -1)
        s = logits(q0, q1, load_piece(k_rows, loaded, 0, K0, DK), load_piece(k_rows, loaded, K0, K1, DK))
        s = tl.where(seen[None, :], s, float("-inf"))
        v_rows = V_SLC + (v_row * HEADS + head) * DV
        v_loaded = within <= tl.where(v_page >= 0, latest, -1)
        v0 = load_piece(v_rows, v_loaded, 0, V0, DV)
        v1 = load_piece(v_rows, v_loaded, V0, V1, DV)
        m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)

    if COUNT > 0:  # noqa: SIM102
        if split == 0:  # what nobody waits for
            store_forced(out, current, TOPK, INIT, LOCAL)
            won = rank < FREE
            tl.store(out + INIT + tl.cumsum(won.to(tl.int32), 0) - 1, numbers, mask=won)

    if MERGE:
        live = member < tl.where(current >= 0, GROUP, 0)
        _, inverse = mean(m, norm)
        number = ((sequence * N + token) * HEADS + head).to(tl.int64) * GROUP + member
        column = tl.arange(0, V0)
        o_cmp = merged(here + M_AT, here + L_AT, here + O_AT, member_row, live, column, CMP_SPLITS, ADDED, SIZE, DV)
        result = gated(GATES + number * 3, there, o_cmp, acc0 * inverse, win0)
        store_out(OUT + number * DV, result, there, current >= 0, column, DV)
        if V1 > 0:
            column = V0 + tl.arange(0, V1)
            o_cmp = merged(
                *(here + M_AT, here + L_AT, here + O_AT, member_row, live, column, CMP_SPLITS, ADDED, SIZE, DV)
            )
            result = gated(GATES + number * 3, there, o_cmp, acc1 * inverse, win1)
            store_out(OUT + number * DV, result, there, current >= 0, column, DV)
    else:
        store_some(here + SLC_M_AT + split * SIZE, here + SLC_L_AT + split * SIZE, here + SLC_O_AT + split * SIZE * DV,
                   member_row, there, m, norm, acc0, acc1, DV, V0, V1)  # fmt: skip
