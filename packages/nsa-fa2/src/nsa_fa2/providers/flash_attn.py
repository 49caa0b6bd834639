"""FlashAttention-2 by the package flash-attn, imported when it first runs."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from nsa_fa2.kernel import Limits, Segments
from nsa_fa2.providers.built import computes
from nsa_fa2.providers.shapes import FittedKernel

NO_WINDOW = -1


class FlashAttn(FittedKernel):
    """The kernels of flash-attn 2.8."""

    limits = Limits(deterministic_gradients=True)

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
        check_built(q.shape[-1], q.dtype, q.device, windowed=window is not None)
        return _forward(q, k, v, segments, scale, causal, window)

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
        flash = _interface()
        grad_out, q, k, v, out = tensors
        # Of expanded keys one gradient for each time they are read: not `empty_like`, which keeps no such strides.
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        left, right = (NO_WINDOW, NO_WINDOW) if window is None else (window - 1, 0)
        # dropout, scale, causal, window, softcap, ALiBi slopes, deterministic
        options = (0.0, scale, causal, left, right, 0.0, None, deterministic)
        if segments is None:
            flash._wrapped_flash_attn_backward(grad_out, q, k, v, out, lse, *grads, *options)
        else:
            flash._wrapped_flash_attn_varlen_backward(grad_out, q, k, v, out, lse, *grads, *segments, *options)
        dq, dk, dv = grads
        return dq, dk, dv


def _forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    flash = _interface()
    left, right = (NO_WINDOW, NO_WINDOW) if window is None else (window - 1, 0)
    options = (0.0, scale, causal, left, right, 0.0, None, False)  # ... softcap, ALiBi slopes, return the weights
    if segments is None:
        out, lse, *_ = flash._wrapped_flash_attn_forward(q, k, v, *options)
    else:
        out, lse, *_ = flash._wrapped_flash_attn_varlen_forward(q, k, v, *segments, *options)
    return out, lse


@cache
def _interface() -> Any:
    """The package's functions.

    Raises:
        RuntimeError: it is installed and does not load, in words that routing takes for a kernel that does not compile.
    """
    try:
        from flash_attn import flash_attn_interface
    except (ImportError, OSError) as error:  # built for another torch, above all
        raise RuntimeError(f"flash-attn does not load: {error}") from error
    return flash_attn_interface


def check_built(head_dim: int, dtype: torch.dtype, device: torch.device, *, windowed: bool) -> None:
    """Raise unless the installed flash-attn computes for a head dim; one small call that waits, the first time.

    Raises:
        RuntimeError: it does not, in words that routing takes for a kernel that does not compile.
    """
    kind = head_dim, dtype, device.index, windowed
    if kind in _built or torch.cuda.is_current_stream_capturing():
        return
    if not computes(_causal, head_dim, dtype, device, windowed=windowed):
        import flash_attn

        of_windows = " of windows" if windowed else ""
        raise RuntimeError(
            f"flash-attn {flash_attn.__version__} was built without a kernel{of_windows} for head_dim {head_dim} "
            f"in {dtype}"
        )
    _built.add(kind)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    return _forward(q, k, v, None, scale, True, window)[0]


_built: set[tuple[int, torch.dtype, int | None, bool]] = set()
