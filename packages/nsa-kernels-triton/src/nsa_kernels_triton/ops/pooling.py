"""Mean pooling of tokens into compressed blocks."""

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.ops.launching import on_device, rows
from nsa_kernels_triton.tiles import count_tiles, power_of_two


@torch.library.custom_op("nsa_kernels_triton::compress_mean", mutates_args=())
@on_device
def compress_mean(
    x: Tensor, cu_seqlens: Tensor, cu_compressed: Tensor, total: int, kernel_size: int, kernel_stride: int
) -> Tensor:
    """x [Tk, H, D] -> [total, H, D]: see `TritonBackend.compress_mean`."""
    from nsa_kernels_triton.kernels.pooling import compress_mean_kernel

    x = rows(x)
    _, num_heads, head_dim = x.shape
    out = x.new_empty(total, num_heads, head_dim)
    batch_size = cu_seqlens.shape[0] - 1
    config = launch("compress_mean", x.device, head_dim=head_dim)
    grid = count_tiles(total, batch_size, config["rows"]), num_heads
    if out.numel():
        compress_mean_kernel[grid](
            *(x, out, cu_seqlens, cu_compressed, batch_size, x.stride(0), x.stride(1), num_heads),
            KERNEL_SIZE=kernel_size,
            KERNEL_STRIDE=kernel_stride,
            DIM=head_dim,
            WIDTH=max(16, power_of_two(head_dim)),
            ROWS=config["rows"],
            **config.options,
        )
    return out


@compress_mean.register_fake
def _(x: Tensor, cu_seqlens: Tensor, cu_compressed: Tensor, total: int, kernel_size: int, kernel_stride: int) -> Tensor:
    return x.new_empty(total, *x.shape[1:])
