"""The gated sum of the three branches."""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import load_piece, store_piece


@triton.jit(do_not_specialize=["total"])
def combine_kernel(
    GATES,
    O_CMP,
    O_SLC,
    O_WIN,
    OUT,
    total,
    num_heads,
    gates_row,
    gates_head,
    gates_branch,
    cmp_row,
    cmp_head,
    slc_row,
    slc_head,
    win_row,
    win_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """OUT [Tq, Hq, DIM] = sum of GATES[..., c] * O_c over the branches, fp32; a program takes ROWS of Tq * Hq rows.

    Limited by bytes: 4 DIM values and 3 gates a row, each moved once, in accesses of 16 bytes where strides allow them.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    there = first + row < total
    head = (first % num_heads).to(tl.int32) + row
    token = first // num_heads + head // num_heads
    head = (head % num_heads).to(tl.int64)
    gates = GATES + token * gates_row + head * gates_head
    g_cmp = tl.load(gates, mask=there, other=0.0).to(tl.float32)
    g_slc = tl.load(gates + gates_branch, mask=there, other=0.0).to(tl.float32)
    g_win = tl.load(gates + 2 * gates_branch, mask=there, other=0.0).to(tl.float32)
    o_cmp = load_piece(O_CMP + token * cmp_row + head * cmp_head, there, 0, WIDTH, DIM).to(tl.float32)
    o_slc = load_piece(O_SLC + token * slc_row + head * slc_head, there, 0, WIDTH, DIM).to(tl.float32)
    o_win = load_piece(O_WIN + token * win_row + head * win_head, there, 0, WIDTH, DIM).to(tl.float32)
    out = g_cmp[:, None] * o_cmp + g_slc[:, None] * o_slc + g_win[:, None] * o_win
    store_piece(OUT + (first + row) * DIM, out, there, 0, WIDTH, DIM)


@triton.jit(do_not_specialize=["total"])
def combine_backward_kernel(
    GRAD_OUT,
    GATES,
    O_CMP,
    O_SLC,
    O_WIN,
    D_GATES,
    D_CMP,
    D_SLC,
    D_WIN,
    total,
    num_heads,
    grad_row,
    grad_head,
    gates_row,
    gates_head,
    gates_branch,
    cmp_row,
    cmp_head,
    slc_row,
    slc_head,
    win_row,
    win_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """D_GATES [Tq, Hq, 3] = do . O_c, D_c [Tq, Hq, DIM] = GATES[..., c] * do, with do of GRAD_OUT; fp32 sums.

    Limited by bytes: 7 DIM values a row, each moved once.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    there = first + row < total
    head = (first % num_heads).to(tl.int32) + row
    token = first // num_heads + head // num_heads
    head = (head % num_heads).to(tl.int64)
    grad = load_piece(GRAD_OUT + token * grad_row + head * grad_head, there, 0, WIDTH, DIM).to(tl.float32)
    gates = GATES + token * gates_row + head * gates_head
    d_gates = D_GATES + (first + row) * 3
    d_rows = (first + row) * DIM
    branch_backward(grad, gates, O_CMP + token * cmp_row + head * cmp_head, d_gates, D_CMP + d_rows, there, WIDTH, DIM)
    gates += gates_branch
    branch_backward(
        grad, gates, O_SLC + token * slc_row + head * slc_head, d_gates + 1, D_SLC + d_rows, there, WIDTH, DIM
    )
    gates += gates_branch
    branch_backward(
        grad, gates, O_WIN + token * win_row + head * win_head, d_gates + 2, D_WIN + d_rows, there, WIDTH, DIM
    )


@triton.jit
def branch_backward(grad, gates, outs, d_gates, d_outs, there, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """What one branch gets of the gradient, and its gate: rows at the pointers."""
    out = load_piece(outs, there, 0, WIDTH, DIM).to(tl.float32)
    tl.store(d_gates, tl.sum(grad * out, 1).to(d_gates.dtype.element_ty), mask=there)
    gate = tl.load(gates, mask=there, other=0.0).to(tl.float32)
    store_piece(d_outs, gate[:, None] * grad, there, 0, WIDTH, DIM)
