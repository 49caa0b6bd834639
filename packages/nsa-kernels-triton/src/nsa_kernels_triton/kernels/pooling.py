"""Mean pooling of tokens into compressed blocks."""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.tiles import find_tile


@triton.jit(do_not_specialize=["batch_size"])
def compress_mean_kernel(
    X,
    OUT,
    CU_SEQLENS,
    CU_COMPRESSED,
    batch_size,
    x_row,
    x_head,
    num_heads,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """OUT[i] = mean of X[i*d : i*d + l] of one sequence, ROWS compressed blocks of one head. Grid (tiles, H).

    Limited by bytes: x is read once from memory and l/d times from cache.
    """
    sequence, first, end = find_tile(CU_COMPRESSED, tl.program_id(0), batch_size, ROWS)
    if first < end:
        head = tl.program_id(1).to(tl.int64)
        row = tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        there = (first + row < end)[:, None] & (column < DIM)[None, :]
        number = first - tl.load(CU_COMPRESSED + sequence)
        token = tl.load(CU_SEQLENS + sequence) + number * KERNEL_STRIDE
        pointers = X + token * x_row + head * x_head + (row * KERNEL_STRIDE)[:, None] * x_row + column[None, :]
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for _ in range(KERNEL_SIZE):
            total += tl.load(pointers, mask=there, other=0.0).to(tl.float32)
            pointers += x_row
        out = OUT + (first * num_heads + head) * DIM
        mean = (total / KERNEL_SIZE).to(OUT.dtype.element_ty)
        tl.store(out + row[:, None] * (num_heads * DIM) + column[None, :], mean, mask=there)


@triton.jit(do_not_specialize=["batch_size"])
def compress_mean_backward_kernel(
    GRAD_OUT,
    DX,
    CU_SEQLENS,
    CU_COMPRESSED,
    batch_size,
    grad_row,
    grad_head,
    num_heads,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """DX[t] = sum of GRAD_OUT over the l/d blocks that hold token t, over l: ROWS tokens of one head. Grid (tiles, H).

    Limited by bytes: DX is written once, GRAD_OUT read once from memory and l times from cache.
    """
    sequence, first, end = find_tile(CU_SEQLENS, tl.program_id(0), batch_size, ROWS)
    if first < end:
        head = tl.program_id(1).to(tl.int64)
        row = tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        there = (first + row < end)[:, None] & (column < DIM)[None, :]
        begin = tl.load(CU_COMPRESSED + sequence).to(tl.int64)
        blocks = (tl.load(CU_COMPRESSED + sequence + 1) - begin).to(tl.int32)
        token = (first - tl.load(CU_SEQLENS + sequence)).to(tl.int32) + row
        grads = GRAD_OUT + begin * grad_row + head * grad_head
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for earlier in range(KERNEL_SIZE // KERNEL_STRIDE):
            block = token // KERNEL_STRIDE - earlier
            holds = ((block >= 0) & (block < blocks))[:, None] & there
            values = tl.load(grads + block.to(tl.int64)[:, None] * grad_row + column[None, :], mask=holds, other=0.0)
            total += values.to(tl.float32)
        dx = DX + (first * num_heads + head) * DIM
        mean = (total / KERNEL_SIZE).to(DX.dtype.element_ty)
        tl.store(dx + row[:, None] * (num_heads * DIM) + column[None, :], mean, mask=there)
