"""Whether what is timed is right: some query rows of a long sequence held against the oracle in fp64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nsa_varlen import masks, reference
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.testing import FP32, HALF_BUDGET, assert_within_budget, errors, plain_attention, selection_margin

ROWS = 64  # queries looked at of a sequence: its last ones


def within(actual: Tensor, plain: Callable[[], Tensor], exact: Tensor, name: str) -> str:
    """How far a result is off, in words.

    Args:
        plain: the same by plain torch in the dtype of `actual`; asked for in half precision, where it sets the budget.

    Raises:
        AssertionError: further than the dtype allows.
    """
    if not bool(torch.isfinite(actual).all()):
        raise AssertionError(f"{name}: expected finite values, got others")
    error, _ = errors(actual, exact)
    if actual.dtype in (torch.float32, torch.float64):
        if not error <= FP32:
            raise AssertionError(f"{name}: max-abs error {error:.1e}, expected at most {FP32:.0e}")
        return f"{name} off by {error:.1e} of {FP32:.0e}"
    made = plain()
    assert_within_budget(actual, made, exact, name)
    return f"{name} off by {error:.1e} of {HALF_BUDGET * errors(made, exact)[0]:.1e}"


def attended(
    q: Tensor,
    kv: Sequence[Tensor],
    gates: Tensor,
    indices: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    dtype: torch.dtype,
) -> Tensor:
    """The three branches over rows k and v of cmp, slc and win, combined: the oracle in fp64, else plain torch."""
    q, gates, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = (x.to(dtype) for x in (q, gates, *kv))
    if dtype == torch.float64:
        o_cmp, _ = reference.compressed_attention(q, k_cmp, v_cmp, layout, blocks)
        o_slc, _ = reference.selected_attention(q, k_slc, v_slc, indices, layout, blocks)
        o_win, _ = reference.window_attention(q, k_win, v_win, layout, blocks)
        return reference.combine(gates, o_cmp, o_slc, o_win)
    o_cmp = plain_attention(q, k_cmp, v_cmp, masks.compressed_mask(layout, blocks)[:, None])
    o_slc = plain_attention(q, k_slc, v_slc, masks.selected_mask(indices, layout, blocks))
    o_win = plain_attention(q, k_win, v_win, masks.window_mask(layout, blocks)[:, None])
    return torch.einsum("thc,cthd->thd", gates, torch.stack((o_cmp, o_slc, o_win)))


def check_chosen(
    indices: Tensor, q: Tensor, k_cmp: Tensor, layout: VarlenLayout, blocks: BlockGeometry, about: str
) -> None:
    """Block indices int32 [Tq, Hk, topk] of one sequence are the oracle's wherever the margin is certified.

    Elsewhere the scores of the chosen ones sum up to no less than those of the oracle's, within their error.

    Raises:
        AssertionError: a row's choice is neither.
    """
    exact = q.double(), k_cmp.double()
    _, lse = reference.compressed_attention(*exact, exact[1], layout, blocks)
    expected = reference.select_blocks(*exact, lse, layout, blocks)
    different = (indices != expected).any(-1)
    if not bool(different.any()):
        return
    margin, error = selection_margin(q, k_cmp, layout, blocks)
    scores = reference.block_scores(*exact, lse, layout, blocks)
    candidate, forced = masks.candidate_blocks(layout, blocks)
    for row, head in different.nonzero().tolist():
        numbers, must = ({*mask[row].nonzero()[:, 0].tolist()} for mask in (candidate, forced))
        found, wanted = ([block for block in x[row, head].tolist() if block != -1] for x in (indices, expected))
        legal = found == sorted(set(found) & numbers) and len(found) == len(wanted) and must <= set(found)
        allowed = 2 * blocks.topk * error[row, head]
        close = legal and scores[row, head, found].sum() >= scores[row, head, wanted].sum() - allowed
        if margin[row, head] > 2 * error[row, head] or not close:
            raise AssertionError(f"block_indices of {about}, row {row}, kv head {head}: expected {wanted}, got {found}")


def check_pooled(rows: Tensor, raw: Tensor, blocks: BlockGeometry, name: str) -> None:
    """Compressed rows [num_cmp(S), Hk, D] are means of raw ones [S, Hk, D], summed in fp32 and rounded once.

    Raises:
        AssertionError: a value is off by more than that.
    """
    layout = VarlenLayout.from_lengths([len(raw)], device=raw.device)
    exact = reference.compress_mean(raw.double(), layout, blocks)
    summed = blocks.kernel_size * 2.0**-24 * float(raw.abs().max())
    allowed = summed + torch.finfo(rows.dtype).eps / 2 * (exact.abs() + summed)
    if rows.shape != exact.shape or not bool(((rows - exact).abs() <= allowed).all()):
        raise AssertionError(f"{name}: expected the means of {blocks.kernel_size} rows, got others")


def check_rows(
    out: Tensor,
    indices: Tensor,
    q: Tensor,
    kv: Sequence[Tensor],
    gates: Tensor,
    blocks: BlockGeometry,
    about: str,
) -> str:
    """The last Tq queries of one sequence: their choice, then what all three branches make of it.

    Args:
        out [Tq, Hq, Dv], indices int32 [Tq, Hk, topk]: what is checked.
        kv: rows k and v of cmp, slc and win of the whole sequence.

    Raises:
        AssertionError: either is wrong.
    """
    layout = VarlenLayout.from_lengths([len(q)], [len(kv[2])], q.device)
    check_chosen(indices, q, kv[0], layout, blocks, about)
    exact = attended(q, kv, gates, indices, layout, blocks, torch.float64)
    return within(out, lambda: attended(q, kv, gates, indices, layout, blocks, out.dtype), exact, f"out of {about}")
