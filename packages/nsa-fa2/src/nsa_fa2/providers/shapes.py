"""What every provider's kernels want of their tensors: one head dim, and rows that can be read 16 bytes at a time."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nsa_fa2.kernel import Limits, Segments

ALIGNMENT = 16  # bytes


class FittedKernel(ABC):
    """A `Kernel` whose implementation gets q, k and v of one head dim, aligned.

    The smaller of Dk and Dv is padded with zeros, which change no logit and no output but their own, and are cut off.
    """

    limits: Limits

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments | None,
        *,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`."""
        v_dim = v.shape[-1]
        q, k, v = fitted(q, k, v)
        out, lse = self._forward(q, k, v, segments, scale, causal, window)
        return out[..., :v_dim], lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments | None,
        *,
        scale: float,
        causal: bool,
        window: int | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Kernel.backward`."""
        k_dim, v_dim = k.shape[-1], v.shape[-1]
        tensors = fitted(grad_out, q, k, v, out)
        dq, dk, dv = self._backward(tensors, lse.contiguous(), segments, scale, causal, window, deterministic)
        return dq[..., :k_dim], dk[..., :k_dim], dv[..., :v_dim]

    @abstractmethod
    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments | None,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
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
        """`tensors`: grad_out, q, k, v, out."""


def fitted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with the last dim of the widest, and aligned: as they are, or copies."""
    dim = max(x.shape[-1] for x in tensors)
    return tuple(
        torch.nn.functional.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else aligned(x) for x in tensors
    )


def aligned(x: Tensor) -> Tensor:
    """`x`, copied unless each row of its last dim is contiguous and begins at a multiple of ALIGNMENT bytes.

    Example:
        >>> x = torch.zeros(3, 16, dtype=torch.float16)
        >>> aligned(x) is x, aligned(x[:, 1:9]).stride()
        (True, (8, 1))
    """
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    steps = [stride * x.element_size() for size, stride in outer if size > 1]
    if x.stride(-1) == 1 and not any(step % ALIGNMENT for step in (x.data_ptr(), *steps)):
        return x
    return x.clone(memory_format=torch.contiguous_format)
