"""What a test of a backend needs: inputs, all operations in one call, certified margins, error budgets, poison.

Any test framework will do. `BACKENDS` is what this package's semantics tests run over; a kernel package runs the same
checks over its own object with the same operations.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from nsa_varlen import masks, reference
from nsa_varlen.dense import DenseForms, masked_attention
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.paged import PagedKV
from nsa_varlen.sdpa import BACKEND, SdpaBackend


class DenseBackend(DenseForms, SdpaBackend):
    """The attention branches by `DenseForms` over `masked_attention`, everything else as sdpa."""

    name = "dense"


BACKENDS: dict[str, Any] = {"oracle": reference, "sdpa": BACKEND, "dense": DenseBackend(masked_attention)}
FP32 = 5e-5  # what an fp32 backend may be off by at unit-scale inputs
HALF_BUDGET = 2.0  # error of a half-precision backend over that of plain torch in the same dtype


class Inputs(NamedTuple):
    """Random arguments of every operation: q [Tq, Hq, Dk], k [Tk, Hk, Dk], v [Tk, Hk, Dv], gates [Tq, Hq, 3]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same values, rounded to `dtype`."""
        return Inputs(*(x.to(dtype) for x in self))

    def leaves(self) -> "Inputs":
        """Copies that record gradients."""
        return Inputs(*(x.detach().clone().requires_grad_() for x in self))


class Results(NamedTuple):
    """What `run_ops` returns: each branch's out [Tq, Hq, Dv] and lse [Hq, Tq], the choice, the combination."""

    k_cmp: Tensor
    v_cmp: Tensor
    o_cmp: Tensor
    lse_cmp: Tensor
    block_indices: Tensor
    o_slc: Tensor
    lse_slc: Tensor
    o_win: Tensor
    lse_win: Tensor
    out: Tensor


def random_inputs(
    layout: VarlenLayout,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    v_head_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Unit normal q, k, v and gates in (0, 1) on the layout's device; the values depend on the seed and sizes alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = (
        (layout.total_q, heads, head_dim),
        (layout.total_k, kv_heads, head_dim),
        (layout.total_k, kv_heads, head_dim if v_head_dim is None else v_head_dim),
        (layout.total_q, heads, 3),
    )
    q, k, v, gates = (torch.randn(size, generator=generator, dtype=torch.float64, device="cpu") for size in sizes)
    return Inputs(*(x.to(layout.device, dtype) for x in (q, k, v, gates.sigmoid())))


def run_ops(
    backend: Any,
    inputs: Inputs,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    scale: float | None = None,
    block_indices: Tensor | None = None,
) -> Results:
    """Every operation of `backend`, each on the results of those before it; k and v serve all three branches."""
    q, k, v, gates = inputs
    k_cmp, v_cmp = (backend.compress_mean(x, layout, blocks) for x in (k, v))
    o_cmp, lse_cmp = backend.compressed_attention(q, k_cmp, v_cmp, layout, blocks, scale=scale)
    if block_indices is None:
        block_indices = backend.select_blocks(q, k_cmp, lse_cmp, layout, blocks, scale=scale)
    o_slc, lse_slc = backend.selected_attention(q, k, v, block_indices, layout, blocks, scale=scale)
    o_win, lse_win = backend.window_attention(q, k, v, layout, blocks, scale=scale)
    out = backend.combine(gates, o_cmp, o_slc, o_win)
    return Results(k_cmp, v_cmp, o_cmp, lse_cmp, block_indices, o_slc, lse_slc, o_win, lse_win, out)


def to_pages(x: Tensor, lengths: Sequence[int], page_size: int, *, seed: int = 0) -> PagedKV:
    """Packed rows as shuffled pages of a pool with one page to spare; what no row fills is NaN."""
    counts = [-(-length // page_size) for length in lengths]
    generator = torch.Generator("cpu").manual_seed(seed)
    free = torch.randperm(sum(counts) + 1, generator=generator, device="cpu").tolist()
    pages = x.new_full((len(free), page_size, *x.shape[1:]), torch.nan)
    table = torch.full((len(counts), max(counts, default=0)), -1, dtype=torch.int32, device="cpu")
    start = 0
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for page in range(count):
            rows = min(page_size, length - page * page_size)
            table[sequence, page] = free.pop()
            pages[table[sequence, page], :rows] = x[start : start + rows]
            start += rows
    return PagedKV(pages, table.to(x.device), torch.tensor(lengths, dtype=torch.int32, device=x.device))


def selection_margin(
    q: Tensor, k_cmp: Tensor, layout: VarlenLayout, blocks: BlockGeometry, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """How safe a choice of blocks is, and against what: fp64 (margin, error) [Tq, Hk] each.

    `margin` is the gap between the scores of the last chosen and the first rejected block that is not forced (inf where
    nothing is rejected). `error` bounds the rounding error of one score computed in fp32. A row with
    margin > 2 * error has the same chosen set in every sound fp32 implementation.

    The bound, with u = 2^-24: a dot product of Dk terms, scaled, is off by at most (Dk + 2) u sum|q_i k_i| scale, the
    LSE by as much plus u (num_cmp + |lse|) for its sum and its logarithm; that is the relative error of each
    probability, to which exp, the sum over G heads and that over a block's l'/d + l/d - 1 terms add (G + terms + 2) u.
    Terms are not negative, so the error relative to the score stays that.
    """
    q, k_cmp = q.double(), k_cmp.double()
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, layout, blocks, scale=scale)
    scores = reference.block_scores(q, k_cmp, lse, layout, blocks, scale=scale)
    candidate, forced = (mask[:, None] for mask in masks.candidate_blocks(layout, blocks))
    free = (candidate & ~forced).expand_as(scores)
    ranked = torch.where(free, scores, -torch.inf).sort(-1, descending=True).values
    ranked = torch.nn.functional.pad(ranked, (0, 2), value=-torch.inf)
    places = (blocks.topk - forced.sum(-1)).clamp_max(ranked.shape[-1] - 2).expand(scores.shape[:2])
    last, first = (ranked.gather(-1, place[..., None])[..., 0] for place in ((places - 1).clamp_min(0), places))
    margin = torch.where((places > 0) & (first > -torch.inf), last - first, torch.inf)
    u = 2.0**-24
    group, terms = q.shape[1] // k_cmp.shape[1], (blocks.block_size + blocks.kernel_size) // blocks.kernel_stride - 1
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.abs().unflatten(1, (-1, group))
    products = torch.einsum("thgd,shd->thgs", grouped, k_cmp.abs()) * factor
    largest = torch.nn.functional.pad(products, (0, 1)).amax((-2, -1))
    lse_size = torch.where(lse.isinf(), 0.0, lse).abs().amax(0)[:, None] if lse.shape[0] else 0.0
    dots = 2 * (q.shape[-1] + 2) * largest
    relative = u * (dots + layout.compressed(blocks).max_seqlen + lse_size + group + terms + 2)
    return margin, relative * torch.nn.functional.pad(torch.where(free, scores, 0.0), (0, 1)).amax(-1)


def certified_inputs(
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    dtype: torch.dtype = torch.float64,
    first_seed: int = 0,
    tries: int = 200,
    **sizes: Any,
) -> tuple[Inputs, Tensor]:
    """(inputs, k_cmp) in `dtype` whose every row chooses with margin > 2 * error: no rounding can change an index.

    Seeds are tried in order from `first_seed`; `sizes` are those of `random_inputs`.

    Raises:
        ValueError: no seed of `tries` has the margin.
    """
    for seed in range(first_seed, first_seed + tries):
        inputs = random_inputs(layout, seed=seed, **sizes).to(dtype)
        k_cmp = reference.compress_mean(inputs.k.double(), layout, blocks).to(dtype)
        margin, error = selection_margin(inputs.q, k_cmp, layout, blocks)
        if bool((margin > 2 * error).all()):
            return inputs, k_cmp
    raise ValueError(f"tries: expected a seed with a certified margin among {tries}, got none")


class Bounds(NamedTuple):
    """Largest difference, max-abs, of two sound computations: outputs and k_cmp, v_cmp; LSEs; gradients."""

    values: float
    lse: float
    gradients: float


def rounding_bounds(inputs: Inputs, grad_out: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Bounds:
    """How far two fp64 computations of `run_ops` and its backward may lie apart, with the default scale.

    Worst case, from norms alone; gates lie in (0, 1), and one of the two rounds its LSEs to fp32. With u = 2^-53,
    K keys in a sequence, R = G * q_len rows that a key's gradient sums over, and |x| the largest norm of a row:

    - a = scale |q| |k| bounds the absolute terms of a logit, also over averaged keys: it is off by (Dk + l + 4) a u.
    - A weight takes at most topk + 4 exponentials, of arguments below 2a, counting rescalings to a new maximum and
      the LSE: each adds (2a + 4) u. The sum of weights adds 2K + 4. Numerator and denominator: the relative error of
      a probability is eps = 2 ((Dk + l + 4) a + (topk + 4) (2a + 4) + 2K + 4) u.
    - An output is a mean of values: |v| (eps + (K + l + 8) u), and there are three branches.
    - ds = p (do.v - do.o) is at most 2 p M, M = |do| |v|, and off by p M eta, eta = 3 eps + (K + 2l + 2 Dv + 14) u.
      dq = scale sum ds k, dk = scale sum ds q over R rows, dv = sum p do over R rows; their sums add 2 (K + R + 2) u.

    Both computations may be off: all is doubled.
    """
    q, k, v = (_largest_norm(x) for x in inputs[:3])
    scale, u = inputs.q.shape[-1] ** -0.5, 2.0**-53
    keys, rows = layout.max_seqlen_k, max(1, layout.max_seqlen_q * inputs.q.shape[1] // inputs.k.shape[1])
    a = scale * q * k
    eps = 2 * u * ((inputs.q.shape[-1] + blocks.kernel_size + 4) * a + (blocks.topk + 4) * (2 * a + 4) + 2 * keys + 4)
    values = 3 * max(k, v) * (eps + (keys + blocks.kernel_size + 8) * u)
    eta = 3 * eps + (keys + 2 * blocks.kernel_size + 2 * inputs.v.shape[-1] + 14 + 2 * (keys + rows + 2)) * u
    gradients = 3 * rows * max(1, scale * q, scale * k) * _largest_norm(grad_out) * max(1, v) * eta
    return Bounds(2 * values, 2 * eps + 2.0**-24 * (a + math.log(keys + 1)), 2 * gradients)


def _largest_norm(x: Tensor) -> float:
    return float(torch.nn.functional.pad(x.norm(dim=-1).flatten(), (0, 1)).amax())


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention over mask [Tq, Hk or 1, Tk] by plain torch, every step in the inputs' dtype: [Tq, Hq, Dv]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("thgd,shd->thgs", grouped, k) * scale
    hidden = ~mask[:, :, None]
    weights = torch.where(hidden.all(-1, keepdim=True), 0.0, logits.masked_fill(hidden, -torch.inf).softmax(-1))
    return torch.einsum("thgs,shd->thgd", weights, v).flatten(1, 2)


def gradients(run: Any, inputs: Sequence[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `inputs` after `grad_out` of what `run(*inputs)` returns: an output, or the first of several.

    Example:
        >>> gradients(lambda x: x * x, [torch.tensor([3.0])], torch.tensor([1.0]))
        (tensor([6.]),)
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, grad_out)


def gradient_bounds(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """How far dq, dk and dv of softmax attention over mask [Tq, Hk or 1, Tk] may be off in fp32: fp64, value by value.

    First order, worst case, doubled for what that leaves out; logits are those whose exponentials fp32 holds. Where a
    row or a key sees nothing the bound is 0. With u = 2^-24, K keys that a row sees, R rows that see a key:

    - a = scale |q|.|k|, the largest of a row, bounds the absolute terms of its logits: each is off by (Dk + 4) a u.
    - The LSE is off by as much, and by a sum of K terms and a rescaling for every 16 keys, 2a + 4 each. The argument of
      an exponential is rounded, at most |LSE| + a. Together the relative error of a probability p is
      eps = (2 (Dk + 5) a + K + (K / 16 + 1) (2a + 4) + 2 |LSE|) u.
    - S = |do|.|v| bounds do.v, off by Dv S u, and M = sum p S bounds do.out, off by M (eps + (K + Dv + 4) u).
      So ds = p (do.v - do.out) is at most p (S + M), and off by p (S + M) (2 eps + (K + Dv + 8) u).
    - dq = scale sum ds k over K keys, dk = scale sum ds q over R rows, dv = sum p do over R rows: terms of the size
      that they may have, and (K + 4) u or (R + 4) u for the sum.
    """
    scale, u = q.shape[-1] ** -0.5 if scale is None else scale, 2.0**-24
    k, v = k.double(), v.double()
    q, grad_out = (x.double().unflatten(1, (k.shape[1], -1)) for x in (q, grad_out))
    hidden = ~mask[:, :, None]
    sees, seen = (~hidden).sum(-1, keepdim=True), (~hidden).sum((0, 2)).T[..., None] * q.shape[2]
    logits = (torch.einsum("thgd,shd->thgs", q, k) * scale).masked_fill(hidden, -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    lse = torch.where(lse.isinf(), 0.0, lse)
    p = (logits - lse).exp()
    q, k, v, grad_out = (x.abs() for x in (q, k, v, grad_out))
    sizes = (torch.einsum("thgd,shd->thgs", q, k) * scale).masked_fill(hidden, 0.0)
    a = torch.nn.functional.pad(sizes, (0, 1)).amax(-1, keepdim=True)
    eps = u * (2 * (q.shape[-1] + 5) * a + sees + (sees / 16 + 1) * (2 * a + 4) + 2 * lse.abs())
    products = torch.einsum("thgd,shd->thgs", grad_out, v)
    ds = p * (products + (p * products).sum(-1, keepdim=True))
    off = ds * (2 * eps + u * (2 * sees + v.shape[-1] + 12))
    dq = torch.einsum("thgs,shd->thgd", off, k).flatten(1, 2)
    dk = torch.einsum("thgs,thgd->shd", off, q) + u * seen * torch.einsum("thgs,thgd->shd", ds, q)
    dv = torch.einsum("thgs,thgd->shd", p * (eps + 4 * u), grad_out)
    dv += u * seen * torch.einsum("thgs,thgd->shd", p, grad_out)
    return 2 * scale * dq, 2 * scale * dk, 2 * dv


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(max-abs, root mean square) of actual - exact, in fp64; (0, 0) for empty tensors."""
    difference = torch.nn.functional.pad((actual.double() - exact.double()).flatten(), (0, 1))
    return float(difference.abs().max()), float(difference.square().sum().div(max(1, exact.numel())).sqrt())


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "result") -> None:
    """Fail unless max-abs and RMS error of `actual` are at most twice those of `plain`, both against `exact`."""
    for kind, got, allowed in zip(("max-abs", "RMS"), errors(actual, exact), errors(plain, exact), strict=True):
        if not got <= HALF_BUDGET * allowed:
            raise AssertionError(f"{name}: {kind} error {got:.3e}, plain torch in {plain.dtype} has {allowed:.3e}")


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within, torch.empty, empty_like, empty_strided and Tensor.new_empty hold NaN (integers: their lowest value)."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x: Tensor = make(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(torch.nan)
            return x if x.dtype == torch.bool or x.is_complex() else x.fill_(torch.iinfo(x.dtype).min)

        return made

    with ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(patch.object(owner, name, poison(getattr(owner, name))))
        yield
