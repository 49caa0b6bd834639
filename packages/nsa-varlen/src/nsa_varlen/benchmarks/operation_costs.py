"""What an operation has to compute, and to move at least, counted from sizes alone: each tensor once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from nsa_varlen.benchmarks.sizes import seen_compressed, seen_selected, seen_window
from nsa_varlen.benchmarks.workload import Value
from nsa_varlen.geometry import BlockGeometry

LSE = INDEX = 4  # bytes of a number


@dataclass(frozen=True)
class Sizes:
    """Of `batch` sequences of S tokens.

    Fields:
        dim, blocks: head_dim, and the geometry.
        rows: rows of q, of all heads; also of an output.
        kv_rows, cmp_rows: rows of k, and of k_cmp, of all kv heads.
        row: bytes of a row; itemsize: of a number.
        indices: bytes of block_indices.
        pairs: by operation, pairs of a query row and a key that it sees.
    """

    dim: int
    blocks: BlockGeometry
    rows: int
    kv_rows: int
    cmp_rows: int
    row: int
    itemsize: int
    indices: int
    pairs: Mapping[str, int]


def sizes(parameters: Mapping[str, Value]) -> Sizes:
    """Of a workload's parameters."""
    tokens, batch, heads, kv_heads, dim = (
        int(parameters[name]) for name in ("S", "batch", "num_heads", "num_kv_heads", "head_dim")
    )
    blocks = BlockGeometry(**{field.name: int(parameters[field.name]) for field in fields(BlockGeometry)})
    itemsize = getattr(torch, str(parameters["dtype"])).itemsize
    compressed = batch * heads * seen_compressed(tokens, blocks)
    return Sizes(
        dim=dim,
        blocks=blocks,
        rows=batch * tokens * heads,
        kv_rows=batch * tokens * kv_heads,
        cmp_rows=batch * blocks.num_compressed(tokens) * kv_heads,
        row=dim * itemsize,
        itemsize=itemsize,
        indices=INDEX * batch * tokens * kv_heads * blocks.topk,
        pairs={
            "compressed_attention": compressed,
            "select_blocks": compressed,
            "selected_attention": batch * heads * seen_selected(tokens, blocks),
            "window_attention": batch * heads * seen_window(tokens, blocks.window_size),
        },
    )


def forward_cost(op: str, parameters: Mapping[str, Value]) -> tuple[float, float]:
    """(flops, bytes). A product of two rows is 2 * head_dim operations; attention takes two for each pair that is seen.

    `select_blocks` has the log-sum-exp, so that one product is left; what follows it is little.
    """
    of = sizes(parameters)
    if op == "compress_mean":
        return float(of.blocks.kernel_size * of.dim * of.cmp_rows), float(of.row * (of.kv_rows + of.cmp_rows))
    if op == "combine":
        return 5.0 * of.dim * of.rows, float(4 * of.row * of.rows + 3 * of.itemsize * of.rows)
    if op == "decode_attention":
        return decode_cost(parameters)
    flops, lse = 2.0 * of.dim * of.pairs[op], LSE * of.rows
    if op == "select_blocks":
        return flops, float(of.row * (of.rows + of.cmp_rows) + lse + of.indices)
    keys = of.cmp_rows if op == "compressed_attention" else of.kv_rows
    indices = of.indices if op == "selected_attention" else 0
    return 2 * flops, float(2 * of.row * (of.rows + keys) + lse + indices)  # q, out, k, v


def backward_cost(op: str, parameters: Mapping[str, Value]) -> tuple[float, float]:
    """(flops, bytes). Attention takes five products for each pair: q.k and do.v anew, and those of dq, dk and dv.

    It reads q, k, v, out, its gradient and the log-sum-exp, and writes dq, dk and dv.
    """
    of = sizes(parameters)
    if op == "compress_mean":
        return float(of.blocks.kernel_size * of.dim * of.cmp_rows), float(of.row * (of.kv_rows + of.cmp_rows))
    if op == "combine":  # the branches' results, their gradients, that of the sum; the gates and their gradient
        return 9.0 * of.dim * of.rows, float(7 * of.row * of.rows + 6 * of.itemsize * of.rows)
    keys = of.cmp_rows if op == "compressed_attention" else of.kv_rows
    indices = of.indices if op == "selected_attention" else 0
    return 10.0 * of.dim * of.pairs[op], float(4 * of.row * (of.rows + keys) + LSE * of.rows + indices)


def decode_cost(parameters: Mapping[str, Value]) -> tuple[float, float]:
    """(flops, bytes) of one token a sequence: q, out, gates, and each row of k and v that is seen."""
    tokens, batch, heads, kv_heads = (int(parameters[name]) for name in ("S", "batch", "num_heads", "num_kv_heads"))
    of = sizes(parameters)
    keys = of.blocks.num_compressed(tokens) + last_selected(tokens, of.blocks) + min(tokens, of.blocks.window_size)
    moved = of.row * (2 * heads + 2 * kv_heads * keys) + 3 * of.itemsize * heads + INDEX * kv_heads * of.blocks.topk
    return 4.0 * of.dim * batch * heads * keys, float(batch * moved)


def last_selected(tokens: int, blocks: BlockGeometry) -> int:
    """Keys of the blocks that the last of S queries chooses: its own one ends with it.

    Example:
        >>> blocks = BlockGeometry()
        >>> last_selected(70, blocks), last_selected(4096, blocks), last_selected(4097, blocks)
        (70, 1024, 961)
    """
    chosen = min(blocks.topk, blocks.num_blocks(tokens))
    return (chosen - 1) * blocks.block_size + (tokens - 1) % blocks.block_size + 1 if tokens else 0
