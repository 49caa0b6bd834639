"""The backend `triton`: the operations with the signatures that every backend shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.arguments import (
    KV,
    check_attention,
    check_block_indices,
    check_decode,
    check_gates,
    check_layout,
    check_lse,
    check_rows,
    heads_and_dim,
    scale_or_default,
)
from nsa_varlen.new_tokens import NewTokens
from nsa_varlen.untraced import untraced
from torch import Tensor

from nsa_kernels_triton.contracts import MIN_TILE, interpreted, missing, unmet
from nsa_kernels_triton.ops import attention, combining, decode, pooling, selected, selection


@dataclass(frozen=True)
class _Asked:
    """A call, as far as the contract speaks of it: see `unmet`."""

    device: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    group_size: int
    block_size: int
    topk: int
    needs_grad: bool
    paged: bool
    forced: int = 0


class TritonBackend:
    """Every operation as Triton kernels. Arguments, results and errors are those of `nsa_varlen.reference`.

    Inputs are fp16, bf16 or fp32; sums are fp32, products of fp32 inputs IEEE. lse is fp32, [Hq, Tq], and carries no
    gradient. Results and gradients are bitwise equal across runs, of `selected_attention` with `deterministic=True`:
    else it may change its organisation by what it has measured. A value that is not finite may spoil any query, or in
    the backward any key, of the same tile of the same sequence. No operation waits for the device. Each is an operator
    of `torch.library` (namespace `nsa_kernels_triton`), which torch.compile takes as it is, and so is its backward,
    which has no derivative of its own.

    Raises:
        TypeError, ValueError: every operation, as the reference; ValueError also for what the kernels do not do, in the
            words of `refuse`.
    """

    name = "triton"
    uses_triton = True

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        """Why this backend cannot run `op` on this problem and machine, or None.

        Example:
            >>> from types import SimpleNamespace
            >>> layer = {"device": "cuda", "dtype": torch.float64, "head_dim": 128, "v_head_dim": 128, "group_size": 16}
            >>> BACKEND.refuse("combine", SimpleNamespace(**layer), None)
            'takes float16, bfloat16 and float32, not float64'
        """
        return unmet(op, problem) or missing(environment)

    def compress_mean(self, x: Tensor, layout: VarlenLayout, blocks: BlockGeometry) -> Tensor:
        """`x_cmp[i] = mean of x[i*d : i*d + l]`: [Tk, H, D] -> [Tc, H, D]. Summed in fp32, rounded once."""
        check_layout(layout, blocks)
        check_rows("x", x, layout.total_k, layout)
        _check_contract("compress_mean", x, x, x, blocks)
        compressed = layout.compressed(blocks)
        sizes = blocks.kernel_size, blocks.kernel_stride
        return pooling.compress_mean(x, layout.cu_seqlens_k, compressed.cu_seqlens, compressed.total, *sizes)

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
        """Attention over the visible compressed blocks (Eq. 7, 8): (out, lse)."""
        check_layout(layout, blocks)
        compressed = layout.compressed(blocks)
        check_attention(("k_cmp", "v_cmp"), q, k_cmp, v_cmp, compressed.total, layout)
        k_cmp, v_cmp = _check_contract("compressed_attention", q, k_cmp, v_cmp, blocks)
        return attention.compressed_attention(
            *(q, k_cmp, v_cmp, layout.cu_seqlens_q, layout.cu_seqlens_k, compressed.cu_seqlens),
            *(blocks.kernel_size, blocks.kernel_stride, _scale(scale, q)),
        )

    def select_blocks(
        self,
        q: Tensor,
        k_cmp: KV,
        lse: Tensor,
        layout: VarlenLayout,
        blocks: BlockGeometry,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """The blocks each query attends to (Eq. 9-11): int32 [Tq, Hk, topk], ascending, padded with -1.

        Scores are fp32; equal ones go to the lower index. They never reach memory but in chunks of queries.
        """
        check_layout(layout, blocks)
        compressed = layout.compressed(blocks)
        check_attention(("k_cmp", "k_cmp"), q, k_cmp, k_cmp, compressed.total, layout)
        check_lse(lse, q.shape[1], layout)
        k_cmp, _ = _check_contract("select_blocks", q, k_cmp, k_cmp, blocks)
        return selection.select_blocks(
            *(q, k_cmp, lse.float(), layout.cu_seqlens_q, layout.cu_seqlens_k, compressed.cu_seqlens),
            *(layout.max_seqlen_k, blocks.kernel_size, blocks.kernel_stride, blocks.block_size),
            *(blocks.topk, blocks.init_blocks, blocks.local_blocks, _scale(scale, q)),
        )

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
        """Attention over the listed blocks' keys at positions <= t (Eq. 12): (out, lse). See `ops.selected`."""
        check_layout(layout, blocks)
        check_attention(("k", "v"), q, k, v, layout.total_k, layout)
        check_block_indices(block_indices, heads_and_dim(k)[0], layout)
        k, v = _check_contract("selected_attention", q, k, v, blocks, listed=block_indices.shape[2])
        return selected.selected_attention(
            *(q, k, v, block_indices, layout.cu_seqlens_q, layout.cu_seqlens_k),
            *(blocks.block_size, _scale(scale, q), _deterministic(deterministic)),
        )

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
        """Attention over positions (t - w, t]: (out, lse)."""
        check_layout(layout, blocks)
        check_attention(("k", "v"), q, k, v, layout.total_k, layout)
        k, v = _check_contract("window_attention", q, k, v, blocks)
        return attention.window_attention(
            *(q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k),
            *(blocks.window_size, _scale(scale, q)),
        )

    def combine(self, gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
        """out = sum of gate_c * o_c over cmp, slc, win (Eq. 5), in one pass: [Tq, Hq, Dv]. Summed in fp32."""
        check_gates(gates, {"o_cmp": o_cmp, "o_slc": o_slc, "o_win": o_win})
        _check_contract("combine", gates, o_cmp, o_slc, None, o_win)
        return combining.combine(gates, o_cmp, o_slc, o_win)

    @untraced
    def decode_attention(
        self,
        q: Tensor,
        k_cmp: PagedKV,
        v_cmp: PagedKV,
        k_slc: PagedKV,
        v_slc: PagedKV,
        k_win: PagedKV,
        v_win: PagedKV,
        gates: Tensor,
        counts: Tensor,
        blocks: BlockGeometry,
        *,
        q_cmp: Tensor | None = None,
        scale: float | None = None,
        new: NewTokens | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All branches for the newest tokens of paged sequences, which it stores first if they are given as `new`.

        (out [B, N, Hq, Dv], block_indices int32 [B, N, Hk, topk]). Two launches for many short sequences, four for few.
        A CUDA graph may hold it; compiled code calls it as it stands. Lengths beyond what tables have room for are the
        caller's mistake: on a GPU nothing is written for them, and what they read is anybody's.
        """
        q_cmp = q if q_cmp is None else q_cmp
        streams = (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win)
        accepted = check_decode(q, q_cmp, *streams, gates, counts, blocks, new)
        pages = [x.pages for both in streams for x in both]
        rows, rings = ([], []) if new is None else ([*new.tensors()], new.rings())
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, q_cmp, gates, *pages, *rows, *rings))
        contiguous = all(x.is_contiguous() for x in pages), all(x.is_contiguous() for x in rings)
        kind = "triton", needs_grad, *contiguous, q.is_cuda or interpreted()
        if kind not in accepted.notes:
            if not contiguous[1]:
                raise ValueError("new.cmp.k_tail, new.cmp.v_tail: expected contiguous rings, got strides")
            _check_decode_contract(q, streams, blocks, needs_grad)
            accepted.notes[kind] = None
        return decode.decode_attention(q, q_cmp, *streams, gates, counts, blocks, _scale(scale, q), new)

    def decode_stages(
        self,
        q: Tensor,
        k_cmp: PagedKV,
        v_cmp: PagedKV,
        k_slc: PagedKV,
        v_slc: PagedKV,
        k_win: PagedKV,
        v_win: PagedKV,
        gates: Tensor,
        counts: Tensor,
        blocks: BlockGeometry,
        *,
        q_cmp: Tensor | None = None,
        scale: float | None = None,
        new: NewTokens | None = None,
    ) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
        """The kernels of one `decode_attention` apart, to be timed: `cmp`, `slc_win` and, where it is one, `combine`.

        `cmp` stores new tokens and chooses the blocks: its kernels share what they compute. The window and the selected
        blocks are one kernel, which also combines unless another does. The whole step has run when this returns. Each
        stage may then be called in any order and captured in a CUDA graph: it returns (out, block_indices) of a step of
        its own, made again as far as this stage makes them. Arguments and scratch memory are kept alive.

        Without a row of q, or a page, there is no stage.

        Raises:
            TypeError, ValueError: as `decode_attention`; ValueError also for sequences that it takes in turns.
        """
        self.decode_attention(
            *(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, counts, blocks),
            q_cmp=q_cmp,
            scale=scale,
            new=new,
        )
        q_cmp = q if q_cmp is None else q_cmp
        streams = (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win)
        stages = decode.decode_stages(q, q_cmp, *streams, gates, counts, blocks, _scale(scale, q), new)
        return {**stages}


def _check_decode_contract(
    q: Tensor, streams: tuple[tuple[PagedKV, PagedKV], ...], blocks: BlockGeometry, needs_grad: bool
) -> None:
    """Raise unless the kernels do this decode step."""
    (_, _), (k_slc, v_slc), _ = streams
    for name, (k, v) in zip(("cmp", "slc", "win"), streams, strict=True):
        if k.page_size != v.page_size or k.page_size % MIN_TILE:
            raise ValueError(
                f"k_{name}, v_{name}: expected pages of one size, a multiple of {MIN_TILE}, "
                f"got {k.page_size} and {v.page_size}"
            )
        if not (k.pages.is_contiguous() and v.pages.is_contiguous()):
            raise ValueError(f"k_{name}, v_{name}: expected contiguous pages, got strides")
    if k_slc.page_size % blocks.block_size:
        raise ValueError(
            f"k_slc: expected pages of a multiple of block_size={blocks.block_size}, got {k_slc.page_size}"
        )
    reason = unmet(
        "decode_attention",
        _Asked(
            device=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[3],
            v_head_dim=v_slc.head_dim,
            group_size=q.shape[2] // k_slc.num_heads,
            block_size=blocks.block_size,
            topk=blocks.topk,
            needs_grad=needs_grad,
            paged=True,
            forced=blocks.init_blocks + blocks.local_blocks,
        ),
    )
    if reason is not None:
        raise ValueError(f"decode_attention on backend triton: {reason}")


def _scale(scale: float | None, q: Tensor) -> float:
    """The scale, no smaller than fp32 holds: a product of 0 and -inf is NaN."""
    return max(scale_or_default(scale, q.shape[-1]), 2.0**-125)


def _deterministic(asked: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if asked is None else asked


def _check_contract(
    op: str, q: Tensor, k: KV, v: KV, blocks: BlockGeometry | None, *others: Tensor, listed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Raise unless the kernels do this call; k and v, now known to be packed."""
    tensors = [x.pages if isinstance(x, PagedKV) else x for x in (q, k, v, *others)]
    num_kv_heads, head_dim = heads_and_dim(k)
    reason = unmet(
        op,
        _Asked(
            device=q.device.type,
            dtype=tensors[1].dtype,
            head_dim=head_dim,
            v_head_dim=heads_and_dim(v)[1],
            group_size=q.shape[1] // max(1, num_kv_heads),
            block_size=64 if blocks is None else blocks.block_size,
            topk=listed if listed is not None else 0 if blocks is None else blocks.topk,
            needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
            paged=isinstance(k, PagedKV) or isinstance(v, PagedKV),
        ),
    )
    if reason is not None or not isinstance(k, Tensor) or not isinstance(v, Tensor):
        raise ValueError(f"{op} on backend triton: {reason}")
    return k, v


BACKEND = TritonBackend()
