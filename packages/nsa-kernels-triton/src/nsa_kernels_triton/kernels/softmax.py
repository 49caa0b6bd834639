"""A softmax that streams over keys: maximum, sum and weighted values of each row, in base 2.

The values are summed in one or two pieces. Of an absent second piece, `acc1` is a placeholder and `v1` is None: Triton
3.6 has no None among several results.
"""

import triton
import triton.language as tl


@triton.jit
def empty(ROWS: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr):
    """(m, norm, acc0, acc1) of rows that have seen no key."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    acc1 = tl.zeros([ROWS, V1] if V1 > 0 else [1], tl.float32)
    return m, norm, acc0, acc1


@triton.jit
def update(s, scale, m, norm, acc0, acc1, v0, v1):
    """State after the keys of one tile. `s` [rows, keys] is not yet scaled, -inf where a key is hidden.

    `scale` > 0 contains log2(e). The scaling is left to the subtraction of the maximum, where it costs nothing.
    """
    top = tl.maximum(m, tl.max(s, 1) * scale)
    shift = tl.where(top == float("-inf"), 0.0, top)  # of rows that have seen nothing: -inf - -inf is NaN
    p = tl.exp2(s * scale - shift[:, None])
    decay = tl.exp2(m - shift)
    norm = norm * decay + tl.sum(p, 1)
    acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * decay[:, None], input_precision="ieee")
    if v1 is not None:
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * decay[:, None], input_precision="ieee")
    return top, norm, acc0, acc1


@triton.jit
def mean(m, norm):
    """(lse, inverse): the logarithm, base 2, of the sum of exponentials, -inf of nothing; what makes acc a mean."""
    seen = norm > 0
    total = tl.where(seen, norm, 1.0)
    return tl.where(seen, m + tl.log2(total), float("-inf")), (1.0 / total)[:, None]


@triton.jit
def finish(m, norm):
    """`mean` with the natural logarithm."""
    lse, inverse = mean(m, norm)
    return lse * 0.6931471805599453, inverse
