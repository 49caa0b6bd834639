"""cuDNN's attention, through torch."""

import torch
from torch import Tensor

from nsa_fa2.kernel import Limits, Segments
from nsa_fa2.providers.shapes import FittedKernel


class Cudnn(FittedKernel):
    """torch's aten operations over cuDNN. They know no windows, and of causal masks the top-left one: where there are
    as many queries as keys it is the bottom-right one.
    """

    limits = Limits(max_head_dim=128, windows=False, ragged=False)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments | None,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        _check(q, k, segments, causal, window)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        # no bias, with lse, no dropout, causal, without the weights
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse.reshape(lse.shape[:3])

    def _backward(
        self,
        tensors: tuple[Tensor, ...],
        lse: Tensor,
        segments: Segments | None,
        scale: float,
        causal: bool,
        window: int | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, q, k, *_ = tensors
        _check(q, k, segments, causal, window)
        heads_first = (x.transpose(1, 2) for x in tensors)
        no_dropout = [torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2)]
        # no bias, no offsets of sequences
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(*heads_first, lse[..., None], *no_dropout, None, None, None, q.shape[1], k.shape[1], 0.0, causal),
            scale=scale,
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


def is_known() -> bool:
    """Whether this torch's operation is the one that this module calls: torch 2.4 has another."""
    schema = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema
    return any(argument.name == "compute_log_sumexp" for argument in schema.arguments)


def _check(q: Tensor, k: Tensor, segments: Segments | None, causal: bool, window: int | None) -> None:
    assert segments is None, "a packed call"
    assert window is None, "a window"
    assert not causal or q.shape[1] == k.shape[1], "a causal call with more keys than queries"
