"""A decode step, second kernel, where the keys are split: compressed values and the choice of blocks, and the window.

Kinds of programs share a grid, so that those that wait (the choice) run beside those that load.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa_kernels_triton.kernels.decode_choosing import (
    choose,
    current_block,
    leave_none,
    log_sums,
    settle,
    store_forced,
    summed_scores,
)
from nsa_kernels_triton.kernels.decode_rows import row_of
from nsa_kernels_triton.kernels.decode_window import attend_to_window
from nsa_kernels_triton.kernels.interval import num_compressed
from nsa_kernels_triton.kernels.pieces import load_piece, store_piece
from nsa_kernels_triton.kernels.softmax import empty


@triton.jit
def add_values_and_choose(
    HERE, LENGTHS, COUNTS, V_CMP, TABLE, OUT, SLC_TABLE, sequence, head, split, total, width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, VALUE_SPLITS: tl.constexpr,
    PAGES_OF: tl.constexpr, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr, M_AT: tl.constexpr, L_AT: tl.constexpr, O_AT: tl.constexpr, CANDIDATES_AT: tl.constexpr,
    SUMS_AT: tl.constexpr, LOGITS_AT: tl.constexpr,
):  # fmt: skip
    """One token: compressed attention's output over some chunks, whose blocks are chosen from the same probabilities.

    The tile before a chunk is gone through once more, without its values: the chunk's first block overlaps it, and its
    probabilities must be the same to the last bit as those that another program has.
    """
    count = tl.load(COUNTS + sequence)
    row, token, member, there = row_of(0, ROWS, GROUP, 1, count)
    lse = log_sums(HERE + M_AT, HERE + L_AT, row, there, ROWS, SPLITS)
    current = current_block(LENGTHS, COUNTS, sequence, 0, BLOCK_SIZE)
    if CHUNKS == 1:
        if split == 0:
            store_forced(OUT, current, TOPK, INIT, LOCAL)
    _, _, acc0, acc1 = empty(ROWS, V0, V1)
    line = HERE + LOGITS_AT + row.to(tl.int64) * width
    SUMS = HERE + SUMS_AT
    key = tl.arange(0, KEYS)
    ALPHA: tl.constexpr = KERNEL_SIZE // KERNEL_STRIDE
    BETA: tl.constexpr = BLOCK_SIZE // KERNEL_STRIDE
    TILES: tl.constexpr = CHUNK * BETA // KEYS
    most_tiles = width // KEYS
    tiles = tl.where(count > 0, tl.cdiv(total, KEYS), 0)
    for chunk in range(split, CHUNKS, VALUE_SPLITS):
        begin = chunk * TILES
        first = tl.maximum(begin - 1, 0) if ALPHA > 1 else begin
        # The last one has what never competes, too.
        stop = tl.where(chunk == CHUNKS - 1, tiles, tl.minimum(begin + TILES, tiles))
        page = tl.load(TABLE + tl.minimum(first, most_tiles - 1) * KEYS // PAGE)
        for tile in tl.range(first, stop):
            block = tile * KEYS + key
            slot = page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
            mine = tile >= begin
            loaded = (block < total) & (page >= 0) & mine
            page = tl.load(TABLE + tl.minimum(tile + 1, most_tiles - 1) * KEYS // PAGE)
            v_rows = V_CMP + (slot * HEADS + head) * DV
            v0 = load_piece(v_rows, loaded, 0, V0, DV)
            v1 = load_piece(v_rows, loaded, V0, V1, DV)
            seen = there[:, None] & (block < total)[None, :]
            s = tl.load(line[:, None] + block[None, :], mask=seen, other=float("-inf"))
            p = tl.exp2(s - lse[:, None])
            tl.store(SUMS + block, tl.sum(p, 0))
            p = p.to(v0.dtype)  # times values that are 0 where the tile is another's
            acc0 = tl.dot(p, v0, acc0, input_precision="ieee")
            if v1 is not None:
                acc1 = tl.dot(p, v1, acc1, input_precision="ieee")
        if (TOPK > INIT + LOCAL) & (current >= TOPK) & (chunk * CHUNK <= current - LOCAL):
            tl.debug_barrier()  # before this program reads the sums
            score = summed_scores(SUMS, chunk, total, CHUNK, ALPHA, BETA)
            settle(
                *(HERE, OUT, SLC_TABLE, score, current, chunk, 0, 1, PAGES_OF, TOPK, INIT, LOCAL, CHUNK, CHUNKS),
                *(SLOTS, CANDIDATES_AT),
            )
        elif CHUNKS > 1:
            leave_none(HERE, chunk, 0, CHUNKS, SLOTS, CANDIDATES_AT)
    rows = HERE + O_AT + (split * ROWS + row).to(tl.int64) * DV
    everywhere = row >= 0
    store_piece(rows, acc0, everywhere, 0, V0, DV)
    if V1 > 0:
        store_piece(rows, acc1, everywhere, V0, V1, DV)


@triton.jit
def add_values(
    HERE, COUNTS, V_CMP, TABLE, sequence, head, row_tile, split, total, width,
    N: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, VALUE_SPLITS: tl.constexpr,
    SIZE: tl.constexpr, M_AT: tl.constexpr, L_AT: tl.constexpr, O_AT: tl.constexpr, LOGITS_AT: tl.constexpr,
):  # fmt: skip
    """Compressed attention's output over the tiles of one split: probabilities times values, to be added up."""
    most_tiles = width // KEYS
    page = tl.load(TABLE + tl.minimum(split, most_tiles - 1) * KEYS // PAGE)
    count = tl.load(COUNTS + sequence)
    row, token, member, there = row_of(row_tile, ROWS, GROUP, N, count)
    lse = log_sums(HERE + M_AT, HERE + L_AT, row, there, SIZE, SPLITS)
    _, _, acc0, acc1 = empty(ROWS, V0, V1)
    line = HERE + LOGITS_AT + row.to(tl.int64) * width
    key = tl.arange(0, KEYS)
    for tile in tl.range(split, tl.where(count > 0, tl.cdiv(total, KEYS), 0), VALUE_SPLITS):
        block = tile * KEYS + key
        slot = page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
        loaded = (block < total) & (page >= 0)
        page = tl.load(TABLE + tl.minimum(tile + VALUE_SPLITS, most_tiles - 1) * KEYS // PAGE)
        v_rows = V_CMP + (slot * HEADS + head) * DV
        v0 = load_piece(v_rows, loaded, 0, V0, DV)
        v1 = load_piece(v_rows, loaded, V0, V1, DV)
        seen = there[:, None] & (block < total)[None, :]
        s = tl.load(line[:, None] + block[None, :], mask=seen, other=float("-inf"))
        p = tl.exp2(s - lse[:, None]).to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0, input_precision="ieee")
        if v1 is not None:
            acc1 = tl.dot(p, v1, acc1, input_precision="ieee")
    rows = HERE + O_AT + (split * SIZE + row).to(tl.int64) * DV
    everywhere = row >= 0
    store_piece(rows, acc0, everywhere, 0, V0, DV)
    if V1 > 0:
        store_piece(rows, acc1, everywhere, V0, V1, DV)


@triton.jit(do_not_specialize=["scale", "window_size"])
def decode_choice_kernel(
    Q,
    SCRATCH,
    LENGTHS,
    COUNTS,
    V_CMP,
    V_CMP_TABLE,
    K_SLC_TABLE,
    K_WIN,
    V_WIN,
    K_WIN_TABLE,
    V_WIN_TABLE,
    OUT,
    batch_size,
    scale,
    window_size,
    region,
    width,
    cmp_table,
    slc_table,
    win_table,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
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
    CMP_KEYS: tl.constexpr,
    WIN_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_SPLITS: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr,
    M_AT: tl.constexpr,
    L_AT: tl.constexpr,
    O_AT: tl.constexpr,
    WIN_M_AT: tl.constexpr,
    WIN_L_AT: tl.constexpr,
    WIN_O_AT: tl.constexpr,
    TOGETHER: tl.constexpr,
    SUMS_AT: tl.constexpr,
    CANDIDATES_AT: tl.constexpr,
    LOGITS_AT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (B * HEADS * (ROW_TILES * (VALUE_SPLITS + WINDOW_SPLITS) + choosing)).

    VALUE_SPLITS 0: the values were added by the first kernel. TOGETHER (one token): programs that add values choose
    from the probabilities that they have, chunk by chunk, and choosing is 0; else it is N * CHUNKS.

    Limited by the bytes of v_cmp and the window where many programs run, by the choice's latency where few do.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    head = pid % HEADS
    pid = pid // HEADS
    SIZE: tl.constexpr = ROWS * ROW_TILES
    choosing = batch_size * (0 if TOGETHER else N * CHUNKS)
    adding = batch_size * (ROW_TILES * VALUE_SPLITS)
    if pid < choosing:
        if not TOGETHER:
            sequence = pid // (N * CHUNKS)
            token = pid // CHUNKS % N
            here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
            choose(
                *(LENGTHS, COUNTS, here, OUT + ((sequence * N + token) * HEADS + head).to(tl.int64) * TOPK),
                *(K_SLC_TABLE + sequence.to(tl.int64) * slc_table, sequence, token, pid % CHUNKS, width, N, GROUP),
                *(HEADS_AT_ONCE, SLC_PAGE // BLOCK_SIZE, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, TOPK, INIT, LOCAL),
                *(CHUNK, CHUNKS, SLOTS, SIZE, SPLITS, M_AT, L_AT, CANDIDATES_AT, LOGITS_AT),
            )
    elif pid < choosing + adding:
        pid = pid - choosing
        VALUE_PROGRAMS: tl.constexpr = ROW_TILES * VALUE_SPLITS if VALUE_SPLITS > 0 else 1
        SOME_SPLITS: tl.constexpr = VALUE_SPLITS if VALUE_SPLITS > 0 else 1
        sequence = pid // VALUE_PROGRAMS
        here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
        total = num_compressed(tl.load(LENGTHS + sequence) - 1, KERNEL_SIZE, KERNEL_STRIDE)
        table = V_CMP_TABLE + sequence.to(tl.int64) * cmp_table
        if TOGETHER:
            add_values_and_choose(
                *(here, LENGTHS, COUNTS, V_CMP, table, OUT + (sequence * HEADS + head).to(tl.int64) * TOPK),
                *(K_SLC_TABLE + sequence.to(tl.int64) * slc_table, sequence, head, pid % SOME_SPLITS, total, width),
                *(HEADS, GROUP, CMP_PAGE, DV, V0, V1, ROWS, CMP_KEYS, SPLITS, VALUE_SPLITS, SLC_PAGE // BLOCK_SIZE),
                *(KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, TOPK, INIT, LOCAL, CHUNK, CHUNKS, SLOTS, M_AT, L_AT, O_AT),
                *(CANDIDATES_AT, SUMS_AT, LOGITS_AT),
            )
        elif VALUE_SPLITS > 0:
            add_values(
                *(here, COUNTS, V_CMP, table, sequence, head, pid // SOME_SPLITS % ROW_TILES, pid % SOME_SPLITS),
                *(total, width, N, HEADS, GROUP, CMP_PAGE, DV, V0, V1, ROWS, CMP_KEYS, SPLITS, VALUE_SPLITS),
                *(SIZE, M_AT, L_AT, O_AT, LOGITS_AT),
            )
    elif WINDOW_SPLITS > 0:
        pid = pid - (choosing + adding)
        sequence = pid // (ROW_TILES * WINDOW_SPLITS)
        here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
        table = K_WIN_TABLE + sequence.to(tl.int64) * win_table
        v_table = table
        if V_WIN_TABLE is not None:
            v_table = V_WIN_TABLE + sequence.to(tl.int64) * win_table
        attend_to_window(
            *(here, Q, LENGTHS, COUNTS, K_WIN, V_WIN, table, v_table, Q, Q, 0, 0, sequence, head),
            *(pid // WINDOW_SPLITS % ROW_TILES, pid % WINDOW_SPLITS, scale, window_size, N, HEADS, GROUP, WIN_PAGE),
            *(DK, K0, K1, DV, V0, V1, ROWS, WIN_KEYS, WINDOW_SPLITS, SIZE, WIN_M_AT, WIN_L_AT, WIN_O_AT),
            *(V_WIN_TABLE is None, False),
        )
