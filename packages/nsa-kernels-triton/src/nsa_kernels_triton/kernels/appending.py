"""The newest rows of one sequence and kv head on their way into pages, and the compressed blocks that they complete."""

import triton
import triton.language as tl


@triton.jit
def load_heads(NEW, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """One token's heads [HEADS, DIM], side by side at NEW."""
    head = tl.arange(0, triton.next_power_of_2(HEADS))
    column = tl.arange(0, WIDTH)
    inside = (head < HEADS)[:, None] & (column < DIM)[None, :]
    return tl.load(NEW + (head * DIM)[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def load_slot(TABLE, room, position, PAGE: tl.constexpr):
    """Number, among the rows of all pages, of a sequence's row, int64; negative where there is no page.

    TABLE has room for so many pages.
    """
    page = tl.load(TABLE + position // PAGE, mask=position // PAGE < room, other=-1)
    return page.to(tl.int64) * PAGE + tl.where(page >= 0, position % PAGE, 0)


@triton.jit
def store_heads(PAGES, slot, values, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store one token's heads as row `slot` of PAGES [rows, HEADS, DIM]; a negative one nowhere."""
    head = tl.arange(0, triton.next_power_of_2(HEADS))
    column = tl.arange(0, WIDTH)
    inside = (head < tl.where(slot >= 0, HEADS, 0))[:, None] & (column < DIM)[None, :]
    tl.store(PAGES + slot * (HEADS * DIM) + (head * DIM)[:, None] + column[None, :], values, mask=inside)


@triton.jit
def store_block(
    PAGES, TABLE, room, number, head, column, values, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Store columns of a compressed block of one head, if it has a page."""
    slot = load_slot(TABLE, room, number, PAGE)
    pointers = PAGES + (slot * HEADS + head) * DIM + column
    tl.store(pointers, values.to(PAGES.dtype.element_ty), mask=column < tl.where(slot >= 0, DIM, 0))


@triton.jit
def emit_completed(
    PAGES, TABLE, room, NEW, number, head, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Store block `number` of a sequence, which somebody else made."""
    column = tl.arange(0, WIDTH)
    x = tl.load(NEW + column, mask=column < DIM, other=0.0)
    store_block(PAGES, TABLE, room, number, head, column, x, HEADS, PAGE, DIM)


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
    room,
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
        turn = ROTATION + tl.cast(number, tl.int64) * HALF + pair
        cos = tl.load(turn, mask=column < DIM, other=0.0)
        sin = tl.load(turn + tl.cast(rotated_blocks, tl.int64) * HALF, mask=column < DIM, other=0.0)
        x = x * cos + tl.where(is_first, -y, y) * sin
    store_block(PAGES, TABLE, room, number, head, column, x, HEADS, PAGE, DIM)
