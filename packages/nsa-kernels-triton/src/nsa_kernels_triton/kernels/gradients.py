"""What the backward of every attention has in common: the gradient of a softmax, taken anew from its log-sum-exp.

```
p = exp(scale q.k - lse)      dv = sum p do             over a key's rows
ds = p (do.v - delta)         dk = scale sum ds q       delta = do.out
                              dq = scale sum ds k       over a row's keys
```
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import load_piece

LOG2_E = tl.constexpr(1.4426950408889634)


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


