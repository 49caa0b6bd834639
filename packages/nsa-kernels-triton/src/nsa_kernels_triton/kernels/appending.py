"""The newest rows of one sequence and kv head on their way into pages, and the compressed blocks that they complete."""

import triton
import triton.language as tl


@triton.jit
def page_rows(TABLE, row, there, PAGE: tl.constexpr):
    """(numbers of rows among those of all pages, int64; which of them have a page) of rows of one sequence."""
    page = tl.load(TABLE + row // PAGE, mask=there, other=-1)
    return page.to(tl.int64) * PAGE + row % PAGE, there & (page >= 0)


@triton.jit
def append_rows(
    PAGES,
    TABLE,
    NEW,
    new_row,
    before,
    count,
    head,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the first `count` of N rows at NEW as rows `before` and following of a sequence. PAGE 0: of a ring.

    A ring's TABLE is its size.
    """
    row = tl.arange(0, triton.next_power_of_2(N))
    column = tl.arange(0, WIDTH)
    there = row < count
    inside = (column < DIM)[None, :]
    values = tl.load(NEW + (row * new_row)[:, None] + column[None, :], mask=there[:, None] & inside, other=0.0)
    if PAGE > 0:
        slot, there = page_rows(TABLE, before + row, there, PAGE)
    else:
        slot = ((before + row) % TABLE).to(tl.int64)
    pointers = PAGES + (slot * HEADS + head)[:, None] * DIM + column[None, :]
    tl.store(pointers, values, mask=there[:, None] & inside)


@triton.jit
def pooled(
    TAIL,
    WEIGHTS,
    NEW,
    new_row,
    tail_size,
    before,
    first,
    column,
    head,
    HEADS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Columns of the block whose first token is `first`: tokens from `before` on are at NEW, others in the ring TAIL.

    fp32, rounded once to the precision of the rows. WEIGHTS None: the mean.
    """
    row = tl.arange(0, triton.next_power_of_2(KERNEL_SIZE))
    token = first + row
    there = (row < KERNEL_SIZE)[:, None] & (column < DIM)[None, :]
    is_new = (token >= before)[:, None]
    old = TAIL + ((token % tail_size) * HEADS + head)[:, None] * DIM + column[None, :]
    new = NEW + ((token - before) * new_row)[:, None] + column[None, :]
    x = tl.load(old, mask=there & ~is_new, other=0.0).to(tl.float32)
    x += tl.load(new, mask=there & is_new, other=0.0).to(tl.float32)
    if WEIGHTS is None:
        total = tl.sum(x, 0) / KERNEL_SIZE
    else:
        weight = tl.load(WEIGHTS + head * KERNEL_SIZE + row, mask=row < KERNEL_SIZE, other=0.0).to(tl.float32)
        total = tl.sum(x * weight[:, None], 0)
    return total.to(TAIL.dtype.element_ty).to(tl.float32)


@triton.jit
def emit_pooled(
    PAGES,
    TABLE,
    TAIL,
    WEIGHTS,
    NEW,
    ROTATION,
    new_row,
    tail_size,
    rotated_blocks,
    before,
    number,
    head,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store block `number` of a sequence, rotated where there is a ROTATION fp32 [2, rotated_blocks, DIM / 2]."""
    column = tl.arange(0, WIDTH)
    first = number * KERNEL_STRIDE
    x = pooled(
        *(TAIL, WEIGHTS, NEW, new_row, tail_size, before, first, column, head, HEADS, KERNEL_SIZE, DIM),
    )
    if ROTATION is not None:
        HALF: tl.constexpr = DIM // 2
        if INTERLEAVED:
            partner = column ^ 1
            pair = column // 2
            is_first = column % 2 == 0
        else:
            is_first = column < HALF
            partner = tl.where(is_first, column + HALF, column - HALF)
            pair = tl.where(is_first, column, column - HALF)
        y = pooled(
            *(TAIL, WEIGHTS, NEW, new_row, tail_size, before, first, partner, head, HEADS, KERNEL_SIZE, DIM),
        )
        turn = ROTATION + number.to(tl.int64) * HALF + pair
        cos = tl.load(turn, mask=column < DIM, other=0.0)
        sin = tl.load(turn + rotated_blocks.to(tl.int64) * HALF, mask=column < DIM, other=0.0)
        x = x * cos + tl.where(is_first, -y, y) * sin
    page = tl.load(TABLE + number // PAGE)
    slot = page.to(tl.int64) * PAGE + number % PAGE
    tl.store(
        PAGES + (slot * HEADS + head) * DIM + column,
        x.to(PAGES.dtype.element_ty),
        mask=(column < DIM) & (page >= 0),
    )
