"""What the branches ask of a FlashAttention: one call over dense or packed batches, forward and backward."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from nsa_varlen import VarlenLayout
from torch import Tensor

# Sequences of one call at most: kernels number them in a CUDA grid's y or z, which ends at 65,535.
MAX_SEQUENCES = 65_535


@dataclass(frozen=True)
class Limits:
    """What a kernel can do, as data: refusals are worded from it, and tests skip by it.

    Fields:
        devices, dtypes: that it takes.
        max_head_dim: of Dk and Dv. head_dim_multiple: what both must be a multiple of.
        windows: sliding windows. ragged: packed sequences of different lengths.
        deterministic_gradients: a backward that gives equal bits in every run, on request.
        interleaved: sequences whose rows alternate are taken as they lie; otherwise the kernel would copy them.
    """

    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    max_head_dim: int = 256
    head_dim_multiple: int = 8
    windows: bool = True
    ragged: bool = True
    deterministic_gradients: bool = False
    interleaved: bool = True


class Segments(NamedTuple):
    """The sequences of a packed call.

    Fields:
        offsets_q, offsets_k: int32 [n + 1] on the device, contiguous, as a layout's cu_seqlens.
        longest_q, longest_k: host ints; the longest sequence, or a bound on it. longest_q = 1 says that every sequence
            has one query: FlashAttention-2 then takes queries for a dense batch of them.
    """

    offsets_q: Tensor
    offsets_k: Tensor
    longest_q: int
    longest_k: int

    @classmethod
    def of(cls, layout: VarlenLayout) -> Self:
        """All sequences of a layout, in tensors of their own: whoever built it may write the next batch into his."""
        offsets_q = layout.cu_seqlens_q.clone(memory_format=torch.contiguous_format)
        same = layout.cu_seqlens_k is layout.cu_seqlens_q
        offsets_k = offsets_q if same else layout.cu_seqlens_k.clone(memory_format=torch.contiguous_format)
        idle = layout.max_seqlen_q == 1 and layout.total_q < layout.batch_size
        return cls(offsets_q, offsets_k, 2 if idle else layout.max_seqlen_q, layout.max_seqlen_k)


class Kernel(Protocol):
    """An attention over whole batches.

    Dense: q [b, Sq, H, Dk], k [b, Sk, h, Dk], v [b, Sk, h, Dv], `segments=None`. Packed: q [Tq, H, Dk], k [Tk, h, Dk],
    v [Tk, h, Dv] with their segments. h divides H, and query heads of a group stand side by side. Any strides; rows may
    be expanded.

    `causal`: a query sees the keys up to its own position, bottom-right aligned. `window` (only with causal): the last
    `window` of those, its own included; None: all.
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
        """(out, shaped as q with Dv; lse, natural logarithm, [b, H, Sq] or [H, Tq]).

        Rows that see no key: out = 0, and an lse that `backward` knows them by, whatever it is.
        """

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
        """Gradients of q, k and v; of expanded rows one for each time they were read."""
