"""A call of selected attention, as both of its organisations take it."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import Launch
from nsa_kernels_triton.ops.descriptors import kv_tiles
from nsa_kernels_triton.ops.launching import rows
from nsa_kernels_triton.tiles import LOG2_E, pieces, row_bytes


class SelectedCall:
    """One call's tensors and sizes: what either organisation launches kernels with."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_indices: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        block_size: int,
        scale: float,
    ) -> None:
        self.q, self.k, self.v = rows(q), rows(k), rows(v)
        self.indices = block_indices.contiguous()
        self.cu_seqlens_q, self.cu_seqlens_k = cu_seqlens_q, cu_seqlens_k
        self.total_q, self.num_heads, self.head_dim = q.shape
        self.total_k, self.num_kv_heads, self.v_head_dim = v.shape
        self.group_size = self.num_heads // self.num_kv_heads
        self.batch_size = cu_seqlens_q.shape[0] - 1
        self.num_slots = block_indices.shape[2]
        self.block_size = block_size
        self.scale = scale * LOG2_E
        self.case = {
            "group_size": self.group_size,
            "block_size": block_size,
            "slots": self.num_slots,
            "row_bytes": row_bytes(q, v),
            "itemsize": q.element_size(),
        }

    @cached_property
    def out(self) -> Tensor:
        """[Tq, Hq, Dv], not yet written."""
        return self.q.new_empty(self.total_q, self.num_heads, self.v_head_dim)

    @cached_property
    def lse(self) -> Tensor:
        """fp32 [Hq, Tq], not yet written."""
        return self.q.new_empty(self.num_heads, self.total_q, dtype=torch.float32)

    def constants(self, queries: int, tile_rows: int) -> dict[str, int]:
        """The constants that every attention kernel takes."""
        k0, k1 = pieces(self.head_dim)
        v0, v1 = pieces(self.v_head_dim)
        return {
            "GROUP_SIZE": self.group_size,
            "BLOCK_SIZE": self.block_size,
            "QUERIES": queries,
            "ROWS": tile_rows,
            **{"DK": self.head_dim, "K0": k0, "K1": k1, "DV": self.v_head_dim, "V0": v0, "V1": v1},
        }

    def kv_tiles(self, config: Launch, keys: int) -> tuple[Any, Any]:
        """Descriptors of `keys` rows of k and v where the configuration asks for them and both can have them."""
        return kv_tiles(self.k, self.v, keys, wanted=config["tma"])

    def strides(self) -> tuple[int, ...]:
        """Of rows and heads of q, k and v."""
        return tuple(x.stride(i) for x in (self.q, self.k, self.v) for i in (0, 1))
