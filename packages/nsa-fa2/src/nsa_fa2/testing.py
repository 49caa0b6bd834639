"""A kernel in plain torch, in the place of a provider's: what is left to go wrong is what this package does itself.

`Case` asks an operation of a backend and holds the answer against the oracle's.
"""

from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.testing import Inputs, poisoned_empty, random_inputs, rounding_bounds
from torch import Tensor

from nsa_fa2.backend import FlashBackend
from nsa_fa2.kernel import Limits, Segments

ANYTHING = Limits(
    devices=("cpu", "cuda"),
    dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    max_head_dim=1 << 20,
    head_dim_multiple=1,
    deterministic_gradients=True,
)
# As cuDNN, which takes no windows and no packed batches.
DENSE_ONLY = Limits(**{**ANYTHING.__dict__, "windows": False, "ragged": False})


class Called(NamedTuple):
    """A call of a kernel: the shape of q, whether it was packed, its mask."""

    shape: tuple[int, ...]
    packed: bool
    causal: bool
    window: int | None


class PlainKernel:
    """A `Kernel` from the definition, one sequence at a time, in the inputs' dtype; it remembers its forward calls.

    As FlashAttention-2, it marks rows that see no key by an lse of +inf, and reads nothing of a segment but its rows. A
    call that `limits` do not allow is an AssertionError: not for users, but for the code that makes calls.

    Example:
        >>> q, kernel = torch.zeros(1, 2, 1, 4), PlainKernel()
        >>> out, lse = kernel.forward(q, q, torch.ones(1, 2, 1, 3), None, scale=1.0, causal=True, window=None)
        >>> out.shape, lse.exp().tolist()
        (torch.Size([1, 2, 1, 3]), [[[1.0, 2.0]]])
    """

    def __init__(self, limits: Limits = ANYTHING) -> None:
        self.limits = limits
        self.calls: list[Called] = []

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments | None,
        *,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`."""
        self._check(q, k, v, segments, causal, window)
        self.calls.append(Called(tuple(q.shape), segments is not None, causal, window))
        out, lse = q.new_full((*q.shape[:-1], v.shape[-1]), torch.nan), q.new_full(q.shape[:-1], torch.nan)
        for rows, keys in _sequences(q, k, segments):
            weights, lse[rows] = _softmax(q[rows], k[keys], scale, causal, window)
            out[rows] = torch.einsum("hgqk,khd->qhgd", weights, v[keys]).flatten(1, 2)
        return out, lse.mT.contiguous()

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments | None,
        *,
        scale: float,
        causal: bool,
        window: int | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Kernel.backward`, from `out` and `lse` as they are given."""
        self._check(q, k, v, segments, causal, window)
        dq, dk, dv = (torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = (grad_out * out).sum(-1)
        for rows, keys in _sequences(q, k, segments):
            group = q.shape[-2] // k.shape[-2]
            logits = _logits(q[rows], k[keys], scale, causal, window)
            grad, q_rows = (x[rows].unflatten(1, (-1, group)) for x in (grad_out, q))
            row_lse, row_delta = (x.unflatten(0, (-1, group))[..., None] for x in (lse.mT[rows].T, delta[rows].T))
            weights = (logits - row_lse).exp()
            d_logits = weights * (torch.einsum("qhgd,khd->hgqk", grad, v[keys]) - row_delta)
            dv[keys] = torch.einsum("hgqk,qhgd->khd", weights, grad)
            dq[rows] = scale * torch.einsum("hgqk,khd->qhgd", d_logits, k[keys]).flatten(1, 2)
            dk[keys] = scale * torch.einsum("hgqk,qhgd->khd", d_logits, q_rows)
        return dq, dk, dv

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, causal: bool, window: int | None
    ) -> None:
        assert q.ndim == (4 if segments is None else 3)
        assert k.shape[:-1] == v.shape[:-1]
        assert k.shape[-1] == q.shape[-1]
        assert q.shape[-2] % k.shape[-2] == 0
        assert window is None or (causal and self.limits.windows)
        if segments is None:
            assert q.shape[0] == k.shape[0]
            assert self.limits.ragged or not causal or q.shape[1] == k.shape[1]
            return
        assert self.limits.ragged
        for offsets, longest, rows in zip(segments[:2], segments[2:], (len(q), len(k)), strict=True):
            lengths = offsets.diff()
            assert offsets.dtype == torch.int32
            assert (int(offsets[0]), int(offsets[-1])) == (0, rows)
            assert bool((lengths >= 0).all() & (lengths <= longest).all())
        assert segments.longest_q > 1 or bool((segments.offsets_q.diff() == 1).all())


class Case(NamedTuple):
    """Arguments of an attention operation, and a gradient of its output.

    Fields:
        k, v: of the compressed branch, its blocks.
        rest: what comes between them and the options: block_indices where the operation takes them, layout, blocks.

    Example:
        >>> case = Case.random("window_attention", VarlenLayout.from_lengths([3, 5]), BlockGeometry())
        >>> case.assert_oracles(plain_backend())
        >>> list(case.run(reference))
        ['out', 'lse', 'dq', 'dk', 'dv']
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    rest: tuple[Any, ...]
    grad_out: Tensor

    @classmethod
    def random(
        cls,
        op: str,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        block_indices: Tensor | None = None,
        entries: int = 5,
        seed: int = 0,
        **sizes: Any,
    ) -> Self:
        """Unit normal in fp64; `entries` blocks of any number, -1 and some too large among them, unless given.

        `seed` and `sizes` as `nsa_varlen.testing.random_inputs`.
        """
        q, k, v, gates = random_inputs(layout, seed=seed, **sizes)
        generator = torch.Generator().manual_seed(seed)
        rest: tuple[Any, ...] = layout, blocks
        if op == "compressed_attention":  # there are no more blocks than keys
            k, v = (x[: layout.compressed(blocks).total] for x in (k, v))
        if op == "selected_attention":
            if block_indices is None:
                size, end = (layout.total_q, k.shape[1], entries), blocks.num_blocks(layout.max_seqlen_k) + 2
                block_indices = torch.randint(-1, end, size, generator=generator, dtype=torch.int32)
            rest = block_indices, *rest
        shape = *gates.shape[:2], v.shape[-1]
        return cls(op, q, k, v, rest, torch.randn(shape, generator=generator, dtype=q.dtype))

    def run(self, backend: Any, **options: Any) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv."""
        leaves = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        out, lse = getattr(backend, self.op)(*leaves, *self.rest, **options)
        assert not lse.requires_grad
        out.backward(self.grad_out)
        return {"out": out.detach(), "lse": lse, **{f"d{n}": x.grad for n, x in zip("qkv", leaves, strict=True)}}

    def assert_oracles(self, backend: Any, note: object = "", **options: Any) -> None:
        """Fail unless all that `run` gives is the oracle's, with memory poisoned; `scale` at most the default."""
        with poisoned_empty():
            got = self.run(backend, **options)
        self.assert_close(got, self.run(reference, **options), note)
        assert got["lse"].dtype == torch.float32

    def assert_close(self, got: dict[str, Tensor], expected: dict[str, Tensor], note: object = "") -> None:
        """Fail unless two results in fp64 differ by rounding at most. See `rounding_bounds`, which is of all branches.

        It takes k and v for raw keys, whose averages the compressed ones are: here they are those averages themselves.
        """
        layout, blocks = self.rest[-2:]
        bounds = rounding_bounds(Inputs(self.q, self.k, self.v, self.q), self.grad_out, layout, blocks)
        allowed = {"out": bounds.values, "lse": bounds.lse}
        for name, x in got.items():
            atol = allowed.get(name, bounds.gradients)
            if not torch.allclose(x.double(), expected[name].double(), rtol=0, atol=atol):
                raise AssertionError(f"{name} of {self.op} {note}: got {x}, expected {expected[name]} within {atol}")


def plain_backend(name: str = "plain", limits: Limits = ANYTHING) -> FlashBackend:
    """A backend over a `PlainKernel`, for any machine."""
    return FlashBackend(name, PlainKernel(limits), lambda environment: None)


def _sequences(q: Tensor, k: Tensor, segments: Segments | None) -> list[tuple[slice | int, slice | int]]:
    """Where the rows and the keys of each sequence are."""
    if segments is None:
        return [(number, number) for number in range(q.shape[0])]
    return [
        (slice(*rows), slice(*keys))
        for rows, keys in zip(*(pairwise(x.tolist()) for x in segments[:2]), strict=True)
        if rows[0] < rows[1] or keys[0] < keys[1]
    ]


def _logits(q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    """q [Sq, H, D], k [Sk, h, D] -> [h, H // h, Sq, Sk], -inf where a query does not look."""
    logits = torch.einsum("qhgd,khd->hgqk", q.unflatten(1, (k.shape[1], -1)), k) * scale
    position = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0], device=q.device)
    hidden = (key > position) if causal else torch.zeros_like(key > position)
    if window is not None:
        hidden = hidden | (key <= position - window)
    return logits.masked_fill(hidden, -torch.inf)


def _softmax(q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """(weights [h, H // h, Sq, Sk], lse [Sq, H])."""
    logits = _logits(q, k, scale, causal, window)
    lse = logits.logsumexp(-1) if k.shape[0] else logits.new_full(logits.shape[:-1], -torch.inf)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return (logits - lse[..., None]).exp(), lse.flatten(0, 1).T
