"""Softmax attention in which each query sees one contiguous run of keys: the compressed and the window branch.

Tiles of queries walk over the span of keys they can see with a running softmax, one dense matmul at a time; nothing of
size [Tq, Tk] exists. The backward recomputes the probabilities from the LSE.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_varlen.arguments import KV, heads_and_dim
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.sdpa._autograd import first_derivative_only, outside_autocast
from nsa_varlen.sdpa._rows import slice_rows
from nsa_varlen.sdpa._tiles import Tile, Visible, plan_tiles

# On a CPU one head's logits, (query rows x heads of the group) x keys, are 1 MB of fp32: in cache. Elsewhere a step
# costs a handful of kernel launches: 256 MB of fp32 logits at a time.
CPU_TILE_ROWS = 512
CPU_TILE_KEYS = 512
DEVICE_TILE_LOGITS = 1 << 26


class Interval:
    """Which packed keys each packed query sees: one run each, with the tiles that cover them all.

    Args:
        layout: of the raw tokens.
        cu_seqlens_k: offsets of the keys that the queries see, on the host and on the layout's device.
        first_seeing, visible: see `plan_tiles`.
        num_heads, group_size: of the queries, for the size of a tile.
    """

    def __init__(
        self,
        layout: VarlenLayout,
        cu_seqlens_k: tuple[Tensor, Tensor],
        rows: tuple[Tensor, Tensor],
        first_seeing: int,
        visible: Visible,
        num_heads: int,
        group_size: int,
    ) -> None:
        host_offsets, offsets = cu_seqlens_k
        self.sequence, self.position = rows
        low, high = visible(max(first_seeing, layout.max_seqlen_k - 1))
        if layout.device.type == "cpu":
            tile_rows = max(1, CPU_TILE_ROWS // min(group_size, 8))
            self.tile_logits = CPU_TILE_ROWS * CPU_TILE_KEYS // group_size
        else:
            tile_rows = min(1024, max(16, DEVICE_TILE_LOGITS // (num_heads * (high - low))))
            self.tile_logits = DEVICE_TILE_LOGITS // num_heads
        self.tiles = plan_tiles(layout, host_offsets.tolist()[:-1], first_seeing, visible, tile_rows)
        # First and end packed key of each query, int64 [Tq, 1] each: what `hide` needs where a tile's edge is ragged.
        self.bounds: tuple[Tensor, Tensor] | None = None
        if any((tile.k0, tile.k1) != (tile.all0, tile.all1) for tile in self.tiles):
            lows, highs = visible(layout.positions())
            first = offsets.long()[layout.sequence_of_queries()]
            self.bounds = (first + lows)[:, None], (first + highs)[:, None]

    def steps(self, tile: Tile) -> Iterator[tuple[int, int]]:
        """Key ranges that cover the tile's span, each small enough for one matmul."""
        keys = max(1, self.tile_logits // (tile.q1 - tile.q0))
        for k0 in range(tile.k0, tile.k1, keys):
            yield k0, min(k0 + keys, tile.k1)

    def hide(self, tile: Tile, k0: int, k1: int, logits: Tensor) -> None:
        """Write -inf over what a query may not see in logits [..., q1 - q0, k1 - k0]; touches the ragged edges only."""
        all0, all1 = (tile.all0, tile.all1) if tile.all0 < tile.all1 else (tile.k1, tile.k1)
        for start, end in ((k0, min(k1, all0)), (max(k0, all1), k1)):
            if start < end:
                assert self.bounds is not None  # the tile's edge is ragged
                low, high = (bound[tile.q0 : tile.q1] for bound in self.bounds)
                column = torch.arange(start, end, device=logits.device)
                hidden = (column < low) | (column >= high)
                logits[..., start - k0 : end - k0].masked_fill_(hidden, -torch.inf)


def interval_attention(q: Tensor, k: KV, v: KV, interval: Interval, scale: float) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, Dv], lse fp32 [Hq, Tq]) of q [Tq, Hq, Dk] over k, v [Tk, Hk, D]; differentiable for packed k, v."""
    return _IntervalAttention.apply(q, k, v, interval, scale)


def group_heads(x: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[R, Hq, D] -> [Hk, G*R, D] with the group's heads outermost, so that masks [R, keys] broadcast over them."""
    rows, num_heads, dim = x.shape
    grouped = x.to(dtype).reshape(rows, num_kv_heads, num_heads // num_kv_heads, dim)
    return grouped.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, dim)


def ungroup_heads(x: Tensor, rows: int) -> Tensor:
    """Undo `group_heads`: [Hk, G*R, D] -> [R, Hq, D]."""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is fp32 for half precision, otherwise the inputs' own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def head_major_rows(x: KV, k0: int, k1: int, interval: Interval, dtype: torch.dtype) -> Tensor:
    """Packed rows [k0, k1) as [Hk, k1 - k0, D]."""
    return slice_rows(x, k0, k1, interval.sequence, interval.position).transpose(0, 1).to(dtype)


def step_logits(q_tile: Tensor, k_rows: Tensor, interval: Interval, tile: Tile, k0: int) -> Tensor:
    """Logits of scaled queries [Hk, G*R, Dk] and keys [Hk, n, Dk] from row k0: -inf where a query may not look."""
    logits = torch.bmm(q_tile, k_rows.mT)
    interval.hide(tile, k0, k0 + k_rows.shape[1], logits.unflatten(1, (-1, tile.q1 - tile.q0)))
    return logits


Running = tuple[Tensor, Tensor, Tensor]  # maximum, sum of exponentials, unnormalised output


def _add_step(running: Running | None, logits: Tensor, v_rows: Tensor) -> Running:
    """Running softmax: take logits [Hk, G*R, n] and values [Hk, n, Dv] in; overwrites its arguments."""
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
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype, device=q.device)
        for tile in interval.tiles:
            rows = slice(tile.q0, tile.q1)
            if tile.q1 - tile.q0 == 1:  # decode: a lone query sees all its tile's keys, so there is nothing to hide
                k_rows, v_rows = (head_major_rows(x, tile.k0, tile.k1, interval, dtype) for x in (k, v))
                logits = torch.bmm(q[rows].to(dtype).reshape(num_kv_heads, -1, q.shape[-1]) * scale, k_rows.mT)
                weights = logits.softmax(-1)
                # The largest weight is exp(0) / sum, which gives the sum without a logsumexp over all the keys.
                lse[:, rows] = (logits.amax(-1) - weights.amax(-1).log_()).reshape(-1, 1)
                out[rows] = torch.bmm(weights, v_rows).reshape(1, q.shape[1], v_head_dim)
                continue
            q_tile = group_heads(q[rows], num_kv_heads, dtype) * scale
            running: Running | None = None
            for k0, k1 in interval.steps(tile):
                logits = step_logits(q_tile, head_major_rows(k, k0, k1, interval, dtype), interval, tile, k0)
                running = _add_step(running, logits, head_major_rows(v, k0, k1, interval, dtype))
            assert running is not None  # a tile has keys, and every query of it sees one: its sum is at least 1
            top, total, acc = running
            out[rows] = ungroup_heads(acc.div_(total), tile.q1 - tile.q0)
            lse[:, rows] = total.log_().add_(top).reshape(q.shape[1], -1)
        if isinstance(k, Tensor) and isinstance(v, Tensor):
            ctx.save_for_backward(q, k, v, out, lse)
        ctx.interval, ctx.scale = interval, scale
        lse = lse.float()
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
        for tile in interval.tiles:
            rows = slice(tile.q0, tile.q1)
            q_tile = group_heads(q[rows], num_kv_heads, dtype) * scale
            do_tile = group_heads(grad_out[rows], num_kv_heads, dtype)
            delta_tile = group_heads(delta[rows], num_kv_heads, dtype)
            lse_tile = lse[:, rows].reshape(num_kv_heads, -1, 1)
            dq_tile = torch.zeros_like(q_tile)
            for k0, k1 in interval.steps(tile):
                k_rows, v_rows = (head_major_rows(x, k0, k1, interval, dtype) for x in (k, v))
                weights = step_logits(q_tile, k_rows, interval, tile, k0).sub_(lse_tile).exp_()
                dv[k0:k1] += torch.bmm(weights.mT, do_tile).transpose(0, 1)
                ds = torch.bmm(do_tile, v_rows.mT).sub_(delta_tile).mul_(weights)
                dk[k0:k1] += torch.bmm(ds.mT, q_tile).transpose(0, 1)
                dq_tile.baddbmm_(ds, k_rows)
            dq[rows] = ungroup_heads(dq_tile.mul_(scale), tile.q1 - tile.q0)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None
