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
        if k.shape[1] == 1:
            return _one_key(q, k, v, scale)
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
        grad_out, q, k, *_ = tensors
        _check(q, k, segments, causal, window)
        if k.shape[1] == 1:
            return _one_key_backward(grad_out, q, k)
        heads_first = (x.transpose(1, 2) for x in tensors)
        no_dropout = [torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2)]
        # no bias, no offsets of sequences
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(*heads_first, lse[..., None], *no_dropout, None, None, None, q.shape[1], k.shape[1], 0.0, causal),
            scale=scale,
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


def _one_key(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) where there is one key: its value. cuDNN refuses a call of one query over one key, or worse."""
    key, value = (x.expand(-1, q.shape[1], -1, -1)[:, :, :, None] for x in (k, v))  # [b, Sq, h, 1, D]
    lse = (q.unflatten(2, (k.shape[2], -1)).float() * key.float()).sum(-1).mul_(scale)
    return value.expand(-1, -1, -1, lse.shape[3], -1).flatten(2, 3), lse.flatten(2).transpose(1, 2)


def _one_key_backward(grad_out: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight of 1 whatever q and k are: they have no gradient, and v has the sum of its group's."""
    dq, dk = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dv = grad_out.unflatten(2, (k.shape[2], -1)).sum((1, 3), dtype=torch.float32)[:, None]
    return dq, dk, dv.to(k.dtype)


def is_known() -> bool:
    """Whether this torch's operation is the one that this module calls: torch 2.4 has another."""
    schema = torch.ops.aten._scaled_dot_product_cudnn_attention.default._schema
    return any(argument.name == "compute_log_sumexp" for argument in schema.arguments)


def _check(q: Tensor, k: Tensor, segments: Segments | None, causal: bool, window: int | None) -> None:
    assert segments is None, "a packed call"
    assert window is None, "a window"
    assert not causal or q.shape[1] == k.shape[1], "a causal call with more keys than queries"
