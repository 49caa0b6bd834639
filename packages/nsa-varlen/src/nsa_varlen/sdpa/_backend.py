"""The operations of backend `sdpa`, with the signatures that every backend shares."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_varlen.arguments import (
    KV,
    check_attention,
    check_block_indices,
    check_decode,
    check_gates,
    check_layout,
    check_lse,
    heads_and_dim,
    scale_or_default,
)
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.new_tokens import NewTokens
from nsa_varlen.paged import PagedKV
from nsa_varlen.sdpa._append import append
from nsa_varlen.sdpa._decode import decode
from nsa_varlen.sdpa._decode_stages import decode_stages
from nsa_varlen.sdpa._interval import Interval, interval_attention
from nsa_varlen.sdpa._selected import selected
from nsa_varlen.sdpa._selection import select
from nsa_varlen.sdpa._tiles import Position
from nsa_varlen.unfold import unfold_blocks
from nsa_varlen.untraced import untraced

OPS = (
    "compress_mean",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "combine",
    "decode_attention",
)


class SdpaBackend:
    """Plain torch for every operation. Arguments, results and errors are those of `nsa_varlen.reference`.

    In addition k and v (and k_cmp, v_cmp) may be `PagedKV`, and inputs may be half precision; lse is fp32.
    `deterministic` changes nothing: every reduction has a fixed order.
    """

    name = "sdpa"

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        """Why this backend cannot run `op`, or None."""
        if op not in OPS:
            return f"has no operation {op}"
        for feature in ("softcap", "sinks", "fp8_scales"):
            if getattr(problem, feature, None):
                return f"does not implement {feature}"
        if getattr(problem, "paged", False) and getattr(problem, "needs_grad", False):
            return "records no gradients through paged keys and values"
        return None

    @untraced
    def compress_mean(self, x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
        """Mean of each compressed block's tokens: [Tk, H, D] -> [Tc, H, D]. Half precision is summed in fp32."""
        unfolded = unfold_blocks(x, layout, blocks)
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        return unfolded.mean(1, dtype=wide).to(x.dtype)

    @untraced
    def compressed_attention(
        self,
        q: Tensor,
        k_cmp: KV,
        v_cmp: KV,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        scale: float | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the visible compressed blocks: (out, lse)."""
        check_layout(layout, blocks)
        check_attention(("k_cmp", "v_cmp"), q, k_cmp, v_cmp, layout.compressed(blocks).total, layout)
        _check_no_grad_through_pages(q, k_cmp, v_cmp)
        interval = _compressed_interval(layout, blocks, q.shape[1], heads_and_dim(k_cmp)[0])
        return interval_attention(q, k_cmp, v_cmp, interval, scale_or_default(scale, q.shape[-1]))

    @untraced
    def select_blocks(
        self,
        q: Tensor,
        k_cmp: KV,
        lse: Tensor,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """The blocks each query attends to: int32 [Tq, Hk, topk]. No gradient."""
        check_layout(layout, blocks)
        check_attention(("k_cmp", "k_cmp"), q, k_cmp, k_cmp, layout.compressed(blocks).total, layout)
        check_lse(lse, q.shape[1], layout)
        interval = _compressed_interval(layout, blocks, q.shape[1], heads_and_dim(k_cmp)[0])
        with torch.no_grad():
            return select(q, k_cmp, lse, layout, blocks, interval, scale_or_default(scale, q.shape[-1]))

    @untraced
    def selected_attention(
        self,
        q: Tensor,
        k: KV,
        v: KV,
        block_indices: Tensor,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        scale: float | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the listed blocks' keys at positions <= t: (out, lse)."""
        check_layout(layout, blocks)
        check_attention(("k", "v"), q, k, v, layout.total_k, layout)
        check_block_indices(block_indices, heads_and_dim(k)[0], layout)
        _check_no_grad_through_pages(q, k, v)
        return selected(q, k, v, block_indices, layout, blocks, scale_or_default(scale, q.shape[-1]))

    @untraced
    def window_attention(
        self,
        q: Tensor,
        k: KV,
        v: KV,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        scale: float | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over positions (t - w, t]: (out, lse)."""
        check_layout(layout, blocks)
        check_attention(("k", "v"), q, k, v, layout.total_k, layout)
        _check_no_grad_through_pages(q, k, v)
        interval = _window_interval(layout, blocks, q.shape[1], heads_and_dim(k)[0])
        return interval_attention(q, k, v, interval, scale_or_default(scale, q.shape[-1]))

    def combine(self, gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
        """out = sum of gate_c * o_c over cmp, slc, win: [Tq, Hq, Dv] in the outputs' dtype."""
        check_gates(gates, {"o_cmp": o_cmp, "o_slc": o_slc, "o_win": o_win})
        wide = torch.promote_types(torch.float32, torch.promote_types(gates.dtype, o_cmp.dtype))
        g_cmp, g_slc, g_win = gates.to(wide)[..., None].unbind(2)
        out = g_cmp * o_cmp.to(wide)
        out.addcmul_(g_slc, o_slc.to(wide)).addcmul_(g_win, o_win.to(wide))  # in place: one tensor, not five
        return out.to(o_cmp.dtype)

    @untraced
    def decode_attention(
        self,
        q: Tensor,
        k_cmp: PagedKV,
        v_cmp: PagedKV,
        k_slc: PagedKV,
        v_slc: PagedKV,
        k_win: PagedKV,
        v_win: PagedKV,
        gates: Tensor,
        counts: Tensor,
        blocks: BlockGeometry,
        *,
        q_cmp: Tensor | None = None,
        scale: float | None = None,
        new: NewTokens | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All branches for the newest tokens of paged sequences: (out, block_indices). Reads nothing from a GPU."""
        q_cmp = q if q_cmp is None else q_cmp
        cmp, slc, win = (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win)
        check_decode(q, q_cmp, cmp, slc, win, gates, counts, blocks, new)
        scale = scale_or_default(scale, q.shape[-1])
        with torch.no_grad():
            if new is not None:
                append(new, cmp, slc, win, counts, blocks)
            return decode(q, q_cmp, cmp, slc, win, gates, counts, blocks, scale)

    def decode_stages(
        self,
        q: Tensor,
        k_cmp: PagedKV,
        v_cmp: PagedKV,
        k_slc: PagedKV,
        v_slc: PagedKV,
        k_win: PagedKV,
        v_win: PagedKV,
        gates: Tensor,
        counts: Tensor,
        blocks: BlockGeometry,
        *,
        q_cmp: Tensor | None = None,
        scale: float | None = None,
        new: NewTokens | None = None,
    ) -> dict[str, Callable[[], Any]]:
        """The parts of one `decode_attention`, to be timed: `cmp`, `choice`, `sel`, `win` and `combine`.

        `cmp` stores new tokens, too. The whole step has run when this returns. Each stage may then be called in any
        order and captured in a CUDA graph, and returns what it makes of what the others made then: `cmp` the branch's
        output and probabilities, `choice` block_indices, `sel` and `win` the branches' outputs, `combine` out.
        Arguments are kept alive.

        Without a row of q, or a page, there is no stage.

        Raises:
            TypeError, ValueError: as `decode_attention`.
        """
        q_cmp = q if q_cmp is None else q_cmp
        cmp, slc, win = (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win)
        self.decode_attention(q, *cmp, *slc, *win, gates, counts, blocks, q_cmp=q_cmp, scale=scale, new=new)
        scale = scale_or_default(scale, q.shape[-1])
        return decode_stages(q, q_cmp, cmp, slc, win, gates, counts, blocks, scale, new)


BACKEND = SdpaBackend()


def _compressed_interval(layout: VarlenLayout, blocks: BlockGeometry, num_heads: int, num_kv_heads: int) -> Interval:
    """Query at position t sees the first num_cmp(t + 1) compressed blocks of its sequence."""

    def visible(position: Position) -> tuple[Position, Position]:
        return 0 * position, blocks.num_compressed(position + 1)

    def build() -> Interval:
        return Interval(layout, blocks, visible, num_heads, num_heads // num_kv_heads)

    return layout.derive(("sdpa", "cmp", blocks, num_heads, num_kv_heads), build)


def _window_interval(layout: VarlenLayout, blocks: BlockGeometry, num_heads: int, num_kv_heads: int) -> Interval:
    """Query at position t sees the keys at positions (t - w, t]."""

    def visible(position: Position) -> tuple[Position, Position]:
        return _at_least_0(position + 1 - blocks.window_size), _at_least_0(position + 1)

    def build() -> Interval:
        return Interval(layout, None, visible, num_heads, num_heads // num_kv_heads)

    return layout.derive(("sdpa", "win", blocks, num_heads, num_kv_heads), build)


def _at_least_0(x: Position) -> Position:
    return x.clamp_min(0) if isinstance(x, Tensor) else max(0, x)


def _check_no_grad_through_pages(q: Tensor, *kv: KV) -> None:
    pages = [x for x in kv if isinstance(x, PagedKV)]
    tensors = [q, *(x.pages for x in pages), *(x for x in kv if isinstance(x, Tensor))]
    if pages and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("q, k, v: expected no gradient to be recorded with paged k or v, got requires_grad=True")
