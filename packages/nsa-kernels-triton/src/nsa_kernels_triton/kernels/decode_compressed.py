"""A decode step, first kernel: compressed attention's logits, split over the keys; new rows are stored beside it.

The scratch memory of a step, fp32, is one region for each sequence and kv head, and in it a row for each query row: a
pair of a token and a head of the group, all tokens' heads one after the other, padded to whole tiles.

```
maxima, sums of the compressed branch    [splits, rows]         base 2; of each split of the keys
outputs of the compressed branch         [splits, rows, DV]     of this kernel not yet divided, of the next one added up
maxima, sums, outputs of the window      [splits, rows], [splits, rows, DV]
maxima, sums, outputs of selected blocks [splits, rows], [splits, rows, DV]
candidates                               [N, chunks * slots]    keys of scores, then block numbers: see decode_choice
logits of the compressed branch          [rows, width]          scaled, base 2, -inf where a block is not visible
```
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.appending import append_rows, emit_pooled
from nsa_kernels_triton.kernels.interval import num_compressed
from nsa_kernels_triton.kernels.pieces import load_piece, logits, store_piece
from nsa_kernels_triton.kernels.softmax import empty, update


@triton.jit
def row_of(tile, ROWS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, count):
    """(row, token, head of the group, whether it is a token's) of each query row in a tile."""
    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    return row, token, row % GROUP, (token < N) & (token < count)


@triton.jit
def load_queries(
    Q, sequence, head, token, member, there, N: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """(q0, q1): pieces of the query rows of q [B, N, HEADS * GROUP, DK]."""
    rows = Q + (((sequence * N + token) * HEADS + head).to(tl.int64) * GROUP + member) * DK
    return load_piece(rows, there, 0, K0, DK), load_piece(rows, there, K0, K1, DK)


@triton.jit
def store_part(M, L, O, row, m, norm, acc0, acc1, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr):
    """Leave what one split of the keys gave its query rows."""
    everywhere = row >= 0
    tl.store(M + row, m)
    tl.store(L + row, norm)
    rows = O + row.to(tl.int64) * DV
    store_piece(rows, acc0, everywhere, 0, V0, DV)
    if V1 > 0:
        store_piece(rows, acc1, everywhere, V0, V1, DV)


@triton.jit(do_not_specialize=["scale"])
def decode_compressed_kernel(
    Q,
    SCRATCH,
    LENGTHS,
    COUNTS,
    CMP_LENGTHS,
    K_CMP,
    V_CMP,
    K_CMP_TABLE,
    V_CMP_TABLE,
    K_SLC,
    V_SLC,
    K_SLC_TABLE,
    V_SLC_TABLE,
    K_WIN,
    V_WIN,
    K_WIN_TABLE,
    V_WIN_TABLE,
    NEW_K_CMP,
    NEW_V_CMP,
    NEW_K_SLC,
    NEW_V_SLC,
    NEW_K_WIN,
    NEW_V_WIN,
    K_TAIL,
    V_TAIL,
    K_WEIGHTS,
    V_WEIGHTS,
    ROTATION,
    scale,
    region,
    width,
    cmp_table,
    slc_table,
    win_table,
    tail_size,
    rotated_blocks,
    k_cmp_row,
    v_cmp_row,
    k_slc_row,
    v_slc_row,
    k_win_row,
    v_win_row,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    CMP_PAGE: tl.constexpr,
    SLC_PAGE: tl.constexpr,
    WIN_PAGE: tl.constexpr,
    DK: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    APPEND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    M_AT: tl.constexpr,
    L_AT: tl.constexpr,
    O_AT: tl.constexpr,
    LOGITS_AT: tl.constexpr,
):
    """Grid (B * ROW_TILES * SPLITS * HEADS). Split s takes tiles s, s + SPLITS, ... of KEYS compressed blocks.

    VALUES: also sum the values; else the next kernel does, from the logits. APPEND: "" (there are no new rows),
    "pooled" (`PooledTokens`) or "completed" (`CompletedBlocks`); who has the last tile stores the rows.

    Limited by the bytes of k_cmp (and v_cmp) where many programs run, by the latency of dependent loads where few do:
    so the first page's number is loaded beside the length, later ones a tile ahead.
    """
    pid = tl.program_id(0)
    head = pid % HEADS
    split = pid // HEADS % SPLITS
    row_tile = pid // (HEADS * SPLITS) % ROW_TILES
    sequence = pid // (HEADS * SPLITS * ROW_TILES)
    table = K_CMP_TABLE + sequence.to(tl.int64) * cmp_table
    SAME: tl.constexpr = V_CMP_TABLE is None  # keys and values lie in pages of the same numbers
    v_table = table
    if not SAME:
        v_table = V_CMP_TABLE + sequence.to(tl.int64) * cmp_table
    most_tiles = width // KEYS
    page = tl.load(table + tl.minimum(split, most_tiles - 1) * KEYS // CMP_PAGE)
    length = tl.load(LENGTHS + sequence)
    count = tl.load(COUNTS + sequence)
    row, token, member, there = row_of(row_tile, ROWS, GROUP, N, count)
    q0, q1 = load_queries(Q, sequence, head, token, member, there, N, HEADS, GROUP, DK, K0, K1)
    before = length - count
    total = num_compressed(length - 1, KERNEL_SIZE, KERNEL_STRIDE)
    visible = tl.where(there, num_compressed(before + token, KERNEL_SIZE, KERNEL_STRIDE), 0)
    tiles = tl.cdiv(total, KEYS)
    owns_last = split == tl.maximum(tiles - 1, 0) % SPLITS
    if APPEND != "":
        new_row = sequence.to(tl.int64) * N
        new_k_cmp = NEW_K_CMP + new_row * k_cmp_row + head * DK
        new_v_cmp = NEW_V_CMP + new_row * v_cmp_row + head * DV
        if APPEND == "pooled":
            ring = sequence.to(tl.int64) * tail_size * HEADS
        else:
            FEW: tl.constexpr = (N - 1) // KERNEL_STRIDE + 1
            new_k_cmp = NEW_K_CMP + sequence.to(tl.int64) * FEW * k_cmp_row + head * DK
            new_v_cmp = NEW_V_CMP + sequence.to(tl.int64) * FEW * v_cmp_row + head * DV
        made = num_compressed(before - 1, KERNEL_SIZE, KERNEL_STRIDE)
        if owns_last & (made < total):
            if APPEND == "pooled":
                for number in range(made, total):
                    emit_pooled(
                        *(K_CMP, table, K_TAIL + ring * DK, K_WEIGHTS, new_k_cmp, ROTATION),
                        *(k_cmp_row, tail_size, rotated_blocks, before, number, head, INTERLEAVED),
                        *(HEADS, CMP_PAGE, KERNEL_SIZE, KERNEL_STRIDE, DK, K_WIDTH),
                    )
                    emit_pooled(
                        *(V_CMP, v_table, V_TAIL + ring * DV, V_WEIGHTS, new_v_cmp, None),
                        *(v_cmp_row, tail_size, rotated_blocks, before, number, head, INTERLEAVED),
                        *(HEADS, CMP_PAGE, KERNEL_SIZE, KERNEL_STRIDE, DV, V_WIDTH),
                    )
            else:
                blocks = total - made
                append_rows(
                    *(K_CMP, table, new_k_cmp, k_cmp_row, made, blocks, head, FEW, HEADS, CMP_PAGE, DK, K_WIDTH)
                )
                append_rows(
                    *(V_CMP, v_table, new_v_cmp, v_cmp_row, made, blocks, head, FEW, HEADS, CMP_PAGE, DV, V_WIDTH)
                )
            tl.debug_barrier()  # before this program reads them

    key = tl.arange(0, KEYS)
    here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
    line = here + LOGITS_AT + row.to(tl.int64) * width
    m, norm, acc0, acc1 = empty(ROWS, V0, V1)
    stop = tl.where(count > 0, tiles, 0)
    for tile in tl.range(split, stop, SPLITS):
        block = tile * KEYS + key
        slot = page.to(tl.int64) * CMP_PAGE + (tile * KEYS) % CMP_PAGE + key
        loaded = (block < total) & (page >= 0)
        if not SAME:
            v_page = tl.load(v_table + tile * KEYS // CMP_PAGE)
            v_slot = v_page.to(tl.int64) * CMP_PAGE + (tile * KEYS) % CMP_PAGE + key
            v_loaded = (block < total) & (v_page >= 0)
        else:
            v_slot = slot
            v_loaded = loaded
        page = tl.load(table + tl.minimum(tile + SPLITS, most_tiles - 1) * KEYS // CMP_PAGE)
        k_rows = K_CMP + (slot * HEADS + head) * DK
        s = logits(q0, q1, load_piece(k_rows, loaded, 0, K0, DK), load_piece(k_rows, loaded, K0, K1, DK)) * scale
        s = tl.where(block[None, :] < visible[:, None], s, float("-inf"))
        tl.store(line[:, None] + block[None, :], s, mask=there[:, None])
        if VALUES:
            v_rows = V_CMP + (v_slot * HEADS + head) * DV
            v0 = load_piece(v_rows, v_loaded, 0, V0, DV)
            v1 = load_piece(v_rows, v_loaded, V0, V1, DV)
            m, norm, acc0, acc1 = update(s, 1.0, m, norm, acc0, acc1, v0, v1)
        else:
            top = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(top == float("-inf"), 0.0, top)
            norm = norm * tl.exp2(m - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
            m = top

    SIZE: tl.constexpr = ROWS * ROW_TILES
    if VALUES:
        store_part(here + M_AT + split * SIZE, here + L_AT + split * SIZE, here + O_AT + split * SIZE * DV,
                   row, m, norm, acc0, acc1, DV, V0, V1)  # fmt: skip
    else:
        tl.store(here + M_AT + split * SIZE + row, m)
        tl.store(here + L_AT + split * SIZE + row, norm)

    if APPEND != "":
        if owns_last & (row_tile == 0):  # what this kernel does not read, behind what it does
            if head == 0:
                tl.store(CMP_LENGTHS + sequence, total)
            slc_pages = K_SLC_TABLE + sequence.to(tl.int64) * slc_table
            win_pages = K_WIN_TABLE + sequence.to(tl.int64) * win_table
            v_slc_pages = slc_pages
            v_win_pages = win_pages
            if V_SLC_TABLE is not None:
                v_slc_pages = V_SLC_TABLE + sequence.to(tl.int64) * slc_table
            if V_WIN_TABLE is not None:
                v_win_pages = V_WIN_TABLE + sequence.to(tl.int64) * win_table
            new_k = NEW_K_SLC + new_row * k_slc_row + head * DK
            new_v = NEW_V_SLC + new_row * v_slc_row + head * DV
            append_rows(
                *(K_SLC, slc_pages, new_k, k_slc_row, before, count, head, N, HEADS, SLC_PAGE, DK, K_WIDTH)
            )
            append_rows(
                *(V_SLC, v_slc_pages, new_v, v_slc_row, before, count, head, N, HEADS, SLC_PAGE, DV, V_WIDTH)
            )
            new_k = NEW_K_WIN + new_row * k_win_row + head * DK
            new_v = NEW_V_WIN + new_row * v_win_row + head * DV
            append_rows(
                *(K_WIN, win_pages, new_k, k_win_row, before, count, head, N, HEADS, WIN_PAGE, DK, K_WIDTH)
            )
            append_rows(
                *(V_WIN, v_win_pages, new_v, v_win_row, before, count, head, N, HEADS, WIN_PAGE, DV, V_WIDTH)
            )
            if APPEND == "pooled":
                append_rows(
                    *(K_TAIL + ring * DK, tail_size, new_k_cmp, k_cmp_row, before, count, head),
                    *(N, HEADS, 0, DK, K_WIDTH),
                )
                append_rows(
                    *(V_TAIL + ring * DV, tail_size, new_v_cmp, v_cmp_row, before, count, head),
                    *(N, HEADS, 0, DV, V_WIDTH),
                )
