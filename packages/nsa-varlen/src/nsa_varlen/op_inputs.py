"""Arguments to run any operation with, for whoever times or tries a backend: entry point `varlen` of `nsa.op_inputs`.

The contract of the group: a callable with the signature of `op_inputs`. Who calls it needs to know no type of this
package; block sizes come as a plain mapping.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.sdpa._backend import OPS
from nsa_varlen.testing import to_pages

PAGE_SIZE = 64


def op_inputs(
    op: str,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    blocks: Mapping[str, int] | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of `op`, in its public signature: `backend.op(*args, **kwargs)` runs.

    q, k, v and the outputs that `combine` takes are unit normal, gates lie in (0, 1). What an earlier operation makes
    is made by it, on `sdpa`: k_cmp and v_cmp by `compress_mean`, lse by `compressed_attention`, indices by
    `select_blocks`. Neighbouring queries are independent, so they choose unrelated blocks: the hardest case for kernels
    that share them.

    Args:
        op: one of the operations.
        lengths_q, lengths_k: queries and keys of each sequence; `lengths_k=None`: as many keys as queries. Of
            `decode_attention` the new tokens of each, and all of them.
        num_heads, num_kv_heads: Hq and Hk; Hk divides Hq.
        head_dim, v_head_dim: Dk and Dv; `v_head_dim=None` is Dk.
        blocks: fields of `BlockGeometry` that differ from its defaults.
        dtype: of the floating-point arguments but lse, which is fp32.
        device: where everything is made; equal values are promised for equal devices only.
        seed: of the random numbers.
        requires_grad: whether the floating-point arguments are leaves that record gradients. Not lse, nor anything of
            `select_blocks` and `decode_attention`, which have no gradient.

    Raises:
        TypeError: lengths that are no ints, a dtype that is not floating point.
        ValueError: an unknown op or block size, sizes that do not fit together.

    Example:
        >>> args, kwargs = op_inputs(
        ...     "window_attention", [5, 3], num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu"
        ... )
        >>> BACKEND.window_attention(*args, **kwargs)[0].shape
        torch.Size([8, 4, 8])
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {list(OPS)}, got {op!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads: expected a multiple of num_kv_heads={num_kv_heads}, got {num_heads}")
    geometry = _geometry({} if blocks is None else blocks)
    layout = VarlenLayout.from_lengths(lengths_q, lengths_k, device)
    generator = torch.Generator(layout.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=layout.device)

    def args() -> tuple[Any, ...]:
        if op == "combine":
            outputs = [normal(layout.total_q, num_heads, v_head_dim) for _ in range(3)]
            return (normal(layout.total_q, num_heads, 3).sigmoid(), *outputs)
        k = normal(layout.total_k, num_kv_heads, head_dim)
        if op == "compress_mean":
            return k, layout, geometry
        q = normal(layout.total_q, num_heads, head_dim)
        v = normal(layout.total_k, num_kv_heads, v_head_dim)
        if op == "decode_attention":
            return _decode_args(q, k, v, normal, layout, geometry)
        if op == "window_attention":
            return q, k, v, layout, geometry
        k_cmp, v_cmp = (BACKEND.compress_mean(x, layout, geometry) for x in (k, v))
        if op == "compressed_attention":
            return q, k_cmp, v_cmp, layout, geometry
        _, lse = BACKEND.compressed_attention(q, k_cmp, v_cmp, layout, geometry)
        if op == "select_blocks":
            return q, k_cmp, lse, layout, geometry
        return q, k, v, BACKEND.select_blocks(q, k_cmp, lse, layout, geometry), layout, geometry

    with torch.no_grad():
        made = args()
    if requires_grad and op not in ("select_blocks", "decode_attention"):
        for x in made:
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
    return made, {}


def _decode_args(
    q: Tensor, k: Tensor, v: Tensor, normal: Callable[..., Tensor], layout: VarlenLayout, blocks: BlockGeometry
) -> tuple[Any, ...]:
    """The branches share their keys and values, each in pages of its own."""
    counts = layout.host.cu_seqlens_q.diff()
    if bool((counts > layout.host.cu_seqlens_k.diff()).any()):
        raise ValueError(f"lengths_q: expected no more new tokens than tokens, got {counts.tolist()}")
    new = torch.arange(int(counts.max()) if len(counts) else 0) < counts[:, None]
    padded = q.new_zeros(*new.shape, *q.shape[1:])
    padded[new.to(q.device)] = q
    lengths = layout.host.cu_seqlens_k.diff().tolist()
    compressed = [blocks.num_compressed(length) for length in lengths]
    pages = [to_pages(BACKEND.compress_mean(x, layout, blocks), compressed, PAGE_SIZE) for x in (k, v)]
    pages += [to_pages(x, lengths, PAGE_SIZE) for _ in range(2) for x in (k, v)]
    gates = normal(*padded.shape[:3], 3).sigmoid()
    return padded, *pages, gates, counts.int().to(q.device), blocks


def _geometry(blocks: Mapping[str, int]) -> BlockGeometry:
    names = [field.name for field in fields(BlockGeometry)]
    unknown = sorted(set(blocks) - set(names))
    if unknown:
        raise ValueError(f"blocks: expected fields of {names}, got {unknown[0]!r}")
    return BlockGeometry(**blocks)
