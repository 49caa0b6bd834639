"""The oracle: every operation from the paper's equations, with dense masks, in fp32 or fp64.

Nothing here is fast, and nothing here is adapted to a kernel: each function materialises its whole mask
(`nsa_varlen.masks`) and differentiates through ordinary autograd. Compare a backend with it in fp64. The signatures
are those of the operations; LSEs keep the computing dtype, so that an fp64 comparison loses nothing.

Raises (all functions): TypeError for half-precision inputs, and what `nsa_varlen.arguments` raises.
"""

import torch
from torch import Tensor

from nsa_varlen import masks
from nsa_varlen.arguments import (
    check_attention,
    check_block_indices,
    check_decode,
    check_gates,
    check_layout,
    check_lse,
    check_rows,
    scale_or_default,
)
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.new_tokens import CompletedBlocks, NewTokens, PooledTokens
from nsa_varlen.paged import PagedKV

__all__ = [
    "block_scores",
    "combine",
    "compress_mean",
    "compressed_attention",
    "decode_attention",
    "overlap",
    "select_blocks",
    "selected_attention",
    "window_attention",
]


def compress_mean(x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
    """`x_cmp[i] = mean of x[i*d : i*d + l]`, for each complete block of each sequence: [Tk, H, D] -> [Tc, H, D].

    Example:
        >>> geometry = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=3)
        >>> x = torch.tensor([1.0, 3.0, 5.0]).reshape(3, 1, 1)
        >>> compress_mean(x, VarlenLayout.from_lengths([3]), geometry).flatten().tolist()
        [2.0, 4.0]
    """
    check_layout(layout, blocks)
    check_rows("x", x, layout.total_k, layout)
    _check_precision(x)
    start = layout.compressed_starts(blocks)[:, None]
    position = layout.key_positions()
    same = layout.sequence_of_compressed(blocks)[:, None] == layout.sequence_of_keys()
    member = same & (position >= start) & (position < start + blocks.kernel_size)
    return torch.einsum("ct,thd->chd", member.to(x.dtype) / blocks.kernel_size, x)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible compressed blocks (Eq. 7, 8).

    Args:
        q: [Tq, Hq, Dk].
        k_cmp: [Tc, Hk, Dk].
        v_cmp: [Tc, Hk, Dv].
        layout: of the raw tokens.
        scale: of the logits; None is 1/sqrt(Dk).
        deterministic: no effect here; the oracle always is.

    Returns:
        (out [Tq, Hq, Dv], lse [Hq, Tq]): lse is the natural log of the sum of exponentials, without gradient.
        Queries that see nothing give 0 and -inf.
    """
    check_layout(layout, blocks)
    check_attention(("k_cmp", "v_cmp"), q, k_cmp, v_cmp, layout.compressed(blocks).total, layout)
    _check_precision(q)
    mask = masks.compressed_mask(layout, blocks)[:, None]
    return _attend(q, k_cmp, v_cmp, mask, scale_or_default(scale, q.shape[-1]))


def overlap(num_compressed: int, num_blocks: int, blocks: BlockGeometry) -> Tensor:
    """Eq. 9 counted 0-based: `weight[i, j] = |[i*d, i*d + l) ∩ [j*l', (j+1)*l')| / d`, float64 [num_cmp, Nb].

    Example:
        >>> overlap(5, 2, BlockGeometry()).T.tolist()
        [[2.0, 2.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0, 2.0]]
    """
    start = torch.arange(num_compressed, device="cpu")[:, None] * blocks.kernel_stride
    left = torch.arange(num_blocks, device="cpu") * blocks.block_size
    shared = torch.minimum(start + blocks.kernel_size, left + blocks.block_size) - torch.maximum(start, left)
    return shared.clamp_min(0).double() / blocks.kernel_stride


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
) -> Tensor:
    """Importance of each selection block (Eq. 9, 10): [Tq, Hk, Nb], summed over the query heads of a group.

    score[j] = sum over heads and i of overlap[i, j] * p_cmp[i], p_cmp = exp(scale * q.k_cmp - lse) where visible.
    """
    check_layout(layout, blocks)
    check_attention(("k_cmp", "k_cmp"), q, k_cmp, k_cmp, layout.compressed(blocks).total, layout)
    check_lse(lse, q.shape[1], layout)
    _check_precision(q)
    num_kv_heads = k_cmp.shape[1]
    logits = _logits(q, k_cmp, scale_or_default(scale, q.shape[-1]))
    visible = masks.compressed_mask(layout, blocks)[:, None, None]
    shift = torch.where(lse.isinf(), 0.0, lse).T.unflatten(1, (num_kv_heads, -1))[..., None]
    p_cmp = torch.where(visible, (logits - shift).exp(), 0.0)
    weight = overlap(layout.compressed(blocks).max_seqlen, blocks.num_blocks(layout.max_seqlen_k), blocks)
    block_in_sequence = torch.div(layout.compressed_starts(blocks), blocks.kernel_stride, rounding_mode="floor")
    # In fp64 and rounded once: a sum's order, and so its rounding, differs between blocks, and equal ones must tie.
    return (p_cmp.double().sum(2) @ weight.to(q.device)[block_in_sequence]).to(p_cmp.dtype)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
) -> Tensor:
    """The blocks each query attends to (Eq. 11): int32 [Tq, Hk, topk], ascending, padded with -1.

    The forced blocks, then the candidates with the highest `block_scores`; equal fp32 scores go to the lower index.
    `lse` [Hq, Tq] is that of `compressed_attention`.
    """
    scores = block_scores(q, k_cmp, lse, layout, blocks, scale=scale).float()
    candidate, forced = masks.candidate_blocks(layout, blocks)
    ranked = torch.where(forced[:, None], torch.inf, torch.where(candidate[:, None], scores, -torch.inf))
    ranked, order = ranked.sort(dim=-1, descending=True, stable=True)
    chosen = torch.where(ranked[..., : blocks.topk] == -torch.inf, order.shape[-1], order[..., : blocks.topk])
    chosen = torch.nn.functional.pad(chosen, (0, blocks.topk - chosen.shape[-1]), value=order.shape[-1])
    chosen = chosen.sort(-1).values
    return torch.where(chosen == order.shape[-1], -1, chosen).int()


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of the listed blocks at positions <= t (Eq. 12).

    Args:
        q: [Tq, Hq, Dk].
        k: [Tk, Hk, Dk].
        v: [Tk, Hk, Dv].
        block_indices: int32 [Tq, Hk, N], in any order; -1 and blocks beyond the sequence are ignored, duplicates
            count once.
        scale: of the logits; None is 1/sqrt(Dk).
        deterministic: no effect here; the oracle always is.

    Returns:
        (out [Tq, Hq, Dv], lse [Hq, Tq]), as `compressed_attention`.
    """
    check_layout(layout, blocks)
    check_attention(("k", "v"), q, k, v, layout.total_k, layout)
    check_block_indices(block_indices, k.shape[1], layout)
    _check_precision(q)
    mask = masks.selected_mask(block_indices, layout, blocks)
    return _attend(q, k, v, mask, scale_or_default(scale, q.shape[-1]))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over positions (t - w, t]: arguments and results as `compressed_attention`, over raw k, v."""
    check_layout(layout, blocks)
    check_attention(("k", "v"), q, k, v, layout.total_k, layout)
    _check_precision(q)
    mask = masks.window_mask(layout, blocks)[:, None]
    return _attend(q, k, v, mask, scale_or_default(scale, q.shape[-1]))


def combine(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
    """out = sum of gate_c * o_c over the branches cmp, slc, win (Eq. 5): gates [Tq, Hq, 3], o_c [Tq, Hq, Dv]."""
    check_gates(gates, {"o_cmp": o_cmp, "o_slc": o_slc, "o_win": o_win})
    _check_precision(o_cmp)
    return torch.einsum("thc,cthd->thd", gates, torch.stack((o_cmp, o_slc, o_win)))


def decode_attention(
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
    """Eq. 5 to 12 for the newest tokens of paged sequences: what the operations make of the same rows, packed.

    Args:
        q: [B, N, Hq, Dk]. Of sequence b the first counts[b] rows are its last tokens, in order; others are padding.
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win: pages, in which the new tokens are already, unless they are `new`.
        gates: [B, N, Hq, 3] in the order cmp, slc, win.
        counts: int32 [B].
        q_cmp: queries of the compressed branch and of the scores; None is q.
        scale: of the logits; None is 1/sqrt(Dk).
        new: the new tokens' rows, to be stored first; the lengths of k_cmp and v_cmp are written then, not read.

    Returns:
        (out [B, N, Hq, Dv], block_indices int32 [B, N, Hk, topk]): 0 and -1 for padding.
    """
    q_cmp = q if q_cmp is None else q_cmp
    check_decode(q, q_cmp, (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win), gates, counts, blocks, new)
    _check_precision(q)
    if new is not None:
        _store(new, (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win), counts, blocks)
    layout = VarlenLayout.from_lengths(counts.tolist(), k_slc.lengths.tolist(), q.device)
    cmp = VarlenLayout.from_lengths(k_cmp.lengths.tolist(), device=q.device)
    there = torch.arange(q.shape[1], device=q.device) < counts[:, None]
    rows = {"k_cmp": (k_cmp, cmp), "v_cmp": (v_cmp, cmp)}
    rows |= {name: (x, layout) for name, x in zip(("k", "v", "kw", "vw"), (k_slc, v_slc, k_win, v_win), strict=True)}
    kv = {name: x.rows(y.sequence_of_keys(), y.key_positions()) for name, (x, y) in rows.items()}
    o_cmp, lse = compressed_attention(q_cmp[there], kv["k_cmp"], kv["v_cmp"], layout, blocks, scale=scale)
    indices = select_blocks(q_cmp[there], kv["k_cmp"], lse, layout, blocks, scale=scale)
    o_slc, _ = selected_attention(q[there], kv["k"], kv["v"], indices, layout, blocks, scale=scale)
    o_win, _ = window_attention(q[there], kv["kw"], kv["vw"], layout, blocks, scale=scale)
    out = q.new_zeros(*q.shape[:3], v_slc.head_dim)
    out[there] = combine(gates[there], o_cmp, o_slc, o_win)
    block_indices = torch.full((*q.shape[:2], k_slc.num_heads, blocks.topk), -1, dtype=torch.int32, device=q.device)
    block_indices[there] = indices
    return out, block_indices


@torch.no_grad()
def _store(
    new: NewTokens,
    cmp: tuple[PagedKV, PagedKV],
    slc: tuple[PagedKV, PagedKV],
    win: tuple[PagedKV, PagedKV],
    counts: Tensor,
    blocks: BlockGeometry,
) -> None:
    """What `NewTokens` says, sequence by sequence and row by row."""
    streams = ((slc[0], new.k_slc), (slc[1], new.v_slc), (win[0], new.k_win), (win[1], new.v_win))
    for sequence, (length, count) in enumerate(zip(slc[0].lengths.tolist(), counts.tolist(), strict=True)):
        before = length - count
        for row in range(count):
            for kv, x in streams:
                _put(kv, sequence, before + row, x[sequence, row])
            if isinstance(new.cmp, PooledTokens):
                for tail, x in ((new.cmp.k_tail, new.cmp.k), (new.cmp.v_tail, new.cmp.v)):
                    tail[sequence, (before + row) % tail.shape[1]] = x[sequence, row]
        first = blocks.num_compressed(before)
        for block in range(first, blocks.num_compressed(length)):
            if isinstance(new.cmp, CompletedBlocks):
                k, v = new.cmp.k[sequence, block - first], new.cmp.v[sequence, block - first]
            else:
                k = _pooled(new.cmp.k_tail[sequence], new.cmp.k_weights, block, blocks)
                v = _pooled(new.cmp.v_tail[sequence], new.cmp.v_weights, block, blocks)
                if new.cmp.rotation is not None:
                    k = _rotated(k, new.cmp.rotation[:, block], new.cmp.interleaved)
            _put(cmp[0], sequence, block, k)
            _put(cmp[1], sequence, block, v)
    for kv in cmp:
        kv.lengths.copy_(blocks.num_compressed(slc[0].lengths))


def _put(kv: PagedKV, sequence: int, position: int, row: Tensor) -> None:
    """Store a row [H, D], or drop it where the sequence has no page."""
    pages = kv.block_table[sequence].tolist()
    place = position // kv.page_size
    if place < len(pages) and pages[place] >= 0:
        kv.pages[pages[place], position % kv.page_size] = row


def _pooled(tail: Tensor, weights: Tensor | None, block: int, blocks: BlockGeometry) -> Tensor:
    """sum over j < l of weight[h, j] * x[i*d + j] (None: the mean) of the ring of a sequence [R, H, D]: [H, D]."""
    start, size = block * blocks.kernel_stride, blocks.kernel_size
    rows = torch.stack([tail[position % len(tail)] for position in range(start, start + size)])
    if weights is None:
        return rows.sum(0) / size
    return torch.einsum("hl,lhd->hd", weights.to(rows.dtype), rows)


def _rotated(k: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """Pairs (2i, 2i + 1), or (i, i + D/2), of each head's row k [H, D] as complex numbers, times cos + i sin."""
    pairs = k.unflatten(-1, (-1, 2)) if interleaved else k.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(*rotation))
    return (turned if interleaved else turned.mT).flatten(-2)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q.k by kv head and head within the group: [Tq, Hk, G, Tk]."""
    grouped = q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    return torch.einsum("thgd,shd->thgs", grouped, k) * scale


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over the keys where mask [Tq, Hk or 1, Tk] is True; rows without any give 0 and -inf.

    Keys and values that no query sees may hold anything, NaN too.
    """
    unseen = ~mask.any(0).T[..., None]  # [Tk, Hk or 1, 1]
    k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    logits = torch.where(mask[:, :, None], _logits(q, k, scale), -torch.inf)
    # One extra column of -inf gives a batch without keys a maximum too.
    top = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).amax(-1, keepdim=True).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("thgs,shd->thgd", weights / torch.where(total == 0, 1.0, total), v)
    lse = (top + total.log()).detach()
    return out.flatten(1, 2), lse.flatten(1).T.contiguous()


def _check_precision(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the oracle computes in fp32 or fp64: expected one of them, got {x.dtype}; convert the inputs")
