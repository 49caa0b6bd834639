"""Attention that knows only dense batches, over ragged ones: the branches of NSA, bucket by bucket.

Where a backend has a dense form and no ragged one, `DenseForms` makes the packed operations of it; where it has
neither, the dense form is `masked_attention`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nsa_varlen.arguments import KV, check_attention, check_block_indices, check_layout, heads_and_dim, scale_or_default
from nsa_varlen.autograd import outside_autocast
from nsa_varlen.buckets import Bucket
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout

# Logits of one dense call with a mask at most: 256 MB of fp32, and a mask of 64 MB with a single head.
CALL_LOGITS = 1 << 26

Batch = tuple[Tensor, Tensor, Tensor]  # q [b, Sq, Hq, Dk], k [b, Sk, Hk, Dk], v [b, Sk, Hk, Dv]


class Dense(Protocol):
    """An attention over dense batches, differentiable in q, k and v."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend over a batch whose padding is on the right.

        Args:
            q: [b, Sq, Hq, Dk]; zeros in the padding.
            k: [b, Sk, Hk, Dk]; zeros in the padding and in keys that the mask hides from all.
            v: [b, Sk, Hk, Dv]; zeros where k has them.
            mask: bool [b, Sq, Sk], True where a query may look; rows may be empty. None: no mask.
            scale: of the logits.
            is_causal: query i sees keys 0..i (top-left aligned, as torch's SDPA; only with Sq = Sk and without a mask).

        Returns:
            (out [b, Sq, Hq, Dv], lse [b, Hq, Sq]): rows of padding may hold anything; other rows that see no key are 0
            and -inf.
        """
        ...


@outside_autocast
def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """`Dense` by plain torch, half precision computed in fp32: out [b, Sq, Hq, Dv] in q's dtype, lse fp32 [b, Hq, Sq].

    With is_causal the queries go in runs of at most CALL_LOGITS logits, each over the keys up to its last query:
    temporaries are bounded (a single row's logits excepted), but what autograd keeps for the backward is not, half the
    square of the logits. With a mask all is computed at once: whoever made the mask has bounded it.

    Example:
        >>> q = k = torch.zeros(1, 2, 1, 4)
        >>> v = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
        >>> out, lse = masked_attention(q, k, v, None, scale=1.0, is_causal=True)
        >>> out.flatten().tolist(), lse.exp().flatten().tolist()
        ([1.0, 2.0], [1.0, 2.0])
    """
    if not is_causal:
        return _attend(q, k, v, mask, scale)
    rows = max(1, CALL_LOGITS // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    ends = [(start, min(start + rows, q.shape[1])) for start in range(0, q.shape[1], rows)]
    parts = [_attend(q[:, i:end], k[:, :end], v[:, :end], _causal(i, end, k), scale) for i, end in ends]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _causal(start: int, end: int, k: Tensor) -> Tensor:
    """Which keys of k [b, Sk, Hk, Dk] queries [start, end) see: bool [1, end - start, min(end, Sk)]."""
    return torch.ones(1, end - start, min(end, k.shape[1]), dtype=torch.bool, device=k.device).tril(start)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    q_heads = q.to(wide).unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)  # [b, Hk, G, Sq, Dk]
    k_heads, v_heads = (x.to(wide).transpose(1, 2)[:, :, None] for x in (k, v))  # [b, Hk, 1, Sk, D]
    logits = torch.matmul(q_heads * scale, k_heads.mT)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    top = logits.detach().amax(-1, keepdim=True)
    weights = (logits - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = torch.matmul(weights / total.masked_fill(empty, 1.0), v_heads).masked_fill(empty, 0.0)
    lse = (top + total.detach().log())[..., 0].flatten(1, 2)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype), lse.float()


class DenseForms:
    """The attention branches by a dense attention: signatures, results and errors of `nsa_varlen.reference`.

    Queries go in the buckets of their layout, those that see no key nowhere. `dense` is called without a mask, with
    is_causal=True, where that is exact: for a window that cuts nothing off over as many keys as queries. Elsewhere it
    gets a mask, and at most CALL_LOGITS logits at a time; how much it keeps for its backward is its own business.

    Args:
        dense: see `Dense`.

    Example:
        >>> layout, blocks = VarlenLayout.from_lengths([5, 3]), BlockGeometry(window_size=2)
        >>> q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
        >>> out, lse = DenseForms(masked_attention).window_attention(q, k, k, layout, blocks)
        >>> out.shape, lse.shape
        (torch.Size([8, 4, 16]), torch.Size([4, 8]))
    """

    def __init__(self, dense: Dense) -> None:
        self.dense = dense

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
        scale = scale_or_default(scale, q.shape[-1])

        def attend(part: Bucket, qkv: Batch) -> tuple[Tensor, Tensor]:
            return self._masked(qkv, lambda rows: part.visible(queries=rows), scale)

        return _over_buckets(q, k_cmp, v_cmp, layout.buckets(blocks), attend)

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
        scale = scale_or_default(scale, q.shape[-1])

        def attend(part: Bucket, qkv: Batch) -> tuple[Tensor, Tensor]:
            if part.causal and part.max_seqlen_k <= blocks.window_size:
                return self.dense(*qkv, None, scale=scale, is_causal=True)
            return self._masked(qkv, lambda rows: part.visible(blocks.window_size, rows), scale)

        return _over_buckets(q, k, v, layout.buckets(), attend)

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
        """Attention over the listed blocks' keys at positions <= t: (out, lse). Each kv head is a batch of its own."""
        check_layout(layout, blocks)
        check_attention(("k", "v"), q, k, v, layout.total_k, layout)
        num_kv_heads = heads_and_dim(k)[0]
        check_block_indices(block_indices, num_kv_heads, layout)
        scale = scale_or_default(scale, q.shape[-1])

        def attend(part: Bucket, qkv: Batch) -> tuple[Tensor, Tensor]:
            indices = part.queries.gather(block_indices)  # [b, Sq, Hk, N]

            def mask(rows: slice) -> Tensor:
                listed = _listed(indices[:, rows], part.max_seqlen_k, blocks)
                return (listed & part.visible(queries=rows)[:, None]).flatten(0, 1)

            q, k, v = (x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(0, 1) for x in qkv)
            out, lse = self._masked((q, k, v), mask, scale)
            out = out.unflatten(0, (-1, num_kv_heads)).transpose(1, 2).flatten(2, 3)
            return out, lse.unflatten(0, (-1, num_kv_heads)).flatten(1, 2)

        return _over_buckets(q, k, v, layout.buckets(), attend)

    def _masked(self, qkv: Batch, mask: Callable[[slice], Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """`dense` with the mask of each slice of queries, in calls of at most CALL_LOGITS logits."""
        q, k, v = qkv
        rows = max(1, CALL_LOGITS // (q.shape[0] * q.shape[2] * k.shape[1]))
        slices = [slice(start, start + rows) for start in range(0, q.shape[1], rows)]
        results = []
        for x in slices:
            shown = mask(x)
            unseen = ~shown.any(1)[..., None, None]
            keys, values = (y.masked_fill(unseen, 0.0) for y in (k, v))
            results.append(self.dense(q[:, x], keys, values, shown, scale=scale, is_causal=False))
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 2)


@outside_autocast
def _over_buckets(
    q: Tensor, k: KV, v: KV, buckets: tuple[Bucket, ...], attend: Callable[[Bucket, Batch], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, Dv], lse fp32 [Hq, Tq]) of `attend(bucket, q, k, v)` on the dense batch of each bucket."""
    out = q.new_zeros(*q.shape[:2], heads_and_dim(v)[1])
    # A sum over no rows: results of a batch that sees nothing have gradients too, of zero.
    out = out + sum(x[:0].sum() for x in (q, k, v) if isinstance(x, Tensor))
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    for bucket in buckets:
        for part in bucket.split(max(1, CALL_LOGITS // (q.shape[1] * bucket.max_seqlen_q * bucket.max_seqlen_k))):
            part_out, part_lse = attend(part, (part.queries.gather(q), part.keys.gather(k), part.keys.gather(v)))
            out = part.queries.scatter(part_out, out)
            part.queries.scatter(part_lse.detach().float().transpose(1, 2), lse)
    return out, lse.T.contiguous()


def _listed(indices: Tensor, num_keys: int, blocks: BlockGeometry) -> Tensor:
    """Keys in the listed blocks: indices [b, R, Hk, N] -> bool [b, Hk, R, num_keys]."""
    num_blocks = blocks.num_blocks(num_keys)
    within = (indices >= 0) & (indices < num_blocks)
    block = torch.where(within, indices, num_blocks).long()  # what lists nothing goes to a column that is cut off
    listed = torch.zeros(*block.shape[:3], num_blocks + 1, dtype=torch.bool, device=block.device)
    listed.scatter_(-1, block, True)
    block_of_key = torch.arange(num_keys, device=block.device) // blocks.block_size
    return listed.transpose(1, 2)[..., block_of_key]
