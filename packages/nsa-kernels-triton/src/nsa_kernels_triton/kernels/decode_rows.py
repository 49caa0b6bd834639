"""A decode step's query rows, and where its programs leave what they found.

The scratch memory of a step, fp32, is one region for each sequence and kv head, and in it a row for each query row: a
pair of a token and a head of the group, all tokens' heads one after the other, padded to whole tiles.

```
maxima, sums of the compressed branch    [splits, rows]         base 2; of each split of the keys
outputs of the compressed branch         [splits, rows, DV]     not yet divided; or by the second kernel, to be added up
maxima, sums, outputs of the window      [splits, rows], [splits, rows, DV]
maxima, sums, outputs of selected blocks [splits, rows], [splits, rows, DV]
candidates                               3 x [N, count]         int32: keys of scores, block numbers, their pages
logits of the compressed branch          [rows, width]          scaled, base 2, -inf where a block is not visible
```
"""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.pieces import store_piece


@triton.jit
def row_of(tile, ROWS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, count):
    """(row, token, head of the group, whether it is a token's) of each query row in a tile."""
    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    return row, token, row % GROUP, (token < N) & (token < count)


@triton.jit
def query_rows(
    Q, sequence, head, token, member, N: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr
):  # fmt: skip
    """Pointers to the query rows of q [B, N, HEADS * GROUP, DK]."""
    return Q + (((sequence * N + token) * HEADS + head).to(tl.int64) * GROUP + member) * DK


@triton.jit
def store_some(M, L, PARTS, row, there, m, norm, acc0, acc1, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr):
    """Leave what one split of the keys gave those of its query rows that are `there`."""
    tl.store(M + row, m, mask=there)
    tl.store(L + row, norm, mask=there)
    rows = PARTS + row.to(tl.int64) * DV
    store_piece(rows, acc0, there, 0, V0, DV)
    if V1 > 0:
        store_piece(rows, acc1, there, V0, V1, DV)
