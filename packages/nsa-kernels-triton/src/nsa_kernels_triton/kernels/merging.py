"""Selected attention, block by block, last step: a query's parts are added, each weighed by its log-sum-exp."""

import triton
import triton.language as tl

from nsa_kernels_triton.kernels.inverting import FAR_SHIFT
from nsa_kernels_triton.kernels.pieces import load_piece, store_piece
from nsa_kernels_triton.kernels.softmax import empty, finish
from nsa_kernels_triton.kernels.tiles import chunk_start


@triton.jit(do_not_specialize=["batch_size", "total_q", "first_tile", "end_tile", "first_head", "head_parts"])
def merge_kernel(
    PARTS,
    PART_LSE,
    META,
    CU_SEQLENS_Q,
    OUT,
    LSE,
    batch_size,
    total_q,
    num_kv_heads,
    num_slots,
    first_tile,
    end_tile,
    first_head,
    head_parts,
    GROUP_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out, lse of a chunk's query rows: pairs of a query and a member of the group. Grid (row tiles, heads).

    Limited by bytes: the parts are read once.
    """
    base = chunk_start(CU_SEQLENS_Q, first_tile, batch_size, QUERIES)
    rows = (chunk_start(CU_SEQLENS_Q, end_tile, batch_size, QUERIES) - base).to(tl.int32) * GROUP_SIZE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    query = (row // GROUP_SIZE).to(tl.int64)
    member = row % GROUP_SIZE
    kv_head = tl.program_id(1).to(tl.int64) + first_head
    last = tl.load(META + query * num_kv_heads + kv_head, mask=there, other=-1) >> FAR_SHIFT
    part = tl.program_id(1).to(tl.int64) * head_parts + query * (num_slots + 1) * GROUP_SIZE + member
    m, norm, acc0, acc1 = empty(ROWS, V0, V1)
    for i in tl.range(0, tl.max(last, 0) + 1, num_stages=STAGES):
        has = i <= last
        part_lse = tl.load(PART_LSE + part + i * GROUP_SIZE, mask=has, other=float("-inf"))
        part_rows = PARTS + (part + i * GROUP_SIZE) * DV
        top = tl.maximum(m, part_lse)
        shifted = tl.where(top == float("-inf"), 0.0, top)
        decay = tl.exp2(m - shifted)
        weight = tl.exp2(part_lse - shifted)
        norm = norm * decay + weight
        acc0 = acc0 * decay[:, None] + load_piece(part_rows, has, 0, V0, DV).to(tl.float32) * weight[:, None]
        if V1 > 0:
            acc1 = acc1 * decay[:, None] + load_piece(part_rows, has, V0, V1, DV).to(tl.float32) * weight[:, None]
        m = top
    lse, inverse = finish(m, norm)
    heads = kv_head * GROUP_SIZE + member
    out_rows = OUT + ((base + query) * (num_kv_heads * GROUP_SIZE) + heads) * DV
    store_piece(out_rows, acc0 * inverse, there, 0, V0, DV)
    if V1 > 0:
        store_piece(out_rows, acc1 * inverse, there, V0, V1, DV)
    tl.store(LSE + heads * total_q + base + query, lse, mask=there)
