"""Checks of the operations' arguments, shared by the oracle and every backend: say what was expected and what came."""

import math

import torch
from torch import Tensor

from nsa_varlen.decode_facts import Accepted, accept, accepted_before, already_checked, decode_facts
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.layout import VarlenLayout
from nsa_varlen.new_tokens import CompletedBlocks, NewTokens, PooledTokens
from nsa_varlen.paged import PagedKV

KV = Tensor | PagedKV
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_layout(layout: VarlenLayout, blocks: BlockGeometry) -> None:
    """Raise TypeError unless both are of this package's types."""
    if not isinstance(layout, VarlenLayout):
        raise TypeError(f"layout: expected a VarlenLayout, got {type(layout).__name__}")
    if not isinstance(blocks, BlockGeometry):
        raise TypeError(f"blocks: expected a BlockGeometry, got {type(blocks).__name__}")


def check_rows(name: str, x: Tensor, rows: int, layout: VarlenLayout) -> None:
    """Raise unless `x` is a floating tensor [rows, H, D] on the layout's device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.ndim != 3 or x.shape[0] != rows:
        raise ValueError(f"{name}: expected shape [{rows}, heads, head_dim], got {list(x.shape)}")
    if x.device != layout.device:
        raise ValueError(f"{name}: expected device {layout.device} of the layout, got {x.device}")


def check_kv(name: str, x: KV, rows: int, layout: VarlenLayout) -> None:
    """`check_rows` for packed keys or values; for a PagedKV, that its device and batch are the layout's.

    On a CPU, where reading them is free, its lengths must also add up to `rows` and have room in its block_table.
    """
    if not isinstance(x, PagedKV):
        check_rows(name, x, rows, layout)
        return
    if x.k_scale is not None or x.v_scale is not None:
        raise ValueError(f"{name}: expected pages without k_scale and v_scale (fp8 is not implemented), got scales")
    if x.device != layout.device:
        raise ValueError(f"{name}: expected device {layout.device} of the layout, got {x.device}")
    if x.block_table.shape[0] != layout.batch_size:
        raise ValueError(f"{name}: expected {layout.batch_size} sequences, got {x.block_table.shape[0]} in block_table")
    if x.device.type == "cpu":
        lengths, room = x.lengths.tolist(), x.block_table.shape[1] * x.page_size
        if sum(lengths) != rows:
            raise ValueError(f"{name}: expected lengths that add up to {rows} rows, got {lengths}")
        if max(lengths, default=0) > room:
            raise ValueError(f"{name}: expected lengths of at most the {room} rows in block_table, got {lengths}")


def heads_and_dim(x: KV) -> tuple[int, int]:
    """(heads, head_dim) of packed or paged rows."""
    return (x.num_heads, x.head_dim) if isinstance(x, PagedKV) else (x.shape[1], x.shape[2])


def check_attention(names: tuple[str, str], q: Tensor, k: KV, v: KV, rows_k: int, layout: VarlenLayout) -> None:
    """Raise unless q [Tq, Hq, Dk], k [rows_k, Hk, Dk] and v [rows_k, Hk, Dv] fit the layout and one another."""
    check_rows("q", q, layout.total_q, layout)
    for name, x in zip(names, (k, v), strict=True):
        check_kv(name, x, rows_k, layout)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} of q, got {x.dtype}")
    num_heads, head_dim = q.shape[1:]
    if num_heads == 0 or head_dim == 0:
        raise ValueError(f"q: expected at least one head and head_dim of at least 1, got shape {list(q.shape)}")
    num_kv_heads, k_dim = heads_and_dim(k)
    if k_dim != head_dim:
        raise ValueError(f"{names[0]}: expected head_dim {head_dim} of q, got {k_dim}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{names[0]}: expected kv heads that divide q's {num_heads} heads, got {num_kv_heads}")
    if heads_and_dim(v)[0] != num_kv_heads:
        raise ValueError(f"{names[1]}: expected {num_kv_heads} heads of {names[0]}, got {heads_and_dim(v)[0]}")


def check_block_indices(block_indices: Tensor, num_kv_heads: int, layout: VarlenLayout) -> None:
    """Raise unless `block_indices` is int32 [Tq, Hk, N] on the layout's device."""
    if not isinstance(block_indices, Tensor):
        raise TypeError(f"block_indices: expected a tensor, got {type(block_indices).__name__}")
    if block_indices.dtype != torch.int32:
        raise TypeError(f"block_indices: expected dtype torch.int32, got {block_indices.dtype}")
    if block_indices.ndim != 3 or block_indices.shape[:2] != (layout.total_q, num_kv_heads):
        raise ValueError(
            f"block_indices: expected shape [{layout.total_q}, {num_kv_heads}, N], got {list(block_indices.shape)}"
        )
    if block_indices.device != layout.device:
        raise ValueError(f"block_indices: expected device {layout.device} of the layout, got {block_indices.device}")


def check_lse(lse: Tensor, num_heads: int, layout: VarlenLayout) -> None:
    """Raise unless `lse` is fp32 (or fp64, from the oracle) [Hq, Tq] on the layout's device."""
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse: expected a tensor, got {type(lse).__name__}")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse: expected dtype torch.float32, got {lse.dtype}")
    if lse.shape != (num_heads, layout.total_q):
        raise ValueError(f"lse: expected shape [{num_heads}, {layout.total_q}], got {list(lse.shape)}")
    if lse.device != layout.device:
        raise ValueError(f"lse: expected device {layout.device} of the layout, got {lse.device}")


def check_gates(gates: Tensor, outputs: dict[str, Tensor]) -> None:
    """Raise unless gates [Tq, Hq, 3] fit the branches' outputs [Tq, Hq, Dv], which must agree."""
    for name, x in (("gates", gates), *outputs.items()):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.ndim != 3:
            raise ValueError(f"{name}: expected 3 dimensions, got shape {list(x.shape)}")
    first, *others = outputs.items()
    for name, x in others:
        if x.shape != first[1].shape or x.dtype != first[1].dtype or x.device != first[1].device:
            raise ValueError(
                f"{name}: expected {list(first[1].shape)} {first[1].dtype} on {first[1].device} as {first[0]}, "
                f"got {list(x.shape)} {x.dtype} on {x.device}"
            )
    expected = (*first[1].shape[:2], 3)
    if gates.shape != expected:
        raise ValueError(f"gates: expected shape {list(expected)}, got {list(gates.shape)}")
    if gates.dtype not in FLOATS:
        raise TypeError(f"gates: expected a floating dtype, got {gates.dtype}")
    if gates.device != first[1].device:
        raise ValueError(f"gates: expected device {first[1].device}, got {gates.device}")


def check_decode(
    q: Tensor,
    q_cmp: Tensor,
    cmp: tuple[PagedKV, PagedKV],
    slc: tuple[PagedKV, PagedKV],
    win: tuple[PagedKV, PagedKV],
    gates: Tensor,
    counts: Tensor,
    blocks: BlockGeometry,
    new: NewTokens | None = None,
) -> Accepted:
    """Raise unless q [B, N, Hq, Dk], the pages of three branches, gates [B, N, Hq, 3] and counts int32 [B] fit.

    On a CPU, where reading them is free, counts must lie within 0..N and the lengths, and those must be of one batch;
    but for the lengths of cmp if there are `new` tokens, which fit too: `check_new`.

    Shapes, dtypes and devices that were found right once are not looked at again: see `decode_facts`.
    """
    if torch.compiler.is_compiling():
        _check_decode(q, q_cmp, cmp, slc, win, gates, counts, blocks, new)
        if q.device.type == "cpu":
            _check_lengths(q.shape[1], cmp[0], slc[0], win[0], counts, blocks, stored=new is None)
        return accept(None)
    arguments = (q, q_cmp, *cmp, *slc, *win, gates, counts, blocks, new)
    accepted = already_checked(arguments)
    if accepted is not None:
        return accepted
    facts = decode_facts(arguments)
    accepted = accepted_before(facts)
    if accepted is None:
        _check_decode(q, q_cmp, cmp, slc, win, gates, counts, blocks, new)
        accepted = accept(facts)
    if q.device.type == "cpu":
        _check_lengths(q.shape[1], cmp[0], slc[0], win[0], counts, blocks, stored=new is None)
    return accepted


def _check_decode(
    q: Tensor,
    q_cmp: Tensor,
    cmp: tuple[PagedKV, PagedKV],
    slc: tuple[PagedKV, PagedKV],
    win: tuple[PagedKV, PagedKV],
    gates: Tensor,
    counts: Tensor,
    blocks: BlockGeometry,
    new: NewTokens | None,
) -> None:
    if not isinstance(blocks, BlockGeometry):
        raise TypeError(f"blocks: expected a BlockGeometry, got {type(blocks).__name__}")
    for name, x in (("q", q), ("q_cmp", q_cmp), ("gates", gates), ("counts", counts)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if q.ndim != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q: expected shape [B, N, heads, head_dim], got {list(q.shape)}")
    if q.dtype not in FLOATS:
        raise TypeError(f"q: expected a floating dtype, got {q.dtype}")
    if q_cmp.shape != q.shape or q_cmp.dtype != q.dtype or q_cmp.device != q.device:
        raise ValueError(f"q_cmp: expected {q.dtype} {list(q.shape)} of q, got {q_cmp.dtype} {list(q_cmp.shape)}")
    if gates.shape != (*q.shape[:3], 3) or not gates.is_floating_point() or gates.device != q.device:
        raise ValueError(
            f"gates: expected shape {[*q.shape[:3], 3]} on {q.device}, got {gates.dtype} {list(gates.shape)} "
            f"on {gates.device}"
        )
    if counts.dtype != torch.int32 or counts.shape != q.shape[:1] or counts.device != q.device:
        raise ValueError(
            f"counts: expected torch.int32 [{q.shape[0]}] on {q.device}, got {counts.dtype} {list(counts.shape)} "
            f"on {counts.device}"
        )
    streams = {"cmp": cmp, "slc": slc, "win": win}
    pages = {f"{side}_{name}": kv for name, both in streams.items() for side, kv in zip("kv", both, strict=True)}
    for name, kv in pages.items():
        if not isinstance(kv, PagedKV):
            raise TypeError(f"{name}: expected a PagedKV, got {type(kv).__name__}")
    for name, kv in pages.items():
        _check_pages(name, kv, q, slc[0])
    for name, (k, v) in streams.items():
        if k.head_dim != q.shape[3]:
            raise ValueError(f"k_{name}: expected head_dim {q.shape[3]} of q, got {k.head_dim}")
        if v.head_dim != slc[1].head_dim:
            raise ValueError(f"v_{name}: expected head_dim {slc[1].head_dim} of v_slc, got {v.head_dim}")
    if new is not None:
        check_new(new, q.shape[1], cmp[0], slc, blocks)


def check_new(new: NewTokens, rows: int, k_cmp: PagedKV, slc: tuple[PagedKV, PagedKV], blocks: BlockGeometry) -> None:
    """Raise unless `new` are `rows` tokens for each sequence of pages that `check_decode` found to fit one another."""
    if not isinstance(new, NewTokens):
        raise TypeError(f"new: expected NewTokens or None, got {type(new).__name__}")
    cmp, batch, heads, size = new.cmp, slc[0].block_table.shape[0], slc[0].num_heads, blocks.kernel_size
    shapes = [(batch, rows, heads, kv.head_dim) for kv in slc]
    for i, side in enumerate("kv"):
        _check_new_rows(f"new.{side}_slc", (new.k_slc, new.v_slc)[i], shapes[i], slc[0])
        _check_new_rows(f"new.{side}_win", (new.k_win, new.v_win)[i], shapes[i], slc[0])
    if isinstance(cmp, CompletedBlocks):
        most = (rows - 1) // blocks.kernel_stride + 1
        for i, side in enumerate("kv"):
            _check_new_rows(f"new.cmp.{side}", (cmp.k, cmp.v)[i], (batch, most, *shapes[i][2:]), slc[0])
        return
    if not isinstance(cmp, PooledTokens):
        raise TypeError(f"new.cmp: expected PooledTokens or CompletedBlocks, got {type(cmp).__name__}")
    for i, side in enumerate("kv"):
        _check_new_rows(f"new.cmp.{side}", (cmp.k, cmp.v)[i], shapes[i], slc[0])
        _check_ring(f"new.cmp.{side}_tail", (cmp.k_tail, cmp.v_tail)[i], shapes[i], size - 1 + rows, slc[0])
        _check_weights(f"new.cmp.{side}_weights", (cmp.k_weights, cmp.v_weights)[i], (heads, size), slc[0])
    if cmp.k_tail.shape[1] != cmp.v_tail.shape[1]:
        raise ValueError(f"new.cmp.v_tail: expected {cmp.k_tail.shape[1]} rows of k_tail, got {cmp.v_tail.shape[1]}")
    if cmp.rotation is not None:
        _check_rotation(cmp.rotation, k_cmp)


def _check_new_rows(name: str, x: Tensor, shape: tuple[int, ...], pages: PagedKV) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype != pages.dtype:
        raise TypeError(f"{name}: expected dtype {pages.dtype} of the pages, got {x.dtype}")
    if x.device != pages.device:
        raise ValueError(f"{name}: expected device {pages.device} of the pages, got {x.device}")


def _check_ring(name: str, x: Tensor, rows: tuple[int, ...], least: int, pages: PagedKV) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] < least:
        raise ValueError(f"{name}: expected a ring of at least {least} rows, kernel_size - 1 + N, got {list(x.shape)}")
    _check_new_rows(name, x, (rows[0], x.shape[1], *rows[2:]), pages)


def _check_weights(name: str, x: Tensor | None, shape: tuple[int, ...], pages: PagedKV) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(x).__name__}")
    if x.shape != shape or not x.is_floating_point() or x.device != pages.device:
        raise ValueError(
            f"{name}: expected floating {list(shape)} on {pages.device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def _check_rotation(x: Tensor, k_cmp: PagedKV) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"new.cmp.rotation: expected a tensor or None, got {type(x).__name__}")
    if k_cmp.head_dim % 2:
        raise ValueError(f"new.cmp.rotation: expected None for keys of odd head_dim {k_cmp.head_dim}, got a tensor")
    wide = torch.float64 if k_cmp.dtype == torch.float64 else torch.float32
    if x.dtype != wide or x.device != k_cmp.device:
        raise ValueError(f"new.cmp.rotation: expected {wide} on {k_cmp.device}, got {x.dtype} on {x.device}")
    room, half = k_cmp.block_table.shape[1] * k_cmp.page_size, k_cmp.head_dim // 2
    if x.ndim != 3 or x.shape[0] != 2 or x.shape[1] < room or x.shape[2] != half:
        raise ValueError(
            f"new.cmp.rotation: expected shape [2, blocks, {half}] of at least the {room} blocks that k_cmp's "
            f"block_table has room for, got {list(x.shape)}"
        )


def _check_pages(name: str, x: PagedKV, q: Tensor, k_slc: PagedKV) -> None:
    if x.k_scale is not None or x.v_scale is not None:
        raise ValueError(f"{name}: expected pages without k_scale and v_scale (fp8 is not implemented), got scales")
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected dtype {q.dtype} of q, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} of q, got {x.device}")
    if x.block_table.shape[0] != q.shape[0]:
        raise ValueError(f"{name}: expected {q.shape[0]} sequences of q, got {x.block_table.shape[0]} in block_table")
    if x.num_heads != k_slc.num_heads or x.num_heads == 0 or q.shape[2] % x.num_heads:
        raise ValueError(
            f"{name}: expected kv heads that divide q's {q.shape[2]} heads, the same of every branch, got {x.num_heads}"
        )


def _check_lengths(
    rows: int,
    k_cmp: PagedKV,
    k_slc: PagedKV,
    k_win: PagedKV,
    counts: Tensor,
    blocks: BlockGeometry,
    stored: bool,
) -> None:
    if bool(((counts < 0) | (counts > rows) | (counts > k_slc.lengths)).any()):
        raise ValueError(
            f"counts: expected 0 to {rows}, and at most the lengths {k_slc.lengths.tolist()}, got {counts.tolist()}"
        )
    lengths, compressed = k_slc.lengths.tolist(), blocks.num_compressed(k_slc.lengths).tolist()
    for name, x, expected in (("k_win", k_win, lengths), ("k_cmp", k_cmp, compressed), ("k_slc", k_slc, lengths)):
        if (stored or x is not k_cmp) and x.lengths.tolist() != expected:
            raise ValueError(f"{name}: expected lengths {expected} as k_slc has them, got {x.lengths.tolist()}")
        room = x.block_table.shape[1] * x.page_size
        if max(expected, default=0) > room:
            raise ValueError(f"{name}: expected lengths of at most the {room} rows in block_table, got {expected}")


def scale_or_default(scale: float | None, head_dim: int) -> float:
    """`scale`, or 1/sqrt(head_dim) for None; a ValueError unless it is finite and positive."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a finite number above 0, got {scale}")
    return float(scale)
