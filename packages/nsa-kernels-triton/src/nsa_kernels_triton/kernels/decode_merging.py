"""A decode step, last kernel: what each branch's splits found is merged, and the branches are added by their gates."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def merged(
    M, L, PARTS, row, there, column, SPLITS: tl.constexpr, ADDED: tl.constexpr, SIZE: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """Columns `column` of one branch's output for query rows `row`. ADDED: parts need only be added up."""
    inside = there[:, None] & (column < DV)[None, :]
    places = PARTS + (row * DV)[:, None] + column[None, :]
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    if ADDED:
        for split in tl.static_range(SPLITS):
            total += tl.load(places + split * SIZE * DV, mask=inside, other=0.0)
    else:
        top = tl.full([row.shape[0]], float("-inf"), tl.float32)
        for split in tl.static_range(SPLITS):
            top = tl.maximum(top, tl.load(M + split * SIZE + row, mask=there, other=float("-inf")))
        top = tl.where(top == float("-inf"), 0.0, top)
        norm = tl.zeros([row.shape[0]], tl.float32)
        for split in tl.static_range(SPLITS):
            weight = tl.exp2(tl.load(M + split * SIZE + row, mask=there, other=float("-inf")) - top)
            norm += weight * tl.load(L + split * SIZE + row, mask=there, other=0.0)
            total += tl.load(places + split * SIZE * DV, mask=inside, other=0.0) * weight[:, None]
        total *= tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)[:, None]
    return total


@triton.jit
def gated(GATES, there, o_cmp, o_slc, o_win):
    """The sum of the branches by gates [rows, 3]."""
    g_cmp = tl.load(GATES, mask=there, other=0.0).to(tl.float32)
    g_slc = tl.load(GATES + 1, mask=there, other=0.0).to(tl.float32)
    g_win = tl.load(GATES + 2, mask=there, other=0.0).to(tl.float32)
    return g_cmp[:, None] * o_cmp + g_slc[:, None] * o_slc + g_win[:, None] * o_win


@triton.jit
def store_out(OUT, values, row_there, is_token, column, DV: tl.constexpr):
    """Write columns of tokens' outputs; of padding zeros, whatever its gates hold."""
    inside = row_there[:, None] & (column < DV)[None, :]
    tl.store(OUT[:, None] + column[None, :], tl.where(is_token, values, 0.0).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def decode_merge_kernel(
    SCRATCH,
    COUNTS,
    GATES,
    OUT,
    region,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    SIZE: tl.constexpr,
    CMP_SPLITS: tl.constexpr,
    SLC_SPLITS: tl.constexpr,
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
    EARLY: tl.constexpr,
):
    """ROWS query rows of one kv head, COLUMNS of their outputs. Grid (B * HEADS * ROW_TILES * COLUMN_TILES).

    CMP_SPLITS: of the compressed branch's outputs; ADDED: these need only be added up. SLC_SPLITS: of the others'.

    Limited by latency: all loads of a program are independent and go out at once.
    """
    if EARLY:
        gdc_wait()
    pid = tl.program_id(0)
    column_tile = pid % COLUMN_TILES
    row_tile = pid // COLUMN_TILES % ROW_TILES
    pair = pid // (COLUMN_TILES * ROW_TILES)
    sequence = pair // HEADS
    head = pair % HEADS
    here = SCRATCH + pair.to(tl.int64) * region
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    token = row // GROUP
    known = token < N
    is_token = token < tl.load(COUNTS + sequence)
    there = known & is_token
    o_cmp = merged(here + M_AT, here + L_AT, here + O_AT, row, there, column, CMP_SPLITS, ADDED, SIZE, DV)
    o_slc = merged(here + SLC_M_AT, here + SLC_L_AT, here + SLC_O_AT, row, there, column, SLC_SPLITS, False, SIZE, DV)
    o_win = merged(here + WIN_M_AT, here + WIN_L_AT, here + WIN_O_AT, row, there, column, SLC_SPLITS, False, SIZE, DV)
    number = ((sequence * N + token) * HEADS + head).to(tl.int64) * GROUP + row % GROUP
    out = gated(GATES + number * 3, there, o_cmp, o_slc, o_win)
    store_out(OUT + number * DV, out, known, is_token[:, None], column, DV)
