"""A branch run on a kernel, with its gradients: what its calls read and write, and how much at a time."""

from typing import Any, NamedTuple

import torch
from nsa_varlen.autograd import first_derivative_only, outside_autocast
from torch import Tensor

from nsa_fa2.branches import Branch, Part
from nsa_fa2.kernel import MAX_SEQUENCES, Kernel
from nsa_fa2.rows import chunks

WORKSPACE = 2 << 30  # bytes of copies and results that live for one call of a kernel


def attention(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, branch: Branch, *, scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, Dv], lse fp32 [Hq, Tq] without gradient) of a branch. Differentiable in q, k and v.

    A call's copies and results, which live beside those of the branch, take at most WORKSPACE bytes or what one phase
    of the fold takes. Not counted: a window's, which has one call and copies only what is padded or not aligned, and
    what a kernel allocates for itself, such as FlashAttention-2's backward an fp32 dq.
    """
    return _Attention.apply(q, k, v, kernel, branch, scale, deterministic)


class _Call(NamedTuple):
    """One call of a kernel: a part of the branch, and which of its phases."""

    part: Part
    chosen: slice

    @property
    def copies(self) -> int:
        """Phases: as often does a call with folded queries need each key."""
        return self.chosen.stop - self.chosen.start

    def read(self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The call's rows of tensors that lie as q, then of those that lie as k."""
        rows = (self.part.queries.queries(x, self.chosen) for x in queries)
        return *rows, *(self.part.keys.keys(x, self.copies) for x in keys)

    @property
    def options(self) -> dict[str, Any]:
        """Who sees what."""
        return {"segments": self.part.segments, "causal": self.part.causal, "window": self.part.window}


class _Attention(torch.autograd.Function):
    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel: Kernel,
        branch: Branch,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        calls = _calls(branch, q, k, v, backward=any(ctx.needs_input_grad))
        run = _whole if branch.whole else _in_parts
        out, lse, raw = run(q, k, v, kernel, branch, calls, scale)
        # The kernel's own lse, by which it knows rows that see no key, is not the branch's.
        ctx.save_for_backward(q, k, v, out, *raw)
        ctx.kernel, ctx.branch, ctx.calls = kernel, branch, calls
        ctx.options = {"scale": scale, "deterministic": deterministic}
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    @outside_autocast
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *raw = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        if ctx.branch.whole:
            ((call,), (lse,)) = ctx.calls, raw
            grad, q_rows, out_rows, k_rows, v_rows = call.read((grad_out, q, out), (k, v))
            grads = ctx.kernel.backward(grad, q_rows, k_rows, v_rows, out_rows, lse, **call.options, **ctx.options)
            dq, dk, dv = (x.reshape(y.shape) for x, y in zip(grads, (q, k, v), strict=True))
            return dq, dk, dv, None, None, None, None
        dq = torch.empty_like(q)
        if ctx.branch.blind is not None:
            ctx.branch.blind.fill(dq, 0.0)
        # Many calls' and phases' parts of a key's gradient meet here: they are added in fp32 and rounded once.
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        for call, lse in zip(ctx.calls, raw, strict=True):
            grad, q_rows, out_rows, k_rows, v_rows = call.read((grad_out, q, out), (k, v))
            grads = ctx.kernel.backward(grad, q_rows, k_rows, v_rows, out_rows, lse, **call.options, **ctx.options)
            call.part.queries.put(dq, grads[0], call.chosen)
            call.part.keys.add(dk, grads[1], call.copies)
            call.part.keys.add(dv, grads[2], call.copies)
            del grad, q_rows, out_rows, k_rows, v_rows, grads  # before the next ones are made
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _whole(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, branch: Branch, calls: list[_Call], scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, the kernel's lse): what the only call gives, as it lies."""
    (call,) = calls
    q_rows, k_rows, v_rows = call.read((q,), (k, v))
    out, raw = kernel.forward(q_rows, k_rows, v_rows, **call.options, scale=scale)
    # Tensors of their own, neither views nor the kernel's lse, so that callers may write into them.
    lse = raw.mT.reshape(q.shape[:2]).T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if branch.blind is not None:
        branch.blind.fill(lse.T, -torch.inf)
    out = torch.ops.aten._unsafe_view(out.contiguous(), (*q.shape[:2], v.shape[-1]))
    return out, lse, [raw]


def _in_parts(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, branch: Branch, calls: list[_Call], scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, the kernel's lse of each call)."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    raw = []
    for call in calls:
        q_rows, k_rows, v_rows = call.read((q,), (k, v))
        part_out, part_lse = kernel.forward(q_rows, k_rows, v_rows, **call.options, scale=scale)
        call.part.queries.put(out, part_out, call.chosen)
        call.part.queries.put(lse.T, part_lse.mT, call.chosen)
        raw.append(part_lse)
        del q_rows, k_rows, v_rows, part_out  # before the next ones are made
    if branch.blind is not None:  # calls of a window have such rows too, and give them an lse of their own
        branch.blind.fill(out, 0.0)
        branch.blind.fill(lse.T, -torch.inf)
    return out, lse, raw


def _calls(branch: Branch, q: Tensor, k: Tensor, v: Tensor, *, backward: bool) -> list[_Call]:
    """The calls of a branch; of folded queries as many phases at a time as WORKSPACE and a CUDA grid allow.

    Forward and backward take the same: what a call's backward needs of its forward, its lse, is in the call's form.
    """
    num_heads, num_kv_heads, dim = q.shape[1], k.shape[1], max(q.shape[2], v.shape[2])
    pads = q.shape[2] != v.shape[2]  # then kernels copy what they pad
    calls = []
    for part in branch.parts:
        phases = part.queries.phases
        per_row = num_heads * dim  # out, or dq
        if part.queries.copied or pads:  # q; or q, out and its gradient
            per_row += num_heads * dim * (3 if backward else 1)
        per_key = num_kv_heads * dim * (4 if backward else 2)  # k and v, or they and their gradients
        size = (len(part.queries) * per_row + len(part.keys) * per_key) * q.element_size()  # of a phase
        most = max(1, min(WORKSPACE // max(1, size), MAX_SEQUENCES // num_heads))
        calls += [_Call(part, chosen) for chosen in chunks(phases, -(-phases // most))]
    return calls
