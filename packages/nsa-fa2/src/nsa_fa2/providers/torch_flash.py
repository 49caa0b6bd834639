"""The FlashAttention-2 that torch ships."""

from functools import cache

import torch
from torch import Tensor

from nsa_fa2.kernel import Limits, Segments
from nsa_fa2.providers.shapes import FittedKernel


class TorchFlash(FittedKernel):
    """torch's aten operations, which `torch.nn.attention.varlen` calls too.

    Their backward is deterministic under `torch.use_deterministic_algorithms` only: a switch of the whole process,
    which a single call must not turn. It also copies out and its gradient unless they are contiguous.
    """

    limits = Limits(interleaved=False)

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
        check_built()
        left, right = (None, None) if window is None else (window - 1, 0)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, *_shape(q, k, segments)),
            *(0.0, causal, False),  # dropout, causal, return the weights
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse

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
        grad_out, q, k, v, out = tensors
        left, right = (None, None) if window is None else (window - 1, 0)
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            *(grad_out, q, k, v, out, lse, *_shape(q, k, segments)),
            *(0.0, causal, *no_dropout),
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )


def _shape(q: Tensor, k: Tensor, segments: Segments | None) -> Segments | tuple[None, None, int, int]:
    return (None, None, q.shape[1], k.shape[1]) if segments is None else segments


def is_known() -> bool:
    """Whether this torch's operations are those that this module calls: windows, and an lse of packed calls [H, Tq].

    Until torch 2.6 the latter is padded; the name of another result tells.
    """
    schema = torch.ops.aten._flash_attention_forward.default._schema
    windows = any(argument.name == "window_size_left" for argument in schema.arguments)
    return windows and schema.returns[2].name == "rng_state"


@cache
def check_built() -> None:
    """Raise unless this torch was built with FlashAttention.

    Raises:
        RuntimeError: it was not, in words that routing takes for a kernel that does not compile.
    """
    if not torch.backends.cuda.is_flash_attention_available():
        raise RuntimeError(f"torch {torch.__version__} was built without a kernel of FlashAttention")
