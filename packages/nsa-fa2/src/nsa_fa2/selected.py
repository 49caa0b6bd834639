"""The selected branch: each query's blocks gathered side by side, and one packed call over many queries at a time.

Exact for any list of blocks, and bound by memory: every key is written and read once for each query that chose it. It
is what a deployment has without a kernel of its own for selection.
"""

from typing import Any

import torch
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.arguments import KV, heads_and_dim
from nsa_varlen.autograd import first_derivative_only, outside_autocast
from torch import Tensor

from nsa_fa2 import attention
from nsa_fa2.gathering import ByBlock, Chunk, gatherer
from nsa_fa2.kernel import MAX_SEQUENCES, Kernel


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
    (or what one query takes). Beside them there is a copy of k and v, in the backward also an fp32 one of their
    gradients, which are added up in no fixed order.
    """
    return _Selected.apply(q, k, v, block_indices, layout, blocks, kernel, scale)


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
        out = q.new_zeros(*q.shape[:2], heads_and_dim(v)[1])
        lse = torch.full((num_heads, q.shape[0]), -torch.inf, dtype=torch.float32, device=q.device)
        raw = []
        keys = gatherer(k, v, block_indices, layout, blocks)
        places = block_indices.shape[-1] * blocks.block_size if layout.total_k else 0
        slices = _slices(q, k, v, places, backward=any(ctx.needs_input_grad))
        for rows in slices:
            chunk = Chunk(rows, block_indices, num_heads, layout, blocks)
            k_rows, v_rows = keys.gather(chunk)
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
        if any(ctx.needs_input_grad):
            ByBlock.derive(layout, blocks)  # now: the offsets may be another batch's when the backward comes
        ctx.layout, ctx.blocks, ctx.kernel, ctx.scale, ctx.slices = layout, blocks, kernel, scale, slices
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    @outside_autocast
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, block_indices, out, *raw = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        dq = torch.zeros_like(q)
        keys = ByBlock(k, v, ctx.layout, ctx.blocks)
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (keys.k, keys.v))
        for rows, lse in zip(ctx.slices, raw, strict=True):
            chunk = Chunk(rows, block_indices, q.shape[1], ctx.layout, ctx.blocks)
            grads = ctx.kernel.backward(
                *(chunk.queries(grad_out), chunk.queries(q), *keys.gather(chunk), chunk.queries(out), lse),
                chunk.segments,
                scale=ctx.scale,
                causal=False,
                window=None,
                deterministic=False,
            )
            dq[rows] = grads[0].view(-1, *q.shape[1:])
            keys.scatter(chunk, grads[1], dk)
            keys.scatter(chunk, grads[2], dv)
            del chunk, grads  # before the next ones are made
        return dq, keys.packed(dk, k), keys.packed(dv, v), None, None, None, None, None


def _slices(q: Tensor, k: KV, v: KV, places: int, *, backward: bool) -> list[slice]:
    """The queries, as many at a time as WORKSPACE and a CUDA grid allow; none if no places are to be filled."""
    if places == 0:
        return []
    (num_kv_heads, k_dim), v_dim = heads_and_dim(k), heads_and_dim(v)[1]
    per_key = (k_dim + v_dim) * q.element_size()
    if backward:
        per_key += (k_dim + v_dim) * q.element_size() + 4 * max(k_dim, v_dim)  # the gradients, one of them in fp32
    else:
        per_key += 24  # where each key on its own is gathered: its position, row and number among all heads' rows
    fitting = attention.WORKSPACE // (per_key * num_kv_heads * places)
    size = max(1, min(fitting, MAX_SEQUENCES // (2 * num_kv_heads)))
    return [slice(start, min(start + size, q.shape[0])) for start in range(0, q.shape[0], size)]
