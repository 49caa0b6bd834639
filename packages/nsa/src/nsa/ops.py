"""The operations, routed: each call asks nsa-routing which backend runs it.

Every function takes `backend=None` (the plan decides) or a name (obeyed, or an error that says why not), and raises
TypeError or ValueError for arguments that do not fit, RuntimeError where no backend accepts the problem. Keys and
values (k, v, k_cmp, v_cmp) are packed or `nsa_varlen.PagedKV`; `layout` always describes the raw tokens. LSEs are
natural logarithms, fp32 [Hq, Tq], without gradient; queries that see no key give out = 0 and lse = -inf.

Inside an autocast region the attention operations and `select_blocks` take q, k and v as torch's
`scaled_dot_product_attention` does: fp16, bf16 and fp32 become the region's dtype, which is the result's, and fp64
stays. Pages are not converted: they have that dtype already, or the call raises. `compress_mean` and `combine` are
means, products and sums, which torch leaves in the dtype of x and of the outputs; so gates may have any.
"""

from typing import Any

import torch
from nsa_routing import Problem, dispatch
from nsa_varlen import BlockGeometry, NewTokens, PagedKV, VarlenLayout
from nsa_varlen.arguments import (
    KV,
    check_attention,
    check_decode,
    check_gates,
    check_layout,
    check_rows,
    heads_and_dim,
)
from nsa_varlen.decode_facts import Checked
from torch import Tensor

from nsa.autocasting import autocast
from nsa.checkpointing import selected_once
from nsa.noted_problems import noted
from nsa.profiler_ranges import ranged

__all__ = [
    "combine",
    "compress_mean",
    "compressed_attention",
    "decode_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]


@ranged
def compress_mean(x: Tensor, layout: VarlenLayout, blocks: BlockGeometry, *, backend: str | None = None) -> Tensor:
    """`x_cmp[i] = mean of x[i*d : i*d + l]` for each complete block: [Tk, H, D] -> [Tc, H, D].

    Example:
        >>> layout = VarlenLayout.from_lengths([48])
        >>> compress_mean(torch.ones(48, 2, 8), layout, BlockGeometry()).shape
        torch.Size([2, 2, 8])
    """
    check_layout(layout, blocks)
    check_rows("x", x, layout.total_k, layout)
    problem = _problem("compress_mean", layout, blocks, x, x)
    return dispatch("compress_mean", noted(problem), backend=backend)(x, layout, blocks)


@ranged
def compressed_attention(
    q: Tensor,
    k_cmp: KV,
    v_cmp: KV,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the compressed blocks that end at or before the query (Eq. 7, 8).

    Args:
        q: [Tq, Hq, Dk].
        k_cmp: [Tc, Hk, Dk].
        v_cmp: [Tc, Hk, Dv].
        scale: of the logits; None is 1/sqrt(Dk).
        deterministic: True asks for bitwise equal results across runs.

    Returns:
        (out [Tq, Hq, Dv], lse [Hq, Tq]).

    Example:
        >>> layout, blocks = VarlenLayout.from_lengths([48]), BlockGeometry()
        >>> q, k_cmp = torch.randn(48, 4, 8), torch.randn(2, 2, 8)
        >>> out, lse = compressed_attention(q, k_cmp, k_cmp, layout, blocks)
        >>> out.shape, bool(lse[0, 30].isinf()), bool(lse[0, 31].isfinite())
        (torch.Size([48, 4, 8]), True, True)
    """
    q, k_cmp, v_cmp = autocast(q, k_cmp, v_cmp)
    check_layout(layout, blocks)
    check_attention(("k_cmp", "v_cmp"), q, k_cmp, v_cmp, layout.compressed(blocks).total, layout)
    problem = _problem("compressed_attention", layout, blocks, q, k_cmp, v_cmp, deterministic=deterministic)
    run = dispatch("compressed_attention", noted(problem), backend=backend)
    return run(q, k_cmp, v_cmp, layout, blocks, scale=scale, **_said(deterministic))


@ranged
def select_blocks(
    q: Tensor,
    k_cmp: KV,
    lse: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The blocks each query attends to (Eq. 9-11): int32 [Tq, Hk, topk], ascending, padded with -1. No gradient.

    Args:
        q, k_cmp, scale: those of `compressed_attention`, whose `lse` this takes.

    Example:
        >>> layout, blocks = VarlenLayout.from_lengths([130]), BlockGeometry(topk=3)
        >>> q, k_cmp = torch.zeros(130, 2, 8), torch.randn(7, 1, 8)
        >>> _, lse = compressed_attention(q, k_cmp, k_cmp, layout, blocks)
        >>> select_blocks(q, k_cmp, lse, layout, blocks)[[0, 64, 129], 0].tolist()
        [[0, -1, -1], [0, 1, -1], [0, 1, 2]]
    """
    q, k_cmp = autocast(q, k_cmp)
    check_layout(layout, blocks)
    check_attention(("k_cmp", "k_cmp"), q, k_cmp, k_cmp, layout.compressed(blocks).total, layout)

    def select() -> Tensor:
        problem = _problem("select_blocks", layout, blocks, q, k_cmp)
        indices: Tensor = dispatch("select_blocks", noted(problem), backend=backend)(
            q, k_cmp, lse, layout, blocks, scale=scale
        )
        return indices

    return selected_once(select, (layout.total_q, heads_and_dim(k_cmp)[0], blocks.topk))


@ranged
def selected_attention(
    q: Tensor,
    k: KV,
    v: KV,
    block_indices: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of the listed blocks at positions <= t (Eq. 12).

    Args:
        q: [Tq, Hq, Dk].
        k: [Tk, Hk, Dk].
        v: [Tk, Hk, Dv].
        block_indices: int32 [Tq, Hk, N], relative to the sequence, in any order and number; -1 and blocks beyond the
            sequence are ignored, duplicates count once.

    Returns:
        (out [Tq, Hq, Dv], lse [Hq, Tq]).

    Example:
        >>> layout, blocks = VarlenLayout.from_lengths([3]), BlockGeometry()
        >>> q, k = torch.zeros(3, 1, 2), torch.eye(3, 2)[:, None]
        >>> indices = torch.tensor([0, -1], dtype=torch.int32).expand(3, 1, 2)
        >>> selected_attention(q, k, k, indices, layout, blocks)[0][1, 0].tolist()
        [0.5, 0.5]
    """
    q, k, v = autocast(q, k, v)
    check_layout(layout, blocks)
    check_attention(("k", "v"), q, k, v, layout.total_k, layout)
    problem = _problem("selected_attention", layout, blocks, q, k, v, deterministic=deterministic)
    run = dispatch("selected_attention", noted(problem), backend=backend)
    return run(q, k, v, block_indices, layout, blocks, scale=scale, **_said(deterministic))


@ranged
def window_attention(
    q: Tensor,
    k: KV,
    v: KV,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over positions (t - w, t]; arguments and results as `selected_attention`, without indices.

    Example:
        >>> layout, blocks = VarlenLayout.from_lengths([3]), BlockGeometry(window_size=1)
        >>> k = torch.randn(3, 1, 8)
        >>> bool((window_attention(k, k, k, layout, blocks)[0] == k).all())
        True
    """
    q, k, v = autocast(q, k, v)
    check_layout(layout, blocks)
    check_attention(("k", "v"), q, k, v, layout.total_k, layout)
    problem = _problem("window_attention", layout, blocks, q, k, v, deterministic=deterministic)
    run = dispatch("window_attention", noted(problem), backend=backend)
    return run(q, k, v, layout, blocks, scale=scale, **_said(deterministic))


@ranged
def combine(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, *, backend: str | None = None) -> Tensor:
    """out = sum of gate_c * o_c over cmp, slc, win (Eq. 5): gates [Tq, Hq, 3], o_c [Tq, Hq, Dv] -> [Tq, Hq, Dv].

    Example:
        >>> o = torch.ones(2, 1, 4)
        >>> combine(torch.tensor([[[0.5, 0.25, 0.0]]]).expand(2, 1, 3), o, o, o)[0, 0].tolist()
        [0.75, 0.75, 0.75, 0.75]
    """
    check_gates(gates, {"o_cmp": o_cmp, "o_slc": o_slc, "o_win": o_win})
    problem = Problem(
        "combine",
        o_cmp.device.type,
        o_cmp.dtype,
        o_cmp.shape[2],
        o_cmp.shape[2],
        1,
        needs_grad=_needs_grad(gates, o_cmp, o_slc, o_win),
        device_index=o_cmp.device.index or 0,
        total_q=o_cmp.shape[0],
    )
    return dispatch("combine", noted(problem), backend=backend)(gates, o_cmp, o_slc, o_win)


@ranged
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """All of Eq. 5 to 12 for the newest tokens of paged sequences, at lengths that only the device knows.

    What `nsa.nsa_attention` computes for them. Shapes follow from shapes, and nothing is read from a GPU: a CUDA graph
    may hold the call, and its replay sees the lengths and pages of its time. No gradient is recorded: where one would
    have to be, every backend refuses.

    The route is told what the host knows: B * N queries, N of a sequence, and as many keys as its pages have room for.

    Args:
        q: [B, N, Hq, Dk]. Of sequence b the first counts[b] rows are its last tokens, in order; others are padding.
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win: pages, with as many rows as the sequences have tokens (blocks
            completed: cmp). The new tokens are in them already, unless they are `new`.
        gates: [B, N, Hq, 3] in the order cmp, slc, win.
        counts: int32 [B], 0 to N.
        q_cmp: queries of the compressed branch and of the scores where they differ from q; None is q.
        scale: of the logits; None is 1/sqrt(Dk).
        new: rows of the new tokens, in the pages' dtype, which are stored first with the blocks that they complete. The
            lengths of k_cmp and v_cmp are written then, not read.

    Returns:
        (out [B, N, Hq, Dv], block_indices int32 [B, N, Hk, topk]): 0 and -1 for padding.

    Example:
        >>> from nsa_varlen.op_inputs import op_inputs
        >>> sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        >>> args, _ = op_inputs("decode_attention", [1, 2], [200, 70], **sizes, dtype=torch.float32, device="cpu")
        >>> out, block_indices = decode_attention(*args)
        >>> out.shape, block_indices[0, 0, 0, :5].tolist()
        (torch.Size([2, 2, 4, 8]), [0, 1, 2, 3, -1])
    """
    q, q_cmp = autocast(q, q_cmp)
    pages = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
    asked = q if q_cmp is None else q_cmp
    accepted = check_decode(q, asked, pages[:2], pages[2:4], pages[4:], gates, counts, blocks, new)
    needs_grad = torch.is_grad_enabled() and _needs_grad(
        *(q, asked, gates, *(() if new is None else (*new.tensors(), *new.rings())), *(x.pages for x in pages))
    )
    problem = accepted.notes.get(("nsa.ops", needs_grad))
    if problem is None:
        problem = accepted.notes["nsa.ops", needs_grad] = Problem(
            "decode_attention",
            q.device.type,
            q.dtype,
            q.shape[3],
            v_slc.head_dim,
            q.shape[2] // k_slc.num_heads,
            needs_grad=needs_grad,
            paged=True,
            device_index=q.device.index or 0,
            **_sizes(blocks),
            total_q=q.shape[0] * q.shape[1],
            max_seqlen_q=q.shape[1],
            max_seqlen_k=k_slc.block_table.shape[1] * k_slc.page_size,
        )
    run = dispatch("decode_attention", noted(problem), backend=backend)
    if torch.compiler.is_compiling():
        return run(q, *pages, gates, counts, blocks, q_cmp=q_cmp, scale=scale, new=new)
    with Checked((q, asked, *pages, gates, counts, blocks, new), accepted):  # the backend need not look again
        return run(q, *pages, gates, counts, blocks, q_cmp=q_cmp, scale=scale, new=new)


def _problem(
    op: str, layout: VarlenLayout, blocks: BlockGeometry, q: Tensor, *kv: KV, deterministic: bool | None = None
) -> Problem:
    """What the choice of a backend depends on; the last of `kv` are the values, or all there is."""
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: expected a bool or None, got {type(deterministic).__name__}")
    num_kv_heads, v_head_dim = heads_and_dim(kv[-1])
    paged = [x for x in kv if isinstance(x, PagedKV)]
    return Problem(
        op,
        q.device.type,
        q.dtype,
        q.shape[2],
        v_head_dim,
        q.shape[1] // num_kv_heads,
        needs_grad=op != "select_blocks" and _needs_grad(q, *(x.pages if isinstance(x, PagedKV) else x for x in kv)),
        deterministic=deterministic,
        paged=bool(paged),
        fp8_scales=any(scale is not None for x in paged for scale in (x.k_scale, x.v_scale)),
        device_index=q.device.index or 0,
        **_sizes(blocks),
        uniform=op != "compress_mean" and _is_uniform(layout),
        total_q=layout.total_q,
        max_seqlen_q=layout.max_seqlen_q,
        max_seqlen_k=layout.max_seqlen_k,
    )


def _sizes(blocks: BlockGeometry) -> dict[str, Any]:
    return {
        "kernel_size": blocks.kernel_size,
        "kernel_stride": blocks.kernel_stride,
        "block_size": blocks.block_size,
        "topk": blocks.topk,
        "init_blocks": blocks.init_blocks,
        "local_blocks": blocks.local_blocks,
        "window_size": blocks.window_size,
    }


def _is_uniform(layout: VarlenLayout) -> bool:
    """Whether every sequence has max_seqlen_q queries and as many keys: no length is longer, so the totals tell."""
    count, length = layout.batch_size, layout.max_seqlen_q
    return count >= 1 and layout.max_seqlen_k == length and layout.total_q == layout.total_k == count * length


def _said(deterministic: bool | None) -> dict[str, bool]:
    """The keyword, unless the caller left it open: then the route may fill it in."""
    return {} if deterministic is None else {"deterministic": deterministic}


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
