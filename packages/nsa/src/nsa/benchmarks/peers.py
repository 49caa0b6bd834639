"""Others' kernels of Native Sparse Attention beside ours, where they are installed, called and not copied.

fla-core: see `nsa.benchmarks.fla_core`.

native-sparse-attention-pytorch, read in version 0.2.3: its module compresses by networks of its own and has windows of
another size, so that only `native_sparse_attend` is comparable, attention to given blocks. A query's own block is
always attended to, causally; the others are read whole. It computes in fp16, for groups of 1, 2, 4, 8 or 16 heads.
Interpreted (Triton 3.7, blocks of 16 and 32 tokens) its kernel passes the check here.
"""

from collections.abc import Callable
from typing import Any

import torch
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.benchmarks.machine import installed
from nsa_varlen.benchmarks.operations import op_workloads
from nsa_varlen.benchmarks.workload import Workload
from torch import Tensor

from nsa.benchmarks import fla_core
from nsa.benchmarks.fla_core import batched, is_power_of_two


class PytorchBackend:
    """`native_sparse_attend` of native-sparse-attention-pytorch, forward."""

    name = "nsa-pytorch"

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        """Why it cannot run, or None."""
        if problem.device != "cuda":
            return "needs CUDA"
        if problem.dtype != torch.float16:
            return f"computes in float16, got {problem.dtype}"
        if problem.needs_grad:
            return "is compared forward only"
        if problem.group_size > 16 or not is_power_of_two(problem.group_size, 1):
            return f"needs 1, 2, 4, 8 or 16 query heads a kv head, got {problem.group_size}"
        if not is_power_of_two(problem.block_size, 16) or problem.head_dim > 128:
            sizes = f"{problem.block_size} and {problem.head_dim}"
            return f"needs a block_size that is a power of two from 16 on, and head_dim up to 128, got {sizes}"
        # Its module asks for that name, and ends the interpreter if there is none.
        return None if environment.triton else "needs triton"

    def selected_attention(
        self, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, layout: VarlenLayout, blocks: BlockGeometry
    ) -> tuple[Tensor, None]:
        """(out, None) of sequences of one length, where each query lists its own block.

        Its mask takes out the own block, which is attended to anyway, and -1, whose keys would lie before all others.
        """
        from native_sparse_attention_pytorch.triton_native_sparse_attention import native_sparse_attend

        q, k, v, listed = (batched(x, layout).transpose(1, 2) for x in (q, k, v, block_indices))
        own = torch.arange(layout.max_seqlen_q, device=q.device)[:, None] // blocks.block_size
        others = ((listed >= 0) & (listed != own)).contiguous()
        out = native_sparse_attend(q, k, v, blocks.block_size, listed.clamp_min(0).contiguous(), others)
        return out.transpose(1, 2).flatten(0, 1), None


def pytorch_workloads() -> list[Workload]:
    """`nsa-pytorch.selected_attention` beside those of our backends."""
    return op_workloads(PytorchBackend(), ["selected_attention"], dtype="float16")


PEERS: dict[str, Callable[[], list[Workload]]] = {
    fla_core.DISTRIBUTION: fla_core.workloads,
    "native-sparse-attention-pytorch": pytorch_workloads,
}


def workloads() -> list[Workload]:
    """Those of the peers whose distributions are installed; none of them is imported."""
    return [workload for name, offered in PEERS.items() if installed(name) for workload in offered()]
