"""The backends `fa2`, `fa2-torch` and `cudnn`: the operations with the signatures that every backend shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.arguments import (
    KV,
    check_attention,
    check_block_indices,
    check_layout,
    heads_and_dim,
    scale_or_default,
)
from nsa_varlen.untraced import untraced
from torch import Tensor

from nsa_fa2 import selected
from nsa_fa2.attention import attention
from nsa_fa2.branches import compressed_branch, is_uniform, window_branch
from nsa_fa2.contracts import unmet
from nsa_fa2.kernel import Kernel
from nsa_fa2.machines import no_cudnn, no_flash_attn, no_torch_flash
from nsa_fa2.pages import compressed_rows, window_rows
from nsa_fa2.providers.cudnn import Cudnn
from nsa_fa2.providers.flash_attn import FlashAttn
from nsa_fa2.providers.torch_flash import TorchFlash


@dataclass(frozen=True)
class _Asked:
    """A call, as far as a contract speaks of it: see `unmet`."""

    device: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    needs_grad: bool
    deterministic: bool
    paged: bool
    uniform: bool


class FlashBackend:
    """The attention branches by a `Kernel`: arguments, results and errors are those of `nsa_varlen.reference`.

    k and v (and k_cmp, v_cmp) may be `PagedKV` without gradients: their rows are copied, of a window those that it
    reaches. `lse` is fp32 and has no gradient; there is no second derivative.

    Args:
        name: of the backend.
        kernel: who computes.
        missing: why the machine lacks it, given an environment as `nsa_routing.Environment`; None if it does not.

    Raises:
        TypeError, ValueError: every operation, as the reference; ValueError also for what the kernel's limits do not
            allow, in the words of `refuse`.
    """

    def __init__(self, name: str, kernel: Kernel, missing: Callable[[Any], str | None]) -> None:
        self.name = name
        self.kernel = kernel
        self.missing = missing

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        """Why this backend cannot run `op` on this problem and machine, or None.

        Example:
            >>> from types import SimpleNamespace
            >>> layer = {"device": "cuda", "dtype": torch.float32, "head_dim": 128, "v_head_dim": 128}
            >>> FA2_TORCH.refuse("window_attention", SimpleNamespace(**layer), SimpleNamespace(sm=90))
            'takes float16 and bfloat16, not float32'
        """
        return unmet(op, problem, self.kernel.limits) or self.missing(environment)

    @untraced
    def compressed_attention(
        self,
        q: Tensor,
        k_cmp: KV,
        v_cmp: KV,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        scale: float | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the visible compressed blocks (Eq. 7, 8): (out, lse). See `nsa_fa2.branches`."""
        check_layout(layout, blocks)
        check_attention(("k_cmp", "v_cmp"), q, k_cmp, v_cmp, layout.compressed(blocks).total, layout)
        deterministic = self._agreed("compressed_attention", q, k_cmp, v_cmp, layout, deterministic)
        k_cmp, v_cmp = (compressed_rows(x, layout, blocks) for x in (k_cmp, v_cmp))
        return attention(
            *(q, k_cmp, v_cmp, self.kernel, compressed_branch(layout, blocks, apart=self.kernel.limits.interleaved)),
            scale=scale_or_default(scale, q.shape[-1]),
            deterministic=deterministic,
        )

    @untraced
    def window_attention(
        self,
        q: Tensor,
        k: KV,
        v: KV,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        scale: float | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over positions (t - w, t]: (out, lse). One call of the kernel."""
        check_layout(layout, blocks)
        check_attention(("k", "v"), q, k, v, layout.total_k, layout)
        deterministic = self._agreed("window_attention", q, k, v, layout, deterministic)
        k, v, layout = window_rows(k, v, layout, blocks)
        return attention(
            *(q, k, v, self.kernel, window_branch(layout, blocks)),
            scale=scale_or_default(scale, q.shape[-1]),
            deterministic=deterministic,
        )

    @untraced
    def selected_attention(
        self,
        q: Tensor,
        k: KV,
        v: KV,
        block_indices: Tensor,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        scale: float | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the listed blocks' keys at positions <= t (Eq. 12): (out, lse). See `nsa_fa2.selected`."""
        check_layout(layout, blocks)
        check_attention(("k", "v"), q, k, v, layout.total_k, layout)
        check_block_indices(block_indices, heads_and_dim(k)[0], layout)
        self._agreed("selected_attention", q, k, v, layout, deterministic)
        return selected.selected_attention(
            *(q, k, v, block_indices, layout, blocks, self.kernel), scale=scale_or_default(scale, q.shape[-1])
        )

    def _agreed(self, op: str, q: Tensor, k: KV, v: KV, layout: VarlenLayout, deterministic: bool | None) -> bool:
        """Whether gradients must be deterministic; raises unless the kernel's limits allow the call."""
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        tensors = (x.pages if isinstance(x, PagedKV) else x for x in (q, k, v))
        reason = unmet(
            op,
            _Asked(
                device=q.device.type,
                dtype=q.dtype,
                head_dim=q.shape[-1],
                v_head_dim=heads_and_dim(v)[1],
                needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
                deterministic=deterministic,
                paged=isinstance(k, PagedKV) or isinstance(v, PagedKV),
                uniform=is_uniform(layout) and layout.max_seqlen_q == layout.max_seqlen_k,
            ),
            self.kernel.limits,
        )
        if reason is not None:
            raise ValueError(f"{op} on backend {self.name}: {reason}")
        return deterministic


FA2 = FlashBackend("fa2", FlashAttn(), no_flash_attn)
FA2_TORCH = FlashBackend("fa2-torch", TorchFlash(), no_torch_flash)
CUDNN = FlashBackend("cudnn", Cudnn(), no_cudnn)
