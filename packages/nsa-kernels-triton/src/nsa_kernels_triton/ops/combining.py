"""The gated sum of the three branches."""

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
