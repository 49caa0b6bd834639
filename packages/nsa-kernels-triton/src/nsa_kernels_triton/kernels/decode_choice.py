"""A decode step, second kernel: the choice of blocks, and beside it, where programs are few, compressed values.

Both kinds of programs share a grid, so that those that wait (the choice) run beside those that load.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa_kernels_triton.kernels.decode_choosing import choose, log_sums
from nsa_kernels_triton.kernels.decode_rows import row_of
from nsa_kernels_triton.kernels.interval import num_compressed
from nsa_kernels_triton.kernels.pieces import load_piece, store_piece
from nsa_kernels_triton.kernels.softmax import empty


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
    row, _, _, there = row_of(row_tile, ROWS, GROUP, N, count)
    lse = log_sums(HERE + M_AT, HERE + L_AT, row, there, SIZE, SPLITS)
    _, _, acc0, acc1 = empty(ROWS, V0, V1)
    line = HERE + LOGITS_AT + row.to(tl.int64) * width
    key = tl.arange(0, KEYS)
    for tile in tl.range(split, tl.where(count > 0, tl.cdiv(total, KEYS), 0), VALUE_SPLITS):
        block = tile * KEYS + key
        slot = page.to(tl.int64) * PAGE + (tile * KEYS) % PAGE + key
        loaded = block < tl.where(page >= 0, total, 0)
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


@triton.jit
def decode_choice_kernel(
    SCRATCH,
    LENGTHS,
    COUNTS,
    V_CMP,
    V_CMP_TABLE,
    K_SLC_TABLE,
    OUT,
    batch_size,
    region,
    width,
    cmp_table,
    slc_table,
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
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_SPLITS: tl.constexpr,
    M_AT: tl.constexpr,
    L_AT: tl.constexpr,
    O_AT: tl.constexpr,
    CANDIDATES_AT: tl.constexpr,
    LOGITS_AT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (B * HEADS * (N * CHUNKS + ROW_TILES * VALUE_SPLITS)). VALUE_SPLITS 0: the first kernel added the values.

    Limited by latency: of a chain from logits to scores, comparisons and candidates.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    head = pid % HEADS
    pid = pid // HEADS
    SIZE: tl.constexpr = ROWS * ROW_TILES
    choosing = batch_size * (N * CHUNKS)
    if pid < choosing:
        sequence = pid // (N * CHUNKS)
        token = pid // CHUNKS % N
        here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
        choose(
            *(LENGTHS, COUNTS, here, OUT + ((sequence * N + token) * HEADS + head).to(tl.int64) * TOPK),
            *(K_SLC_TABLE + sequence.to(tl.int64) * slc_table, sequence, token, pid % CHUNKS, width, N, GROUP),
            *(HEADS_AT_ONCE, SLC_PAGE // BLOCK_SIZE, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, TOPK, INIT, LOCAL),
            *(CHUNK, CHUNKS, SLOTS, SIZE, SPLITS, M_AT, L_AT, CANDIDATES_AT, LOGITS_AT),
        )
    elif VALUE_SPLITS > 0:
        pid = pid - choosing
        sequence = pid // (ROW_TILES * VALUE_SPLITS)
        here = SCRATCH + (sequence * HEADS + head).to(tl.int64) * region
        total = num_compressed(tl.load(LENGTHS + sequence) - 1, KERNEL_SIZE, KERNEL_STRIDE)
        table = V_CMP_TABLE + sequence.to(tl.int64) * cmp_table
        add_values(
            *(here, COUNTS, V_CMP, table, sequence, head, pid // VALUE_SPLITS % ROW_TILES, pid % VALUE_SPLITS),
            *(total, width, N, HEADS, GROUP, CMP_PAGE, DV, V0, V1, ROWS, KEYS, SPLITS, VALUE_SPLITS),
            *(SIZE, M_AT, L_AT, O_AT, LOGITS_AT),
        )
