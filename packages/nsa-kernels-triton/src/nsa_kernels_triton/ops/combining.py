"""The gated sum of the three branches."""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.ops.launching import on_device, rows
from nsa_kernels_triton.tiles import power_of_two


@torch.library.custom_op("nsa_kernels_triton::combine", mutates_args=())
@on_device
def combine(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
    """gates [Tq, Hq, 3], o_c [Tq, Hq, Dv] -> [Tq, Hq, Dv]: see `TritonBackend.combine`."""
    from nsa_kernels_triton.kernels.combining import combine_kernel

    o_cmp, o_slc, o_win = rows(o_cmp), rows(o_slc), rows(o_win)
    total_q, num_heads, v_head_dim = o_cmp.shape
    out = o_cmp.new_empty(total_q, num_heads, v_head_dim)
    if not out.numel():
        return out
    width = max(16, power_of_two(v_head_dim))
    config = launch("combine", out.device, row_bytes=width * out.element_size())
    total = total_q * num_heads
    grid = (-(-total // config["rows"]),)
    combine_kernel[grid](
        *(gates, o_cmp, o_slc, o_win, out, total, num_heads, *gates.stride()),
        *(o_cmp.stride(0), o_cmp.stride(1), o_slc.stride(0), o_slc.stride(1), o_win.stride(0), o_win.stride(1)),
        DIM=v_head_dim,
        WIDTH=width,
        ROWS=config["rows"],
        **config.options,
    )
    return out


@combine.register_fake
def _(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
    return o_cmp.new_empty(o_cmp.shape)


@torch.library.custom_op("nsa_kernels_triton::combine_backward", mutates_args=())
@on_device
def combine_backward(
    grad_out: Tensor, gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the arguments of `combine`, after that of its result."""
    from nsa_kernels_triton.kernels.combining import combine_backward_kernel

    grad_out, o_cmp, o_slc, o_win = rows(grad_out), rows(o_cmp), rows(o_slc), rows(o_win)
    total_q, num_heads, v_head_dim = o_cmp.shape
    made = _gradients(gates, o_cmp, o_slc, o_win)
    if not gates.numel():
        return made
    width = max(16, power_of_two(v_head_dim))
    config = launch("combine", o_cmp.device, row_bytes=width * o_cmp.element_size())
    total = total_q * num_heads
    combine_backward_kernel[(-(-total // config["rows"]),)](
        *(grad_out, gates, o_cmp, o_slc, o_win, *made, total, num_heads),
        *(grad_out.stride(0), grad_out.stride(1), *gates.stride()),
        *(o_cmp.stride(0), o_cmp.stride(1), o_slc.stride(0), o_slc.stride(1), o_win.stride(0), o_win.stride(1)),
        DIM=v_head_dim,
        WIDTH=width,
        ROWS=config["rows"],
        **config.options,
    )
    return made


@combine_backward.register_fake
def _(
    grad_out: Tensor, gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(gates, o_cmp, o_slc, o_win)


def _gradients(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of gates and the branches, not yet written."""
    d_gates, d_cmp, d_slc, d_win = (x.new_empty(x.shape) for x in (gates, o_cmp, o_slc, o_win))
    return d_gates, d_cmp, d_slc, d_win


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    return combine_backward(grad_out, *ctx.saved_tensors)


combine.register_autograd(_backward, setup_context=_keep)
