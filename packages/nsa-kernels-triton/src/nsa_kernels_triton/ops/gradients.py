"""What the backward of every attention begins with."""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.tiles import pieces


def keep(ctx: Any, qkv: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor], *others: Tensor | None) -> None:
    """Save for the backward: q, k, v, out, lse and others. lse carries no gradient."""
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*qkv, out, lse, *others)


def unwritten(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, not yet written."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def row_statistics(out: Tensor, grad_out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(delta, lse to base 2), fp32 [Tq, Hq]: see `kernels.gradients.delta_kernel`."""
    from nsa_kernels_triton.kernels.gradients import delta_kernel

    out = out.contiguous()
    total_q, num_heads, v_head_dim = out.shape
    delta, lse_2 = (out.new_empty(total_q, num_heads, dtype=torch.float32) for _ in "ab")
    v0, v1 = pieces(v_head_dim)
    config = launch("delta", out.device, row_bytes=(v0 + v1) * out.element_size())
    delta_kernel[(-(-total_q * num_heads // config["rows"]),)](
        *(out, grad_out, lse.contiguous(), delta, lse_2, total_q, num_heads, grad_out.stride(0), grad_out.stride(1)),
        DIM=v_head_dim,
        V0=v0,
        V1=v1,
        ROWS=config["rows"],
        **config.options,
    )
    return delta, lse_2
