"""A decode step's window: a kind of program of the first kernel or the second."""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.decode_rows import query_rows, row_of, store_part
from nsa_kernels_triton.kernels.pieces import load_piece, logits
from nsa_kernels_triton.kernels.softmax import empty, update


@triton.jit
def attend_to_window(
    HERE, Q, LENGTHS, COUNTS, K_WIN, V_WIN, TABLE, V_TABLE, NEW_K, NEW_V, k_new_row, v_new_row,
    sequence, head, row_tile, split, scale, window_size,
    N: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DK: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr, SIZE: tl.constexpr, M_AT: tl.constexpr, L_AT: tl.constexpr, O_AT: tl.constexpr,
    SAME: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """The window over one split of its tiles, which begin where pages allow a tile to be of one page.

    FRESH: the newest rows are on their way into the pages, and are taken from NEW_K and NEW_V; by the last split.
    """
    length = tl.load(LENGTHS + sequence)
    count = tl.load(COUNTS + sequence)
    row, token, member, there = row_of(row_tile, ROWS, GROUP, N, count)
    q_rows = query_rows(Q, sequence, head, token, member, N, HEADS, GROUP, DK)
    q0 = load_piece(q_rows, there, 0, K0, DK)
    q1 = load_piece(q_rows, there, K0, K1, DK)
    before = length - count
    position = tl.where(there, before + token, -1)
    earliest = tl.maximum(before + 1 - window_size, 0)
    stored = length
    if FRESH:
        stored = before
    first = earliest // KEYS
    tiles = tl.where(count > 0, tl.cdiv(stored, KEYS) - first, 0)
    part = tl.cdiv(tiles, WINDOW_SPLITS)
    begin = first + split * part
    stop = tl.minimum(begin + part, first + tiles)
    key = tl.arange(0, KEYS)
    m, norm, acc0, acc1 = empty(ROWS, V0, V1)
    last = tl.maximum(stored - 1, 0) // PAGE
    page = tl.load(TABLE + tl.minimum(begin * KEYS // PAGE, last))
    for tile in tl.range(begin, stop):
        at = tile * KEYS + key
        slot = page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
        loaded = (at >= earliest) & (at < stored) & (page >= 0)
        if SAME:
            v_slot = slot
            v_loaded = loaded
        else:
            v_page = tl.load(V_TABLE + tile * KEYS // PAGE)
            v_slot = v_page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
            v_loaded = (at >= earliest) & (at < stored) & (v_page >= 0)
        page = tl.load(TABLE + tl.minimum((tile + 1) * KEYS // PAGE, last))
        k_rows = K_WIN + (slot * HEADS + head) * DK
        s = logits(q0, q1, load_piece(k_rows, loaded, 0, K0, DK), load_piece(k_rows, loaded, K0, K1, DK))
        seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window_size)
        if FRESH:
            seen &= at[None, :] < stored
        s = tl.where(seen, s, float("-inf"))
        v_rows = V_WIN + (v_slot * HEADS + head) * DV
        v0 = load_piece(v_rows, v_loaded, 0, V0, DV)
        v1 = load_piece(v_rows, v_loaded, V0, V1, DV)
        m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)
    if FRESH:
        if split == WINDOW_SPLITS - 1:
            FEW: tl.constexpr = 16 if N < 16 else triton.next_power_of_2(N)
            number = tl.arange(0, FEW)
            loaded = number < count
            k_rows = NEW_K + number * k_new_row
            s = logits(q0, q1, load_piece(k_rows, loaded, 0, K0, DK), load_piece(k_rows, loaded, K0, K1, DK))
            at = before + number
            seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window_size)
            s = tl.where(seen & loaded[None, :], s, float("-inf"))
            v_rows = NEW_V + number * v_new_row
            v0 = load_piece(v_rows, loaded, 0, V0, DV)
            v1 = load_piece(v_rows, loaded, V0, V1, DV)
            m, norm, acc0, acc1 = update(s, scale, m, norm, acc0, acc1, v0, v1)
    store_part(HERE + M_AT + split * SIZE, HERE + L_AT + split * SIZE, HERE + O_AT + split * SIZE * DV,
               row, m, norm, acc0, acc1, DV, V0, V1)  # fmt: skip
