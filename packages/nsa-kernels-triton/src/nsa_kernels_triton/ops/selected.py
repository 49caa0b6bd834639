"""Selected attention in one of two organisations, chosen by data: `configurations`, table `selected_attention`.

Query by query (`ops.by_query`): neighbouring queries share the blocks that they chose. For large groups, and wherever
neighbours choose much the same. Block by block (`ops.by_block`): the queries that chose a block attend to it as one
dense tile. For small groups, whose few rows would leave the tensor cores idle.

How much neighbours share is measured on the device (`ops.spread`) and known to a later call, so that nobody waits.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.ops.by_block import by_block
from nsa_kernels_triton.ops.by_query import by_query
from nsa_kernels_triton.ops.gradients import keep
from nsa_kernels_triton.ops.launching import on_device
from nsa_kernels_triton.ops.selected_call import SelectedCall
from nsa_kernels_triton.ops.selected_gradients import selected_attention_backward
from nsa_kernels_triton.ops.spread import Spread, spread_of


@torch.library.custom_op("nsa_kernels_triton::selected_attention", mutates_args=())
@on_device
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, Dv], lse [Hq, Tq]): see `TritonBackend.selected_attention`.

    `deterministic` leaves what was measured out of the choice: it may differ between runs.
    """
    call = SelectedCall(q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, block_size, scale)
    if call.lse.numel() == 0 or call.num_slots == 0:
        return call.out.zero_(), call.lse.fill_(-torch.inf)
    spread = Spread() if deterministic else spread_of(call.indices, block_size)
    config = launch("selected_attention", q.device, spread=spread.percent, **call.case)
    if config["by_block"]:
        by_block(call, config)
    else:
        by_query(call, config)
    if not deterministic:
        spread.measure(call.indices, call.cu_seqlens_q, call.cu_seqlens_k, block_size)
    return call.out, call.lse


@selected_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[2]), lse


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, *offsets = inputs[:6]
    keep(ctx, (q, k, v), output, block_indices, *offsets)
    ctx.rest = inputs[6:]


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *selected_attention_backward(grad_out, *ctx.saved_tensors, *ctx.rest), *[None] * 6


selected_attention.register_autograd(_backward, setup_context=_keep)
