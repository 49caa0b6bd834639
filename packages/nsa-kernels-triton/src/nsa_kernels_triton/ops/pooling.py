"""Mean pooling of tokens into compressed blocks."""

from typing import Any

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


@torch.library.custom_op("nsa_kernels_triton::compress_mean_backward", mutates_args=())
@on_device
def compress_mean_backward(
    grad_out: Tensor, cu_seqlens: Tensor, cu_compressed: Tensor, total: int, kernel_size: int, kernel_stride: int
) -> Tensor:
    """dx [total, H, D] of `compress_mean` from the gradient of its result."""
    from nsa_kernels_triton.kernels.pooling import compress_mean_backward_kernel

    grad_out = rows(grad_out)
    _, num_heads, head_dim = grad_out.shape
    dx = grad_out.new_empty(total, num_heads, head_dim)
    batch_size = cu_seqlens.shape[0] - 1
    config = launch("compress_mean", dx.device, head_dim=head_dim)
    if dx.numel():
        compress_mean_backward_kernel[count_tiles(total, batch_size, config["rows"]), num_heads](
            *(grad_out, dx, cu_seqlens, cu_compressed, batch_size, grad_out.stride(0), grad_out.stride(1), num_heads),
            KERNEL_SIZE=kernel_size,
            KERNEL_STRIDE=kernel_stride,
            DIM=head_dim,
            WIDTH=max(16, power_of_two(head_dim)),
            ROWS=config["rows"],
            **config.options,
        )
    return dx


@compress_mean_backward.register_fake
def _(
    grad_out: Tensor, cu_seqlens: Tensor, cu_compressed: Tensor, total: int, kernel_size: int, kernel_stride: int
) -> Tensor:
    return grad_out.new_empty(total, *grad_out.shape[1:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *offsets, _, kernel_size, kernel_stride = inputs
    ctx.save_for_backward(*offsets)
    ctx.rest = x.shape[0], kernel_size, kernel_stride


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return compress_mean_backward(grad_out, *ctx.saved_tensors, *ctx.rest), *[None] * 5


compress_mean.register_autograd(_backward, setup_context=_keep)
