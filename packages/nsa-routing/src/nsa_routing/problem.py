"""One operation to run, as far as the choice of a backend depends on it."""

from dataclasses import dataclass

import torch

OPS = (
    "compress_mean",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "combine",
)


@dataclass(frozen=True)
class Problem:
    """What a backend may refuse or accept by.

    Fields:
        op: one of OPS.
        device: "cpu", "cuda", ...
        dtype: of q (or of the one tensor argument).
        head_dim, v_head_dim: Dk and Dv.
        group_size: query heads per kv head, G.
        needs_grad: a gradient will be recorded.
        deterministic: results must be bitwise equal across runs.
        paged: keys and values arrive as PagedKV.
        softcap, sinks, fp8_scales: reserved; no backend implements them, and each refuses them.

    Raises:
        ValueError: an unknown op.
    """

    op: str
    device: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    group_size: int
    needs_grad: bool = False
    deterministic: bool = False
    paged: bool = False
    softcap: bool = False
    sinks: bool = False
    fp8_scales: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op: expected one of {list(OPS)}, got {self.op!r}")
