"""Rows of a head, in one or two pieces whose widths are powers of two; see `nsa_kernels_triton.tiles.pieces`."""

import triton
import triton.language as tl

PLAIN = tl.constexpr("")


@triton.jit
def load_piece(ROWS, there, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Columns [START, START + WIDTH) of rows at the pointers ROWS [n]: zeros beyond DIM and where not `there` [n].

    `there` None says that every row is there. A WIDTH of 0 gives None.
    """
    values = None  # one return: Triton 3.6 knows no other way to give None
    if WIDTH > 0:
        column = START + tl.arange(0, WIDTH)
        pointers = ROWS[:, None] + column[None, :]
        if START + WIDTH > DIM:
            if there is None:
                values = tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
            else:
                values = tl.load(pointers, mask=there[:, None] & (column < DIM)[None, :], other=0.0)
        elif there is None:
            values = tl.load(pointers)
        else:
            values = tl.load(pointers, mask=there[:, None], other=0.0)
    return values


@triton.jit
def store_piece(
    ROWS, values, there, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, CACHE: tl.constexpr = PLAIN
):
    """The inverse of `load_piece`; a WIDTH of 0 stores nothing. CACHE: `tl.store`'s cache_modifier."""
    if WIDTH > 0:
        column = START + tl.arange(0, WIDTH)
        pointers = ROWS[:, None] + column[None, :]
        if START + WIDTH > DIM:
            inside = there[:, None] & (column < DIM)[None, :]
            tl.store(pointers, values.to(ROWS.dtype.element_ty), mask=inside, cache_modifier=CACHE)
        else:
            tl.store(pointers, values.to(ROWS.dtype.element_ty), mask=there[:, None], cache_modifier=CACHE)


@triton.jit
def transposed(piece):
    """A piece [rows, WIDTH] as [WIDTH, rows]. What a loop multiplies by again and again is transposed before it.

    In a loop, Triton 3.9 would copy it to shared memory at each turn.
    """
    values = piece
    if piece is not None:
        values = tl.trans(piece)
    return values


@triton.jit
def products(a0, a1, b0, b1):
    """Rows of `a` times columns of `b`, of which b0 [WIDTH, columns] and b1 are pieces; fp32, IEEE for fp32 inputs."""
    s = tl.dot(a0, b0, input_precision="ieee")
    if a1 is not None:
        s = tl.dot(a1, b1, s, input_precision="ieee")
    return s


@triton.jit
def logits(q0, q1, k0, k1):
    """q k^T of pieces, fp32 [rows, keys]. IEEE products for fp32 inputs; half precision is not concerned."""
    return products(q0, q1, tl.trans(k0), transposed(k1))
