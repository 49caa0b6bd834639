"""Softmax attention in which each query sees one contiguous run of keys: the compressed and the window branch.

Tiles of queries walk over the span of keys they can see with a running softmax, one dense matmul at a time; nothing of
size [Tq, Tk] exists. Short sequences go in batches, a matmul each: no product ever has rows of two sequences, whose
weights of 0 would carry one's infinities to the other. The backward recomputes the probabilities from the LSE.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_varlen.arguments import KV, heads_and_dim
from nsa_varlen.autograd import first_derivative_only, outside_autocast
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.sdpa._tiles import Batch, Tile, Visible, plan

# On a CPU one head's logits, (query rows x heads of the group) x keys, are 1 MB of fp32: in cache. Elsewhere a step
# costs a handful of kernel launches: 256 MB of fp32 logits at a time.
CPU_TILE_ROWS = 512
CPU_TILE_KEYS = 512
DEVICE_TILE_LOGITS = 1 << 26
# Sequences with at most this many keys may share a batch. It saves the others' launches, copies the keys and computes
# the padding's and hidden logits too: on a CPU, where a launch costs little, not worth it beyond this many keys, nor
# beyond this many products of queries and keys, over all kv heads. (Two kv heads: up to 256 keys for a few queries
# each, 64 queries over 64 keys.)
CPU_SHORT_KEYS = 512
CPU_SHORT_PRODUCTS = 1 << 13
DEVICE_SHORT_KEYS = 1024


class Interval:
    """Which keys each packed query sees: one run each, with the pieces that cover them all.

    Args:
        layout: of the raw tokens.
        blocks: the keys are their compressed blocks, or the raw tokens for None.
        visible: keys [low, high) of its sequence that the query at a position sees.
        num_heads, group_size: of the queries, for the size of a tile.
    """

    def __init__(
        self, layout: VarlenLayout, blocks: BlockGeometry | None, visible: Visible, num_heads: int, group_size: int
    ) -> None:
        if layout.device.type == "cpu":
            num_kv_heads = num_heads // group_size
            short_keys, short_products = CPU_SHORT_KEYS // num_kv_heads, CPU_SHORT_PRODUCTS // num_kv_heads
            rows = max(1, CPU_TILE_ROWS // min(group_size, 8))
            self.tile_logits = CPU_TILE_ROWS * CPU_TILE_KEYS // group_size
        else:
            low, high = visible(layout.max_seqlen_k - 1)
            rows = min(1024, max(16, DEVICE_TILE_LOGITS // (num_heads * max(1, high - low))))
            self.tile_logits = short_products = DEVICE_TILE_LOGITS // num_heads
            short_keys = DEVICE_SHORT_KEYS
        self.pieces = plan(layout, blocks, visible, rows, short_keys, short_products, self.tile_logits)
        # First and end key of each packed query in its sequence, int64 [Tq] each: what `hide` compares with.
        hides = any(True for piece in self.pieces for _ in piece.ragged(piece.k0, piece.k1))
        self.bounds = visible(layout.positions()) if hides else None

    def hide(self, piece: Tile | Batch, k0: int, k1: int, logits: Tensor) -> None:
        """Write -inf over what a query may not see in logits [b*Hk, G*R, k1 - k0]."""
        for start, end in piece.ragged(k0, k1):
            assert self.bounds is not None  # the piece hides something
            low, high = (piece.queries(bound)[..., None] for bound in self.bounds)
            key = torch.arange(start, end, device=logits.device)
            hidden = (key < low) | (key >= high)  # [b, R, end - start]; padding sees [0, 0)
            by_sequence = logits.view(len(hidden), -1, piece.rows, k1 - k0)
            by_sequence[..., start - k0 : end - k0].masked_fill_(hidden[:, None], -torch.inf)


def interval_attention(q: Tensor, k: KV, v: KV, interval: Interval, scale: float) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, Dv], lse fp32 [Hq, Tq]) of q [Tq, Hq, Dk] over k, v [Tk, Hk, D]; differentiable for packed k, v."""
    return _IntervalAttention.apply(q, k, v, interval, scale)


def group_heads(x: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[b, R, Hq, D] -> [b*Hk, G*R, D]: the heads of a group above one another, over their kv head's keys."""
    grouped = x.to(dtype).unflatten(2, (num_kv_heads, -1))
    return grouped.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def ungroup_heads(x: Tensor, num_kv_heads: int, rows: int) -> Tensor:
    """Undo `group_heads`: [b*Hk, G*R, D] -> [b, R, Hq, D]."""
    return x.unflatten(0, (-1, num_kv_heads)).unflatten(2, (-1, rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is fp32 for half precision, otherwise the inputs' own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def head_major_keys(x: KV, piece: Tile | Batch, k0: int, k1: int, dtype: torch.dtype) -> Tensor:
    """Keys [k0, k1) of the piece's sequences: [b*Hk, k1 - k0, D]. A view for a packed tile."""
    return piece.keys(x, k0, k1).transpose(1, 2).flatten(0, 1).to(dtype)


def row_major_keys(x: Tensor, num_kv_heads: int) -> Tensor:
    """Undo `head_major_keys`: [b*Hk, n, D] -> [b, n, Hk, D]."""
    return x.unflatten(0, (-1, num_kv_heads)).transpose(1, 2)


def step_logits(q_rows: Tensor, k_rows: Tensor, interval: Interval, piece: Tile | Batch, k0: int) -> Tensor:
    """Logits of scaled queries [b*Hk, G*R, Dk] and keys [b*Hk, n, Dk] from key k0: -inf where one may not look."""
    logits = torch.bmm(q_rows, k_rows.mT)
    interval.hide(piece, k0, k0 + k_rows.shape[1], logits)
    return logits


Running = tuple[Tensor, Tensor, Tensor]  # maximum, sum of exponentials, unnormalised output


def _add_step(running: Running | None, logits: Tensor, v_rows: Tensor) -> Running:
    """Running softmax: take logits [b*Hk, G*R, n] and values [b*Hk, n, Dv] in; overwrites its arguments."""
    top = logits.amax(-1, keepdim=True)
    if running is not None:
        top = torch.maximum(top, running[0])
    shift = top.masked_fill(top == -torch.inf, 0.0)
    weights = logits.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    if running is None:
        return top, total, torch.bmm(weights, v_rows)
    old_top, old_total, acc = running
    shrink = old_top.sub_(shift).exp_()
    return top, total.addcmul_(old_total, shrink), acc.mul_(shrink).baddbmm_(weights, v_rows)


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    @outside_autocast
    def forward(ctx: Any, q: Tensor, k: KV, v: KV, interval: Interval, scale: float) -> tuple[Tensor, Tensor]:
        num_kv_heads, v_head_dim = heads_and_dim(v)
        dtype = compute_dtype(q.dtype)
        out = q.new_zeros(q.shape[0], q.shape[1], v_head_dim)
        lse = torch.full((*q.shape[:2], 1), -torch.inf, dtype=dtype, device=q.device)
        for piece in interval.pieces:
            q_rows = group_heads(piece.queries(q), num_kv_heads, dtype) * scale
            if isinstance(piece, Tile) and piece.rows == 1:  # a lone query sees all its tile's keys: nothing to hide
                k_rows, v_rows = (head_major_keys(x, piece, piece.k0, piece.k1, dtype) for x in (k, v))
                logits = torch.bmm(q_rows, k_rows.mT)
                weights = logits.softmax(-1)
                # The largest weight is exp(0) / sum, which gives the sum without a logsumexp over all the keys.
                lse[piece.q0] = (logits.amax(-1) - weights.amax(-1).log_()).reshape(-1, 1)
                out[piece.q0] = torch.bmm(weights, v_rows).flatten(0, 1)
                continue
            running: Running | None = None
            for k0, k1 in piece.steps(interval.tile_logits):
                logits = step_logits(q_rows, head_major_keys(k, piece, k0, k1, dtype), interval, piece, k0)
                running = _add_step(running, logits, head_major_keys(v, piece, k0, k1, dtype))
            assert running is not None  # a piece has keys
            top, total, acc = running
            # Every query sees a key, so that its sum is at least 1; that of padding is 0 and goes nowhere.
            piece.put_queries(ungroup_heads(acc.div_(total), num_kv_heads, piece.rows), out)
            piece.put_queries(ungroup_heads(total.log_().add_(top), num_kv_heads, piece.rows), lse)
        if isinstance(k, Tensor) and isinstance(v, Tensor):
            ctx.save_for_backward(q, k, v, out, lse)
        ctx.interval, ctx.scale = interval, scale
        lse = lse[..., 0].T.float().contiguous()
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    @outside_autocast
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        interval, scale = ctx.interval, ctx.scale
        num_kv_heads = k.shape[1]
        dtype = compute_dtype(q.dtype)
        delta = (grad_out.to(dtype) * out).sum(-1, keepdim=True)
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
        for piece in interval.pieces:
            q_rows, do_rows, delta_rows, lse_rows = (
                group_heads(piece.queries(x), num_kv_heads, dtype) for x in (q, grad_out, delta, lse)
            )
            q_rows = q_rows * scale
            dq_rows = torch.zeros_like(q_rows)
            for k0, k1 in piece.steps(interval.tile_logits):
                k_rows, v_rows = (head_major_keys(x, piece, k0, k1, dtype) for x in (k, v))
                weights = step_logits(q_rows, k_rows, interval, piece, k0).sub_(lse_rows).exp_()
                piece.add_keys(row_major_keys(torch.bmm(weights.mT, do_rows), num_kv_heads), k0, k1, dv)
                ds = torch.bmm(do_rows, v_rows.mT).sub_(delta_rows).mul_(weights)
                piece.add_keys(row_major_keys(torch.bmm(ds.mT, q_rows), num_kv_heads), k0, k1, dk)
                dq_rows.baddbmm_(ds, k_rows)
            piece.put_queries(ungroup_heads(dq_rows.mul_(scale), num_kv_heads, piece.rows), dq)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None
