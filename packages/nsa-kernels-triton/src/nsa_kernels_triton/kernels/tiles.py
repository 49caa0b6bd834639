"""Which rows of a packed batch a program works on."""

import triton
import triton.language as tl


@triton.jit
def find_tile(CU_SEQLENS, tile, batch_size, SIZE: tl.constexpr):
    """(sequence, first row, end of the sequence) of a tile of at most SIZE packed rows of one sequence.

    Tiles of sequence b are numbered from CU_SEQLENS[b] // SIZE + b: a formula, so that no table has to be made. It
    leaves a number or so between sequences unused; such a tile has first row >= end. `nsa_kernels_triton.tiles` counts
    them. Row numbers are int64, they are multiplied by strides.
    """
    sequence = -1
    for first in range(0, batch_size, 128):
        candidate = first + tl.arange(0, 128)
        known = candidate < batch_size
        begin = tl.load(CU_SEQLENS + candidate, mask=known, other=0) // SIZE + candidate
        sequence += tl.sum((known & (begin <= tile)).to(tl.int32), 0)
    start = tl.load(CU_SEQLENS + sequence)
    row = start + (tile - (start // SIZE + sequence)) * SIZE
    return sequence, row.to(tl.int64), tl.load(CU_SEQLENS + sequence + 1).to(tl.int64)


@triton.jit
def chunk_start(CU_SEQLENS_Q, first_tile, batch_size, QUERIES: tl.constexpr):
    """First packed query row of a chunk of tiles that begins with tile `first_tile`."""
    _, first, end = find_tile(CU_SEQLENS_Q, first_tile, batch_size, QUERIES)
    return tl.minimum(first, end)  # of a number without rows: where the next sequence begins


@triton.jit
def key_rows(CU_SEQLENS_Q, CU_SEQLENS_K, sequence):
    """(first, end, shift) of a sequence's keys among the packed ones: query row r sits on key row r + shift. int64."""
    first = tl.load(CU_SEQLENS_K + sequence).to(tl.int64)
    end = tl.load(CU_SEQLENS_K + sequence + 1).to(tl.int64)
    return first, end, end - tl.load(CU_SEQLENS_Q + sequence + 1)


@triton.jit
def anew(row, count):
    """`row`, as numbers that the compiler takes for others: `count` >= 0 is not known to it.

    For what is computed from rows before a loop and after it: kept in between, it would cost the loop registers.
    """
    return row + tl.minimum(count, 0)
