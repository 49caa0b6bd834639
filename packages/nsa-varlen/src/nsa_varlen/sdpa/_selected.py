"""Softmax attention over listed blocks, in two loop orders with one result.

`_by_block` takes one KV block at a time with all the queries that chose it: dense matmuls that read each key once, for
prefill on a CPU and for every backward. `_by_query` gathers each query's keys: a few queries over a long context
(decode), and a GPU's forward, where thousands of small launches would cost more than the gather.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_varlen.arguments import KV, heads_and_dim
from nsa_varlen.autograd import first_derivative_only, outside_autocast
from nsa_varlen.block_indices import distinct_blocks
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.kv_rows import all_rows, take_head_rows
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.sdpa._interval import compute_dtype
from nsa_varlen.transfer import to_device

GATHER_ELEMENTS = 1 << 25  # keys and values gathered at a time: 128 MB of fp32
CHOICES_AT_ONCE = 1024  # queries that meet a block in one matmul: more would leave a CPU core's cache
ROWS_PER_BLOCK = 8  # fewer queries than this for the average block do not repay a matmul each


def selected(
    q: Tensor, k: KV, v: KV, block_indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, Dv], lse fp32 [Hq, Tq]); differentiable for packed k, v."""
    return _SelectedAttention.apply(q, k, v, block_indices, layout, blocks, scale)


class _SelectedAttention(torch.autograd.Function):
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
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        indices = _canonical(block_indices, layout, blocks)
        crowded = indices.numel() >= ROWS_PER_BLOCK * blocks.num_blocks(layout.total_k) * indices.shape[1]
        if crowded and q.device.type == "cpu":
            # Copying all pages once costs far less than gathering each query's keys from them.
            k_rows, v_rows = (all_rows(x, layout) for x in (k, v))
            out, lse = _by_block(q, k_rows, v_rows, indices, layout, blocks, scale)
        else:
            out, lse = _by_query(q, k, v, indices, layout, blocks, scale)
        if isinstance(k, Tensor) and isinstance(v, Tensor):
            ctx.save_for_backward(q, k, v, indices, out, lse)
        if any(ctx.needs_input_grad):  # derived now: the offsets may be another batch's when the backward comes
            layout.last_keys(), layout.block_offsets(blocks), layout.block_spans(blocks)
        ctx.layout, ctx.blocks, ctx.scale = layout, blocks, scale
        lse = lse.float()
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    @outside_autocast
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = _backward_by_block(grad_out, ctx.saved_tensors, ctx.layout, ctx.blocks, ctx.scale)
        return dq, dk, dv, None, None, None, None


def _canonical(block_indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """Ascending int64 indices with -1 for everything that adds no key: padding, duplicates, blocks after the query."""
    current = torch.div(layout.positions(), blocks.block_size, rounding_mode="floor")[:, None, None]
    indices = distinct_blocks(block_indices)
    return indices.masked_fill((indices < 0) | (indices > current), -1)


def _by_query(
    q: Tensor, k: KV, v: KV, indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry, scale: float
) -> tuple[Tensor, Tensor]:
    (num_kv_heads, k_dim), v_dim, dtype = heads_and_dim(k), heads_and_dim(v)[1], compute_dtype(q.dtype)
    out = q.new_zeros(*q.shape[:2], v_dim)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype, device=q.device)
    if layout.total_k == 0 or indices.shape[-1] == 0:
        return out, lse
    positions, sequence = layout.positions(), layout.sequence_of_queries()
    within = torch.arange(blocks.block_size, device=q.device)
    keys_per_query = num_kv_heads * indices.shape[-1] * blocks.block_size * (k_dim + v_dim)
    chunk = max(1, GATHER_ELEMENTS // max(1, keys_per_query))
    for start in range(0, q.shape[0], chunk):
        rows = slice(start, min(start + chunk, q.shape[0]))
        key = (indices[rows, :, :, None] * blocks.block_size + within).flatten(2)  # [R, Hk, N*l'], by sequence
        hidden = (key < 0) | (key > positions[rows, None, None])
        # Instead of a hidden key the first one that is seen: others may hold NaN, which no weight of 0 hides.
        beyond = torch.iinfo(key.dtype).max
        shown = key.masked_fill(hidden, beyond).amin(-1, keepdim=True)
        key = key.where(~hidden, shown.masked_fill_(shown == beyond, 0))
        k_rows, v_rows = take_head_rows(k, v, sequence[rows], key, layout.cu_seqlens_k)
        grouped = q[rows].to(dtype).unflatten(1, (num_kv_heads, -1)) * scale
        logits = torch.matmul(grouped, k_rows.to(dtype).mT).masked_fill_(hidden[:, :, None], -torch.inf)
        top = logits.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        # A query without keys was given a row that may belong to nobody; whatever it holds must not count.
        mean = torch.matmul(weights, v_rows.to(dtype)) / total
        out[rows] = mean.masked_fill_(total == 0, 0.0).flatten(1, 2)
        lse[:, rows] = (top + total.log()).flatten(1).T
    return out, lse


def _pairs_by_block(
    indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry
) -> tuple[Tensor, list[tuple[int, int, int, int, int]]]:
    """Every (query, kv head, block) choice, sorted by kv head, block and query.

    Returns:
        The choices' rows `query * Hk + head` (see `_rows_by_head`), int64, and for each block that someone chose
        (head, first packed key, end of its keys, first choice, end of its choices), on the host, cut to at most
        CHOICES_AT_ONCE. Its keys end where the last of these queries stands: what is behind may hold anything.
    """
    block_spans = layout.block_spans(blocks)
    total_blocks = len(block_spans)
    block = indices + layout.block_offsets(blocks)[layout.sequence_of_queries()][:, None, None]
    heads = torch.arange(indices.shape[1], device=indices.device)
    group = (heads[None, :, None] * total_blocks + block).masked_fill(indices < 0, indices.shape[1] * total_blocks)
    # In query order: a stable sort keeps each block's queries ascending.
    group, order = group.flatten().sort(stable=True)
    row = torch.div(order, indices.shape[-1], rounding_mode="floor")
    counts = torch.bincount(group, minlength=indices.shape[1] * total_blocks + 1)[:-1].tolist()
    spans = []
    first_choice = 0
    for head in range(indices.shape[1]):
        for number, (k0, k1) in enumerate(block_spans):
            end = first_choice + counts[head * total_blocks + number]
            for start in range(first_choice, end, CHOICES_AT_ONCE):
                spans.append((head, k0, k1, start, min(start + CHOICES_AT_ONCE, end)))
            first_choice = end
    last = to_device(torch.tensor([end - 1 for *_, end in spans], dtype=torch.int64, device="cpu"), row.device)
    query = torch.div(row[last], indices.shape[1], rounding_mode="floor")
    last_keys = layout.last_keys()[query].tolist()
    return row, [
        (head, k0, min(k1, last_key + 1), start, end)
        for (head, k0, k1, start, end), last_key in zip(spans, last_keys, strict=True)
    ]


def _rows_by_head(x: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[T, Hk*G, D] -> [T*Hk, G, D], one row per (query, kv head): a view of contiguous x in `dtype`."""
    return x.to(dtype).contiguous().unflatten(1, (num_kv_heads, -1)).flatten(0, 1)


def _block_logits(q_rows: Tensor, k_block: Tensor, row: Tensor, k0: int, last_key: Tensor) -> Tensor:
    """Logits [m, G, keys] of the queries that chose a block, -inf after their own position.

    `last_key` is `VarlenLayout.last_keys` of each (query, kv head). A block's queries ascend and only those inside it
    can see part of it: they are the first ones, at most as many as the block has keys.
    """
    logits = torch.matmul(q_rows.flatten(0, 1), k_block.T).unflatten(0, q_rows.shape[:2])
    inside = min(k_block.shape[0], row.shape[0])
    key = torch.arange(k0, k0 + k_block.shape[0], device=row.device)
    logits[:inside].masked_fill_((key > last_key[row[:inside], None])[:, None], -torch.inf)
    return logits


def _by_block(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry, scale: float
) -> tuple[Tensor, Tensor]:
    num_kv_heads, dtype = k.shape[1], compute_dtype(q.dtype)
    q_rows = _rows_by_head(q, num_kv_heads, dtype)
    # Running softmax of every query: maximum, sum, unnormalised output.
    top = q_rows.new_full((*q_rows.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(top)
    out = q_rows.new_zeros(*q_rows.shape[:2], v.shape[-1])
    last_key = layout.last_keys()[:, None].expand(-1, num_kv_heads).flatten()
    rows, spans = _pairs_by_block(indices, layout, blocks)
    for head, k0, k1, start, end in spans:
        row = rows[start:end]
        logits = _block_logits(q_rows.index_select(0, row), k[k0:k1, head].to(dtype) * scale, row, k0, last_key)
        # Every query here sees at least one key: its own position or one before it. So the maximum is finite.
        old_top = top.index_select(0, row)
        new_top = torch.maximum(old_top, logits.amax(-1, keepdim=True))
        weights = logits.sub_(new_top).exp_()
        shrink = old_top.sub_(new_top).exp_()
        top.index_copy_(0, row, new_top)
        total.index_copy_(0, row, weights.sum(-1, keepdim=True).addcmul_(total.index_select(0, row), shrink))
        part = torch.matmul(weights.flatten(0, 1), v[k0:k1, head].to(dtype)).unflatten(0, weights.shape[:2])
        out.index_copy_(0, row, part.addcmul_(out.index_select(0, row), shrink))
    out /= total.masked_fill(total == 0, 1.0)
    lse = (top + total.log()).reshape(q.shape[:2])
    return out.reshape(*q.shape[:2], v.shape[-1]).to(q.dtype), lse.T.contiguous()


def _backward_by_block(
    grad_out: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    layout: VarlenLayout,
    blocks: BlockGeometry,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, indices, out, lse = saved
    num_kv_heads, dtype = k.shape[1], compute_dtype(q.dtype)
    q_rows = _rows_by_head(q, num_kv_heads, dtype)
    do_rows = _rows_by_head(grad_out, num_kv_heads, dtype)
    delta = (do_rows * _rows_by_head(out, num_kv_heads, dtype)).sum(-1, keepdim=True)
    lse_rows = _rows_by_head(lse.T[..., None], num_kv_heads, dtype)
    dq = torch.zeros_like(q_rows)
    dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
    last_key = layout.last_keys()[:, None].expand(-1, num_kv_heads).flatten()
    rows, spans = _pairs_by_block(indices, layout, blocks)
    for head, k0, k1, start, end in spans:
        row = rows[start:end]
        k_block, v_block = k[k0:k1, head].to(dtype) * scale, v[k0:k1, head].to(dtype)
        q_block, do_block = q_rows.index_select(0, row), do_rows.index_select(0, row).flatten(0, 1)
        logits = _block_logits(q_block, k_block, row, k0, last_key)
        weights = logits.sub_(lse_rows.index_select(0, row)).exp_().flatten(0, 1)
        dv[k0:k1, head] += weights.T @ do_block
        ds = torch.matmul(do_block, v_block.T).sub_(delta.index_select(0, row).flatten(0, 1)).mul_(weights)
        dk[k0:k1, head] += (ds.T @ q_block.flatten(0, 1)).mul_(scale)
        part = torch.matmul(ds, k_block).unflatten(0, q_block.shape[:2])
        dq.index_copy_(0, row, part.add_(dq.index_select(0, row)))
    return dq.reshape(q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
