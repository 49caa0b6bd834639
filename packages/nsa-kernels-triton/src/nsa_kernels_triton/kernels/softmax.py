"""A softmax that streams over keys: maximum, sum and weighted values of each row, in base 2."""

import triton
import triton.language as tl


@triton.jit
def empty(ROWS: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr):
    """(m, l, acc0, acc1) of rows that have seen no key; acc1 is None for a V1 of 0."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    if V1 > 0:
        return m, l, acc0, tl.zeros([ROWS, V1], tl.float32)
    else:
        return m, l, acc0, None


@triton.jit
def update(s, scale, m, l, acc0, acc1, v0, v1):
    """State after the keys of one tile. `s` [rows, keys] is not yet scaled, -inf where a key is hidden.

    `scale` > 0 contains log2(e). The scaling is left to the subtraction of the maximum, where it costs nothing.
    """
    top = tl.maximum(m, tl.max(s, 1) * scale)
    shift = tl.where(top == float("-inf"), 0.0, top)  # of rows that have seen nothing: -inf - -inf is NaN
    p = tl.exp2(s * scale - shift[:, None])
    decay = tl.exp2(m - shift)
    l = l * decay + tl.sum(p, 1)
    acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * decay[:, None], input_precision="ieee")
    if acc1 is not None:
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * decay[:, None], input_precision="ieee")
    return top, l, acc0, acc1


@triton.jit
def finish(m, l, acc0, acc1):
    """(lse, out0, out1): the natural logarithm of the sum of exponentials, and the mean values; -inf and 0 of nothing."""
    seen = l > 0
    inverse = 1.0 / tl.where(seen, l, 1.0)
    lse = tl.where(seen, (m + tl.log2(tl.where(seen, l, 1.0))) * 0.6931471805599453, float("-inf"))
    if acc1 is not None:
        return lse, acc0 * inverse[:, None], acc1 * inverse[:, None]
    else:
        return lse, acc0 * inverse[:, None], None
