"""The selected branch: each query's blocks gathered side by side, and one packed call over many queries at a time.

Exact for any list of blocks, and bound by memory: every key is written and read once for each query that chose it. It
is what a deployment has without a kernel of its own for selection.
"""

from typing import Any

import torch
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.arguments import KV, heads_and_dim
from nsa_varlen.autograd import first_derivative_only, outside_autocast
from nsa_varlen.block_indices import distinct_blocks
from nsa_varlen.kv_rows import take_head_rows
from torch import Tensor

from nsa_fa2 import attention
from nsa_fa2.kernel import MAX_SEQUENCES, Kernel, Segments

NOTHING = torch.iinfo(torch.int64).max  # in place of a block that adds no key: sorts behind every block


def selected_attention(
    q: Tensor,
    k: KV,
    v: KV,
    block_indices: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    kernel: Kernel,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, Dv], lse fp32 [Hq, Tq] without gradient). Differentiable in q and in packed k and v.

    Queries go in chunks whose gathered keys and values, with their gradients, take at most `attention.WORKSPACE` bytes
    (or what one query takes). The gradients of k and v are scattered in no fixed order.
    """
    return _Selected.apply(q, k, v, block_indices, layout, blocks, kernel, scale)


class _Chunk:
    """Some queries with their keys: a packed call has one sequence for each (query, kv head), its G heads as queries.

    R queries, P = R * Hk pairs, S = N * l' places for the keys of a pair. The keys that a pair sees come first, for
    only the last of its blocks can be the one that the query stands in. The places left over are a sequence that nobody
    reads.

    ```
    l'=4, N=3, blocks 0, 2 and -1, t=9       keys 0 1 2 3 8 9 | . . . . . .
    ```
    """

    def __init__(self, rows: slice, block_indices: Tensor, num_heads: int, layout: VarlenLayout, blocks: BlockGeometry):
        position = layout.positions()[rows, None, None]
        current = torch.div(position, blocks.block_size, rounding_mode="floor")
        block = distinct_blocks(block_indices[rows])  # [R, Hk, N]
        block = block.masked_fill((block < 0) | (block > current), NOTHING).sort(-1).values
        seen = block != NOTHING
        unseen_of_current = blocks.block_size - 1 - position[..., 0] % blocks.block_size
        num_keys = seen.sum(-1) * blocks.block_size - (block == current).any(-1) * unseen_of_current  # [R, Hk]
        # Places that no key takes read some row of the sequence, not all the same one: its gradient gets zeros.
        block = torch.where(seen, block, torch.arange(block.shape[-1], device=block.device))
        key = (block[..., None] * blocks.block_size + torch.arange(blocks.block_size, device=block.device)).flatten(2)
        self.sequence = layout.sequence_of_queries()[rows]
        last = layout.cu_seqlens_k.diff().long()[self.sequence] - 1
        self.key = torch.minimum(key, last.clamp_min(0)[:, None, None])  # [R, Hk, S], relative to the sequence
        self.rows, self.num_keys = rows, num_keys
        self.segments = self._segments(num_heads // block.shape[1])

    def _segments(self, group: int) -> Segments:
        pairs, places = self.num_keys.numel(), self.key.shape[-1]
        pair = torch.arange(pairs, dtype=torch.int32, device=self.key.device)
        boundary = torch.arange(2 * pairs + 1, dtype=torch.int32, device=self.key.device)
        ends = torch.stack((pair * places, pair * places + self.num_keys.flatten().int()), -1).flatten()
        offsets_k = torch.nn.functional.pad(ends, (0, 1), value=pairs * places)
        return Segments((boundary + 1) // 2 * group, offsets_k, group, places)

    def gather(self, k: KV, v: KV, layout: VarlenLayout) -> tuple[Tensor, Tensor]:
        """k [P * S, 1, Dk] and v [P * S, 1, Dv]."""
        gathered = take_head_rows(k, v, self.sequence, self.key, layout.cu_seqlens_k)
        k_rows, v_rows = (x.flatten(0, 2)[:, None] for x in gathered)
        return k_rows, v_rows

    def scatter(self, grads: Tensor, out: Tensor, layout: VarlenLayout) -> None:
        """Add gradients of what `gather` gave, [P * S, 1, D], to out [Tk, Hk, D]."""
        row = (self.key + layout.cu_seqlens_k.long()[self.sequence, None, None]).clamp_max_(out.shape[0] - 1)
        heads = torch.arange(out.shape[1], device=out.device)[:, None]
        index = (row * out.shape[1] + heads).flatten()
        out.view(-1, out.shape[-1]).index_add_(0, index, grads[:, 0].to(out.dtype))

    def queries(self, x: Tensor) -> Tensor:
        """[T, Hq, D] -> [P * G, 1, D]."""
        return x[self.rows].flatten(0, 1)[:, None]


class _Selected(torch.autograd.Function):
    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        q: Tensor,
        k: KV,
        v: KV,
        block_indices: Tensor,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        kernel: Kernel,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        num_heads, num_kv_heads = q.shape[1], heads_and_dim(k)[0]
        out = q.new_empty(*q.shape[:2], heads_and_dim(v)[1])
        lse = torch.empty(num_heads, q.shape[0], dtype=torch.float32, device=q.device)
        raw, size = [], 0
        if layout.total_k == 0 or block_indices.shape[-1] == 0:
            out.zero_(), lse.fill_(-torch.inf)
        else:
            size = _queries_at_once(q, k, v, block_indices.shape[-1] * blocks.block_size, any(ctx.needs_input_grad))
        for rows in _slices(q.shape[0], size):
            chunk = _Chunk(rows, block_indices, num_heads, layout, blocks)
            k_rows, v_rows = chunk.gather(k, v, layout)
            part, part_lse = kernel.forward(
                chunk.queries(q), k_rows, v_rows, chunk.segments, scale=scale, causal=False, window=None
            )
            out[rows] = part.view(-1, num_heads, part.shape[-1])
            blind = (chunk.num_keys == 0)[..., None].expand(-1, -1, num_heads // num_kv_heads).flatten(1)
            lse.T[rows] = part_lse.view(-1, num_heads).float().masked_fill(blind, -torch.inf)
            raw.append(part_lse)
            del chunk, k_rows, v_rows, part  # before the next ones are made
        if isinstance(k, Tensor) and isinstance(v, Tensor):
            ctx.save_for_backward(q, k, v, block_indices, out, *raw)
        ctx.layout, ctx.blocks, ctx.kernel, ctx.scale, ctx.size = layout, blocks, kernel, scale, size
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    @outside_autocast
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, block_indices, out, *raw = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        for rows, lse in zip(_slices(q.shape[0], ctx.size), raw, strict=True):
            chunk = _Chunk(rows, block_indices, q.shape[1], ctx.layout, ctx.blocks)
            grads = ctx.kernel.backward(
                *(chunk.queries(grad_out), chunk.queries(q), *chunk.gather(k, v, ctx.layout), chunk.queries(out), lse),
                chunk.segments,
                scale=ctx.scale,
                causal=False,
                window=None,
                deterministic=False,
            )
            dq[rows] = grads[0].view(-1, *q.shape[1:])
            chunk.scatter(grads[1], dk, ctx.layout)
            chunk.scatter(grads[2], dv, ctx.layout)
            del chunk, grads  # before the next ones are made
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _slices(total: int, size: int) -> list[slice]:
    """Slices of `size` up to `total`; none for size 0."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)] if size else []


def _queries_at_once(q: Tensor, k: KV, v: KV, places: int, backward: bool) -> int:
    """Queries whose keys are gathered at a time, as WORKSPACE and a CUDA grid allow."""
    (num_kv_heads, k_dim), v_dim = heads_and_dim(k), heads_and_dim(v)[1]
    per_key = (k_dim + v_dim) * q.element_size() + 24  # and three int64: position, row, index
    if backward:
        per_key += (k_dim + v_dim) * q.element_size() + 4 * max(k_dim, v_dim)  # the gradients, one of them in fp32
    fitting = attention.WORKSPACE // (per_key * num_kv_heads * places)
    return max(1, min(fitting, MAX_SEQUENCES // (2 * num_kv_heads)))
