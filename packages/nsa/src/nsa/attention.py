"""The whole of Native Sparse Attention on projected inputs."""

from typing import Literal, NamedTuple, overload

from nsa_routing import judged_together, outcome
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.arguments import (
    KV,
    check_attention,
    check_block_indices,
    check_gates,
    check_layout,
    check_rows,
    heads_and_dim,
)
from torch import Tensor

from nsa import ops
from nsa.autocasting import autocast


class NSAAux(NamedTuple):
    """What `nsa_attention` computed on the way.

    Fields:
        block_indices: int32 [Tq, Hk, topk].
        lse_cmp, lse_slc, lse_win: fp32 [Hq, Tq].
    """

    block_indices: Tensor
    lse_cmp: Tensor
    lse_slc: Tensor
    lse_win: Tensor


@overload
def nsa_attention(
    q: Tensor,
    k_cmp: KV,
    v_cmp: KV,
    k_slc: KV,
    v_slc: KV,
    k_win: KV,
    v_win: KV,
    gates: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    q_cmp: Tensor | None = None,
    scale: float | None = None,
    block_indices: Tensor | None = None,
    return_aux: Literal[False] = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def nsa_attention(
    q: Tensor,
    k_cmp: KV,
    v_cmp: KV,
    k_slc: KV,
    v_slc: KV,
    k_win: KV,
    v_win: KV,
    gates: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    q_cmp: Tensor | None = None,
    scale: float | None = None,
    block_indices: Tensor | None = None,
    return_aux: Literal[True],
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, NSAAux]: ...


def nsa_attention(
    q: Tensor,
    k_cmp: KV,
    v_cmp: KV,
    k_slc: KV,
    v_slc: KV,
    k_win: KV,
    v_win: KV,
    gates: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    q_cmp: Tensor | None = None,
    scale: float | None = None,
    block_indices: Tensor | None = None,
    return_aux: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, NSAAux]:
    """out = sum over c in (cmp, slc, win) of gate_c * attention(q, K_c, V_c) (Eq. 5).

    Under autocast as the attention operations (see `nsa.ops`): out has the region's dtype, whatever that of the gates.

    Args:
        q: [Tq, Hq, Dk].
        k_cmp, v_cmp: compressed already, [Tc, Hk, Dk] and [Tc, Hk, Dv]; `layout.compressed(blocks)` gives Tc.
        k_slc, v_slc, k_win, v_win: raw, [Tk, Hk, Dk] and [Tk, Hk, Dv]. Any of the six may be PagedKV.
        gates: [Tq, Hq, 3] in the order cmp, slc, win.
        layout: of the raw tokens.
        q_cmp: queries of the compressed branch and of the scores where they differ from q (positions rotated
            elsewhere, say); None is q.
        scale: of the logits; None is 1/sqrt(Dk).
        block_indices: blocks to attend to, instead of selecting them.
        return_aux: also return an `NSAAux`.
        deterministic: True asks for bitwise equal results across runs.
        backend: None follows the plan; a name is obeyed or raises.

    Returns:
        out [Tq, Hq, Dv], or (out, aux).

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.
        RuntimeError: no backend accepts the problem.

    Example:
        >>> import torch
        >>> layout, blocks = VarlenLayout.from_lengths([100, 7]), BlockGeometry(topk=3, window_size=16)
        >>> q, k, gates = torch.randn(107, 4, 8), torch.randn(107, 2, 8), torch.rand(107, 4, 3)
        >>> k_cmp = ops.compress_mean(k, layout, blocks)
        >>> nsa_attention(q, k_cmp, k_cmp, k, k, k, k, gates, layout, blocks).shape
        torch.Size([107, 4, 8])
    """
    # Once for all operations, whose own casts then find nothing to do.
    q, q_cmp, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = autocast(q, q_cmp, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
    check_layout(layout, blocks)
    check_rows("q", q, layout.total_q, layout)
    q_cmp = q if q_cmp is None else q_cmp
    check_rows("q_cmp", q_cmp, layout.total_q, layout)
    if q_cmp.shape != q.shape or q_cmp.dtype != q.dtype:
        raise ValueError(f"q_cmp: expected {q.dtype} {list(q.shape)} of q, got {q_cmp.dtype} {list(q_cmp.shape)}")
    check_attention(("k_cmp", "v_cmp"), q_cmp, k_cmp, v_cmp, layout.compressed(blocks).total, layout)
    check_attention(("k_slc", "v_slc"), q, k_slc, v_slc, layout.total_k, layout)
    check_attention(("k_win", "v_win"), q, k_win, v_win, layout.total_k, layout)
    heads = {name: heads_and_dim(x)[0] for name, x in (("k_cmp", k_cmp), ("k_slc", k_slc), ("k_win", k_win))}
    if len(set(heads.values())) > 1:
        raise ValueError(f"k_cmp, k_slc, k_win: expected the same number of kv heads, got {heads}")
    dims = {name: heads_and_dim(x)[1] for name, x in (("v_cmp", v_cmp), ("v_slc", v_slc), ("v_win", v_win))}
    if len(set(dims.values())) > 1:
        raise ValueError(f"v_cmp, v_slc, v_win: expected the same head_dim, got {dims}")
    check_gates(gates, {"q": q})
    if block_indices is not None:
        check_block_indices(block_indices, heads["k_slc"], layout)
    with judged_together():
        o_cmp, lse_cmp = ops.compressed_attention(
            q_cmp, k_cmp, v_cmp, layout, blocks, scale=scale, deterministic=deterministic, backend=backend
        )
        if block_indices is None:
            block_indices = ops.select_blocks(q_cmp, k_cmp, lse_cmp, layout, blocks, scale=scale, backend=backend)
        o_slc, lse_slc = ops.selected_attention(
            q, k_slc, v_slc, block_indices, layout, blocks, scale=scale, deterministic=deterministic, backend=backend
        )
        o_win, lse_win = ops.window_attention(
            q, k_win, v_win, layout, blocks, scale=scale, deterministic=deterministic, backend=backend
        )
        out = outcome(ops.combine(gates, o_cmp, o_slc, o_win, backend=backend))
    return (out, NSAAux(block_indices, lse_cmp, lse_slc, lse_win)) if return_aux else out
