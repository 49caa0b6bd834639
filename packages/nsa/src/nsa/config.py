"""Everything that defines an NSA layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from nsa_varlen import BlockGeometry

from nsa.rope import scale_frequency
from nsa.sizes import check_size

COMPRESSIONS = ("mean", "weighted_pool", "linear", "mlp")
ROPE_CMP = ("after", "before", "none")


@dataclass(frozen=True)
class NSAConfig:
    """Sizes and options of `nsa.NSAAttention` and `nsa.NSACache`.

    Fields:
        hidden_size: width of the layer's input and output.
        num_heads, num_kv_heads: query heads Hq and key/value heads Hk; Hk divides Hq.
        head_dim, v_head_dim: Dk and Dv; `v_head_dim=None` is Dk.
        kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size: as
            `nsa_varlen.BlockGeometry`, in tokens (topk, init_blocks, local_blocks: blocks).
        compression: how a block of keys or values becomes one: "mean"; "weighted_pool", learned weights that start as
            the mean; "linear"; "mlp", the paper's, with intra-block position encoding.
        compression_hidden_size: width of the "mlp" compression; None is 4 * head_dim.
        shared_kv: one K and V projection for all branches instead of one per branch (paper, section 3.3.3).
        gate_hidden_size: width of the gate's MLP; None is hidden_size // 4 (at least 1).
        rope_theta: base of the rotary embedding; None for a layer without positions.
        rope_interleaved: pairs (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ...
        rope_scaling: None, or a mapping as transformers names it, e.g. {"rope_type": "linear", "factor": 4.0}.
        rope_cmp: where the compressed branch is rotated: "after" pooling, at the block's first position; "before"
            pooling, each key at its own; "none", neither its keys nor its queries.
        bias: the q, k and v projections have biases.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: sizes or options that do not fit; the message shows the values.

    Example:
        >>> config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=32)
        >>> config.group_size, config.blocks.topk
        (4, 16)
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512
    compression: str = "mean"
    compression_hidden_size: int | None = None
    shared_kv: bool = False
    gate_hidden_size: int | None = None
    rope_theta: float | None = 10_000.0
    rope_interleaved: bool = False
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    rope_cmp: str = "after"
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            check_size(name, getattr(self, name))
        for name in ("v_head_dim", "compression_hidden_size", "gate_hidden_size"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        for name in ("shared_kv", "rope_interleaved", "bias"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}")
        for name, allowed in (("compression", COMPRESSIONS), ("rope_cmp", ROPE_CMP)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {list(allowed)}, got {getattr(self, name)!r}")
        if self.rope_theta is not None:
            if isinstance(self.rope_theta, bool) or not isinstance(self.rope_theta, int | float):
                raise TypeError(f"rope_theta: expected a float or None, got {self.rope_theta!r}")
            if not 0 < self.rope_theta < math.inf:
                raise ValueError(f"rope_theta: expected a finite number above 0, got {self.rope_theta}")
            if self.head_dim % 2:
                raise ValueError(f"head_dim: expected an even number for rotary embedding, got {self.head_dim}")
        self._check_rope_scaling()
        self.blocks  # noqa: B018  # the geometry checks its own fields

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, Mapping):
            raise TypeError(f"rope_scaling: expected a mapping or None, got {self.rope_scaling!r}")
        if self.rope_theta is None:
            raise ValueError(f"rope_scaling: expected None without positions, rope_theta=None, got {self.rope_scaling}")
        object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))  # the caller may change his own
        frequency = torch.ones(self.head_dim // 2, dtype=torch.float64, device="cpu")
        scale_frequency(frequency, self.rope_theta, self.rope_scaling)

    @cached_property
    def blocks(self) -> BlockGeometry:
        """The block sizes."""
        return BlockGeometry(**{size.name: getattr(self, size.name) for size in fields(BlockGeometry)})

    @property
    def group_size(self) -> int:
        """Query heads per kv head, G."""
        return self.num_heads // self.num_kv_heads

    @property
    def value_dim(self) -> int:
        """Dv."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim
