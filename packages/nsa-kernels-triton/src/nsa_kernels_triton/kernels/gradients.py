"""What the backward of every attention has in common: the gradient of a softmax, taken anew from its log-sum-exp.

```
p = exp(scale q.k - lse)      dv = sum p do             over a key's rows
ds = p (do.v - delta)         dk = scale sum ds q       delta = do.out
                              dq = scale sum ds k       over a row's keys
```
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import load_piece, logits

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["total_q"])
def delta_kernel(
    OUT,
    GRAD_OUT,
    LSE,
    DELTA,
    LSE_2,
    total_q,
    num_heads,
    grad_row,
    grad_head,
    DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ROWS: tl.constexpr,
):
    """DELTA, LSE_2 [Tq, Hq] from OUT, GRAD_OUT [Tq, Hq, DIM] and LSE [Hq, Tq]: ROWS of Tq * Hq rows a program.

    delta = do.out; LSE_2 is the log-sum-exp to base 2, and inf where nothing was seen: exponentials less that are 0.
    A row's heads lie side by side, as tiles of rows read them. Limited by bytes.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    there = row < total_q.to(tl.int64) * num_heads
    query = row // num_heads
    head = row % num_heads
    outs = OUT + row * DIM
    grads = GRAD_OUT + query * grad_row + head * grad_head
    product = load_piece(outs, there, 0, V0, DIM).to(tl.float32) * load_piece(grads, there, 0, V0, DIM).to(tl.float32)
    delta = tl.sum(product, 1)
    if V1 > 0:
        o1 = load_piece(outs, there, V0, V1, DIM).to(tl.float32)
        delta += tl.sum(o1 * load_piece(grads, there, V0, V1, DIM).to(tl.float32), 1)
    lse = tl.load(LSE + head * total_q + query, mask=there, other=0.0)
    tl.store(DELTA + row, delta, mask=there)
    tl.store(LSE_2 + row, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), mask=there)


@triton.jit
def slopes(p, dp, delta, do0, q0):
    """(p, ds = p (dp - delta)) of a tile [rows, keys], rounded to what do and q are, to be multiplied with them."""
    return p.to(do0.dtype), (p * (dp - delta[:, None])).to(q0.dtype)


@triton.jit
def add_tile(p, ds, q0, q1, do0, do1, dk0, dk1, dv0, dv1):
    """(dk0, dk1, dv0, dv1) after a tile.

    They are summed transposed, [dim, keys], not yet scaled: q and do are then operands that tensor cores read from
    shared memory as they lie, p and ds the other ones, and what belongs to a row takes a register of it, not one of
    each column. Of an absent second piece the sums are placeholders.
    """
    dv0 = tl.dot(tl.trans(do0), p, dv0, input_precision="ieee")
    dk0 = tl.dot(tl.trans(q0), ds, dk0, input_precision="ieee")
    if do1 is not None:
        dv1 = tl.dot(tl.trans(do1), p, dv1, input_precision="ieee")
    if q1 is not None:
        dk1 = tl.dot(tl.trans(q1), ds, dk1, input_precision="ieee")
    return dk0, dk1, dv0, dv1


@triton.jit
def no_sums(KEYS: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr):
    """(dk0, dk1, dv0, dv1) before the first tile."""
    dk0 = tl.zeros([K0, KEYS], tl.float32)
    dk1 = tl.zeros([K1, KEYS] if K1 > 0 else [1], tl.float32)
    dv0 = tl.zeros([V0, KEYS], tl.float32)
    dv1 = tl.zeros([V1, KEYS] if V1 > 0 else [1], tl.float32)
    return dk0, dk1, dv0, dv1
