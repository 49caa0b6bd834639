"""A decode step, first kernel: compressed attention, split over the keys; beside it new rows are stored.

Where nothing is split, its programs choose the blocks too.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from nsa_kernels_triton.kernels.appending import emit_completed, emit_pooled, load_heads, load_slot, store_heads
from nsa_kernels_triton.kernels.decode_choosing import choose
from nsa_kernels_triton.kernels.decode_rows import query_rows, row_of, store_some
from nsa_kernels_triton.kernels.interval import num_compressed
from nsa_kernels_triton.kernels.pieces import load_piece, logits
from nsa_kernels_triton.kernels.softmax import empty, update


@triton.jit(do_not_specialize=["scale"])
def decode_compressed_kernel(
    Q_CMP,
    SCRATCH,
    BLOCK_INDICES,
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
    batch_size,
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
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
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
    CHOOSE: tl.constexpr,
    APPEND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    M_AT: tl.constexpr,
    L_AT: tl.constexpr,
    O_AT: tl.constexpr,
    LOGITS_AT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (B * HEADS * ROW_TILES * SPLITS + B * N if there are new rows to append).

    Split s takes tiles s, s + SPLITS, ... of KEYS compressed blocks, and makes their new blocks. APPEND:
    "" (no new rows), "pooled" (`PooledTokens`) or "completed" (`CompletedBlocks`). VALUES: also sum the values; else
    the next kernel does, from the logits. CHOOSE (one split, one tile of rows, one chunk): also choose the blocks.

    Limited by the bytes of k_cmp (and v_cmp) where many programs run, by the latency of dependent loads where few do:
    so the first page's number is loaded beside the length, later ones a tile ahead, and new rows are stored by programs
    of their own.
    """
    if EARLY:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    head = pid % HEADS
    pid = pid // HEADS
    SIZE: tl.constexpr = ROWS * ROW_TILES
    attending = batch_size * (ROW_TILES * SPLITS)
    if pid < attending:
        split = pid % SPLITS
        row_tile = pid // SPLITS % ROW_TILES
        sequence = pid // (SPLITS * ROW_TILES)
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
        q_rows = query_rows(Q_CMP, sequence, head, token, member, N, HEADS, GROUP, DK)
        q0 = load_piece(q_rows, there, 0, K0, DK)
        q1 = load_piece(q_rows, there, K0, K1, DK)
        before = length - count
        total = tl.minimum(num_compressed(length - 1, KERNEL_SIZE, KERNEL_STRIDE), width)
        visible = tl.where(there, num_compressed(before + token, KERNEL_SIZE, KERNEL_STRIDE), 0)
        tiles = tl.cdiv(total, KEYS)
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
            if made < total:
                for number in range(made, total):
                    if number // KEYS % SPLITS == split:  # of a tile that this program reads
                        if APPEND == "pooled":
                            emit_pooled(
                                *(K_CMP, table, cmp_table, K_TAIL + ring * DK, K_WEIGHTS, new_k_cmp, ROTATION),
                                *(k_cmp_row, tail_size, rotated_blocks, before, number, head, INTERLEAVED),
                                *(HEADS, CMP_PAGE, KERNEL_SIZE, KERNEL_STRIDE, DK, K_WIDTH),
                            )
                            emit_pooled(
                                *(V_CMP, v_table, cmp_table, V_TAIL + ring * DV, V_WEIGHTS, new_v_cmp, None),
                                *(v_cmp_row, tail_size, rotated_blocks, before, number, head, INTERLEAVED),
                                *(HEADS, CMP_PAGE, KERNEL_SIZE, KERNEL_STRIDE, DV, V_WIDTH),
                            )
                        else:
                            k_new = new_k_cmp + (number - made) * k_cmp_row
                            v_new = new_v_cmp + (number - made) * v_cmp_row
                            emit_completed(K_CMP, table, cmp_table, k_new, number, head, HEADS, CMP_PAGE, DK, K_WIDTH)
                            emit_completed(V_CMP, v_table, cmp_table, v_new, number, head, HEADS, CMP_PAGE, DV, V_WIDTH)
                tl.debug_barrier()  # before this program reads them

        key = tl.arange(0, KEYS)
        here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
        line = here + LOGITS_AT + row.to(tl.int64) * width
        m, norm, acc0, acc1 = empty(ROWS, V0, V1)
        stop = tl.where(count > 0, tiles, 0)
        for tile in tl.range(split, stop, SPLITS):
            block = tile * KEYS + key
            slot = page.to(tl.int64) * CMP_PAGE + (tile * KEYS) % CMP_PAGE + key
            loaded = (block < total) & (slot >= 0)  # negative without a page; a bound that is 0 then takes registers
            if not SAME:
                v_page = tl.load(v_table + tile * KEYS // CMP_PAGE)
                v_slot = v_page.to(tl.int64) * CMP_PAGE + (tile * KEYS) % CMP_PAGE + key
                v_loaded = (block < total) & (v_slot >= 0)
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

        if VALUES:
            store_some(here + M_AT + split * SIZE, here + L_AT + split * SIZE, here + O_AT + split * SIZE * DV,
                       row, there, m, norm, acc0, acc1, DV, V0, V1)  # fmt: skip
        else:
            tl.store(here + M_AT + split * SIZE + row, m)
            tl.store(here + L_AT + split * SIZE + row, norm)
        if CHOOSE:
            tl.debug_barrier()  # before this program reads its logits
            for number in range(N):
                chosen = BLOCK_INDICES + ((sequence * N + number) * HEADS + head).to(tl.int64) * TOPK
                choose(
                    *(LENGTHS, COUNTS, here, chosen),
                    *(K_SLC_TABLE + sequence.to(tl.int64) * slc_table, sequence, number, 0, width, N, GROUP),
                    *(HEADS_AT_ONCE, SLC_PAGE // BLOCK_SIZE, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, TOPK, INIT, LOCAL),
                    *(CHUNK, 1, SLOTS, SIZE, SPLITS, M_AT, L_AT, 0, LOGITS_AT),
                )
    elif APPEND != "":
        pid = tl.program_id(0) - HEADS * attending
        sequence = pid // N
        place = pid % N
        length = tl.load(LENGTHS + sequence)
        count = tl.load(COUNTS + sequence)
        if place == 0:
            tl.store(CMP_LENGTHS + sequence, num_compressed(length - 1, KERNEL_SIZE, KERNEL_STRIDE))
        if place < count:
            position = length - count + place
            number = pid.to(tl.int64)
            # All loads before all stores, which nobody knows not to be to the same memory.
            k_slc = load_heads(NEW_K_SLC + number * k_slc_row, HEADS, DK, K_WIDTH)
            v_slc = load_heads(NEW_V_SLC + number * v_slc_row, HEADS, DV, V_WIDTH)
            k_win = load_heads(NEW_K_WIN + number * k_win_row, HEADS, DK, K_WIDTH)
            v_win = load_heads(NEW_V_WIN + number * v_win_row, HEADS, DV, V_WIDTH)
            slc = load_slot(K_SLC_TABLE + sequence.to(tl.int64) * slc_table, slc_table, position, SLC_PAGE)
            win = load_slot(K_WIN_TABLE + sequence.to(tl.int64) * win_table, win_table, position, WIN_PAGE)
            v_slc_slot = slc
            v_win_slot = win
            if V_SLC_TABLE is not None:
                v_slc_slot = load_slot(V_SLC_TABLE + sequence.to(tl.int64) * slc_table, slc_table, position, SLC_PAGE)
            if V_WIN_TABLE is not None:
                v_win_slot = load_slot(V_WIN_TABLE + sequence.to(tl.int64) * win_table, win_table, position, WIN_PAGE)
            if APPEND == "pooled":
                k_cmp = load_heads(NEW_K_CMP + number * k_cmp_row, HEADS, DK, K_WIDTH)
                v_cmp = load_heads(NEW_V_CMP + number * v_cmp_row, HEADS, DV, V_WIDTH)
                ring = sequence.to(tl.int64) * tail_size + position % tail_size
                store_heads(K_TAIL, ring, k_cmp, HEADS, DK, K_WIDTH)
                store_heads(V_TAIL, ring, v_cmp, HEADS, DV, V_WIDTH)
            store_heads(K_SLC, slc, k_slc, HEADS, DK, K_WIDTH)
            store_heads(V_SLC, v_slc_slot, v_slc, HEADS, DV, V_WIDTH)
            store_heads(K_WIN, win, k_win, HEADS, DK, K_WIDTH)
            store_heads(V_WIN, v_win_slot, v_win, HEADS, DV, V_WIDTH)
