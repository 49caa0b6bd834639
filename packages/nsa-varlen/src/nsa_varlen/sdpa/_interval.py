"""Softmax attention in which each query sees one contiguous run of keys: the compressed and the window branch.

Tiles of queries meet the span of keys they can see, one dense matmul each; nothing of size [Tq, Tk] exists. The
backward recomputes the probabilities from the LSE.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nsa_varlen.arguments import KV, heads_and_dim
from nsa_varlen.sdpa._autocast import outside_autocast
from nsa_varlen.sdpa._rows import slice_rows
from nsa_varlen.sdpa._tiles import Tile, plan_tiles

# Queries of a tile on a CPU, where its logits should stay in cache, and the most logits of one elsewhere (256 MB of
# fp32), where a tile is a handful of kernel launches.
CPU_TILE_ROWS = 64
DEVICE_TILE_LOGITS = 1 << 26


class Interval:
    """Which packed keys each packed query sees: [low, high), with the tiles that cover them.

    Args:
        low, high: int64 [Tq] on the host.
        cu_seqlens_q: offsets of the queries, on the host.
        cu_seqlens_k: offsets of the keys, on the device.
        num_heads: query heads, for the size of a tile.
    """

    def __init__(
        self, low: Tensor, high: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_heads: int
    ) -> None:
        rows = CPU_TILE_ROWS
        if cu_seqlens_k.device.type != "cpu":
            span = max(1, int((high - low).max())) if len(low) else 1
            rows = min(1024, max(CPU_TILE_ROWS, DEVICE_TILE_LOGITS // (num_heads * span)))
        self.low, self.high = low.to(cu_seqlens_k.device), high.to(cu_seqlens_k.device)
        self.host_low, self.host_high = low, high
        self.cu_seqlens_k = cu_seqlens_k
        self.tiles = plan_tiles(low, high, cu_seqlens_q, rows)

    def hide(self, tile: Tile, logits: Tensor, value: float) -> None:
        """Overwrite what a query may not see in logits [..., q1 - q0, k1 - k0]; only the tile's ragged edges are touched."""
        rows = slice(tile.q0, tile.q1)
        left = int(self.host_low[rows].max()) - tile.k0
        right = int(self.host_high[rows].min()) - tile.k0
        width = tile.k1 - tile.k0
        if left >= right:
            left, right = width, width
        for start, end in ((0, left), (max(left, right), width)):
            if start < end:
                column = torch.arange(tile.k0 + start, tile.k0 + end, device=logits.device)
                hidden = (column < self.low[rows, None]) | (column >= self.high[rows, None])
                logits[..., start:end].masked_fill_(hidden, value)


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


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    @outside_autocast
    def forward(ctx: FunctionCtx, q: Tensor, k: KV, v: KV, interval: Interval, scale: float) -> tuple[Tensor, Tensor]:
        num_kv_heads, v_head_dim = heads_and_dim(v)
        dtype = compute_dtype(q.dtype)
        out = q.new_zeros(q.shape[0], q.shape[1], v_head_dim)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype, device=q.device)
        for tile in interval.tiles:
            rows = slice(tile.q0, tile.q1)
            logits, _ = tile_logits(q, k, interval, tile, num_kv_heads, scale)
            top = logits.amax(-1, keepdim=True)
            top.masked_fill_(top == -torch.inf, 0.0)
            weights = logits.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            v_tile = slice_rows(v, tile.k0, tile.k1, interval.cu_seqlens_k).transpose(0, 1).to(dtype)
            o = torch.bmm(weights, v_tile) / total.masked_fill(total == 0, 1.0)
            out[rows] = ungroup_heads(o, tile.q1 - tile.q0)
            lse[:, rows] = (top + total.log()).reshape(q.shape[1], -1)
        if isinstance(k, Tensor) and isinstance(v, Tensor):
            ctx.save_for_backward(q, k, v, out, lse)
        ctx.interval, ctx.scale = interval, scale
        lse = lse.float()
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: FunctionCtx, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        interval, scale = ctx.interval, ctx.scale
        num_kv_heads = k.shape[1]
        dtype = compute_dtype(q.dtype)
        delta = (grad_out.to(dtype) * out).sum(-1, keepdim=True)
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
        for tile in interval.tiles:
            rows, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            logits, q_tile = tile_logits(q, k, interval, tile, num_kv_heads, scale)
            lse_tile = lse[:, rows]
            weights = logits.sub_(lse_tile.masked_fill(lse_tile == -torch.inf, 0.0).reshape(num_kv_heads, -1, 1)).exp_()
            do_tile = group_heads(grad_out[rows], num_kv_heads, dtype)
            v_tile = v[keys].transpose(0, 1).to(dtype)
            dv[keys] += torch.bmm(weights.mT, do_tile).transpose(0, 1)
            ds = torch.bmm(do_tile, v_tile.mT).sub_(group_heads(delta[rows], num_kv_heads, dtype)).mul_(weights)
            dk[keys] += torch.bmm(ds.mT, q_tile).transpose(0, 1)
            k_tile = k[keys].transpose(0, 1).to(dtype)
            dq[rows] = ungroup_heads(torch.bmm(ds, k_tile).mul_(scale), tile.q1 - tile.q0)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def tile_logits(
    q: Tensor, k: KV, interval: Interval, tile: Tile, num_kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Logits of a tile [Hk, G*R, keys] with -inf where a query may not look, and its scaled queries [Hk, G*R, Dk]."""
    q_tile = group_heads(q[tile.q0 : tile.q1], num_kv_heads, compute_dtype(q.dtype)) * scale
    k_tile = slice_rows(k, tile.k0, tile.k1, interval.cu_seqlens_k).transpose(0, 1).to(q_tile.dtype)
    logits = torch.bmm(q_tile, k_tile.mT)
    interval.hide(tile, logits.unflatten(1, (-1, tile.q1 - tile.q0)), -torch.inf)
    return logits, q_tile
