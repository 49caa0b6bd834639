"""Is every packed row in exactly one tile, of its own sequence, and does each head fit its pieces?"""

from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from nsa_kernels_triton.kernels.pieces import load_piece, store_piece
from nsa_kernels_triton.kernels.tiles import find_tile, key_rows
from nsa_kernels_triton.tiles import SWIZZLED, count_tiles, pieces, pieces_alike, power_of_two
from nsa_varlen import VarlenLayout


@triton.jit
def tiles_kernel(CU_Q, CU_K, OUT, batch_size, SIZE: tl.constexpr):
    """OUT [tiles, 6]: sequence, first row and end of each tile; first row, end and shift of its keys."""
    tile = tl.program_id(0)
    sequence, first, end = find_tile(CU_Q, tile, batch_size, SIZE)
    key_first, key_end, shift = key_rows(CU_Q, CU_K, sequence)
    tl.store(OUT + tile * 6, sequence)
    tl.store(OUT + tile * 6 + 1, first)
    tl.store(OUT + tile * 6 + 2, end)
    tl.store(OUT + tile * 6 + 3, key_first)
    tl.store(OUT + tile * 6 + 4, key_end)
    tl.store(OUT + tile * 6 + 5, shift)


def found_tiles(layout: VarlenLayout, size: int) -> list[list[int]]:
    out = torch.full((count_tiles(layout.total_q, layout.batch_size, size), 6), -7, device=layout.device)
    if len(out):
        tiles_kernel[(len(out),)](layout.cu_seqlens_q, layout.cu_seqlens_k, out, layout.batch_size, SIZE=size)
    return out.tolist()


def assert_covered(layout: VarlenLayout, size: int) -> None:
    """Every row once, no tile across two sequences, idle tiles empty, keys those of the sequence."""
    begin_q, begin_k = (cu.tolist() for cu in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    owner = [b for b in range(layout.batch_size) for _ in range(begin_q[b], begin_q[b + 1])]
    covered = []
    for sequence, first, end, key_first, key_end, shift in found_tiles(layout, size):
        assert 0 <= sequence < layout.batch_size
        assert end == begin_q[sequence + 1]
        assert (key_first, key_end) == (begin_k[sequence], begin_k[sequence + 1])
        assert end + shift == key_end
        rows = range(first, min(first + size, end))
        assert all(owner[row] == sequence for row in rows)
        covered += rows
    assert covered == list(range(layout.total_q))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_row_is_in_one_tile(size: int, device: torch.device) -> None:
    """All batches of up to three sequences of up to four queries; keys of other lengths beside them."""
    for count in (1, 2, 3):
        for lengths in product(range(5 if count < 3 else 4), repeat=count):
            keys = [(3 * length + i) % 5 for i, length in enumerate(lengths)]
            assert_covered(VarlenLayout.from_lengths(lengths, keys, device=device), size)


@pytest.mark.parametrize("count", [127, 128, 129, 300])
def test_batches_larger_than_one_search_step(count: int, device: torch.device) -> None:
    lengths = [(7 * i) % 4 for i in range(count)]
    assert_covered(VarlenLayout.from_lengths(lengths, [2] * count, device=device), 2)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_tiles_of_real_sizes(size: int, device: torch.device) -> None:
    assert_covered(VarlenLayout.from_lengths([300, 0, 1, 128, 64, 0], [9, 0, 7, 128, 99, 5], device=device), size)


def test_counts_are_enough_and_not_many_more() -> None:
    for lengths in product(range(6), repeat=3):
        for size in (1, 2, 3, 4, 8):
            needed = sum(-(-length // size) for length in lengths)
            assert needed <= count_tiles(sum(lengths), len(lengths), size) <= needed + len(lengths)
    assert count_tiles(0, 0, 16) == 0


@pytest.mark.parametrize("dim", range(1, 257))
def test_a_head_fits_its_pieces(dim: int) -> None:
    first, second = pieces(dim)
    for width in (first, second):
        assert width == 0 or (width >= 16 and width & (width - 1) == 0)
    assert second < first
    assert first + second >= dim
    assert first + second <= power_of_two(max(16, dim))
    assert second == 0 or first < dim


def test_pieces_beside_each_other_lie_alike() -> None:
    some = [1, 15, 17, 31, 33, 63, 65, 127, 129, 255, *range(16, 257, 16)]
    for dims in product(some, some):
        both = pieces_alike(*dims)
        for widths, dim in zip(both, dims, strict=True):
            assert widths[0] + widths[1] >= dim
            assert widths[1] == 0 or widths[0] < dim  # no piece is padding alone
            assert dim < max(dims) or widths == pieces(dim)
        for k, v in zip(*both, strict=True):
            assert 0 in (k, v) or min(k, SWIZZLED) == min(v, SWIZZLED)
        assert both == pieces_alike(*dims[::-1])[::-1]


def test_powers_of_two() -> None:
    assert [power_of_two(count) for count in range(10)] == [1, 1, 2, 4, 4, 8, 8, 8, 8, 16]


@triton.jit
def copy_kernel(X, OUT, count, ROWS: tl.constexpr, DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """OUT [ROWS, K0 + K1] = the pieces of X [count, DIM] as loaded; then X *= 2 through the pieces."""
    row = tl.arange(0, ROWS)
    there = row < count
    everywhere = row < ROWS
    pointers = X + row * DIM
    x0 = load_piece(pointers, there, 0, K0, DIM)
    x1 = load_piece(pointers, there, K0, K1, DIM)
    store_piece(OUT + row * (K0 + K1), x0, everywhere, 0, K0, K0)
    store_piece(pointers, x0 * 2, there, 0, K0, DIM)
    if K1 > 0:
        store_piece(OUT + row * (K0 + K1) + K0, x1, everywhere, 0, K1, K1)
        store_piece(pointers, x1 * 2, there, K0, K1, DIM)


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 24, 64, 96, 100, 200, 256])
def test_pieces_hold_their_columns_and_zeros(dim: int, device: torch.device) -> None:
    widths = pieces(dim)
    memory = torch.arange(1.0, 9 * dim + 1, device=device)
    x, beyond = memory.split((5 * dim, 4 * dim))
    before, guard = x.clone().view(5, dim), beyond.clone()
    out = torch.full((8, sum(widths)), torch.nan, device=device)
    copy_kernel[(1,)](x, out, 5, ROWS=8, DIM=dim, K0=widths[0], K1=widths[1])
    expected = torch.zeros_like(out)
    expected[:5, :dim] = before
    assert torch.equal(out, expected)
    assert torch.equal(x.view(5, dim), 2 * before)
    assert torch.equal(beyond, guard)
