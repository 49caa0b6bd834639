"""What scripts here run on a GPU: one sequence, bf16, head_dim 128, default block sizes, three shapes of heads.

Random inputs: neighbouring queries are independent, so they choose unrelated blocks. Smooth inputs: each query is the
average of the last `SMOOTHED` of a random walk's steps, so neighbours choose much the same.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCKS = BlockGeometry()
SHAPES = {"g16": (64, 4), "g4": (32, 8), "g1": (16, 16)}  # query heads, kv heads
DIM, DTYPE = 128, torch.bfloat16
SMOOTHED = 1024
FLOPS, BANDWIDTH = 692e12, 3.0e12  # a second: bf16 matrix products, bytes copied, as an H100 reached them


def command(about: str) -> argparse.ArgumentParser:
    """What the command lines of scripts that run these shapes have in common."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=11)
    return parser


def asked(about: str, tokens: list[int]) -> argparse.Namespace:
    """The command line of a script that runs these shapes, by default at `tokens`; it ends without a CUDA device."""
    parser = command(about)
    parser.add_argument("--tokens", nargs="+", type=int, default=tokens)
    return on_cuda(parser)


def on_cuda(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says, or the end, without a CUDA device."""
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    return given


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=DTYPE)


def queries(tokens: int, heads: int, smooth: bool) -> Tensor:
    """Unit normal; smooth ones change slowly from one row to the next."""
    if not smooth:
        return normal(tokens, heads, DIM, seed=0)
    made = []
    for head in range(heads):
        steps = normal(tokens + SMOOTHED, DIM, seed=100 + head).double().cumsum(0)
        made.append(((steps[SMOOTHED:] - steps[:-SMOOTHED]) * SMOOTHED**-0.5).to(DTYPE))
    return torch.stack(made, 1)


class Inputs:
    """q, k, v, gates of one sequence, and what each operation of a backend makes of them."""

    def __init__(self, backend: Any, shape: str, tokens: int, smooth: bool) -> None:
        heads, kv_heads = SHAPES[shape]
        self.layout = VarlenLayout.from_lengths([tokens], device="cuda")
        self.q = queries(tokens, heads, smooth)
        self.k, self.v = (normal(tokens, kv_heads, DIM, seed=seed) for seed in (1, 2))
        self.gates = normal(tokens, heads, 3, seed=3).sigmoid()
        self.k_cmp, self.v_cmp = (backend.compress_mean(x, self.layout, BLOCKS) for x in (self.k, self.v))
        self.o_cmp, self.lse = backend.compressed_attention(self.q, self.k_cmp, self.v_cmp, self.layout, BLOCKS)
        self.indices = backend.select_blocks(self.q, self.k_cmp, self.lse, self.layout, BLOCKS)

    def union8(self) -> float:
        """Different blocks among those of eight neighbouring queries, on average, in the second half."""
        rows = self.indices[len(self.indices) // 2 :]
        eight = rows.transpose(0, 1).reshape(-1, 8 * rows.shape[-1]).sort(-1).values
        return float((eight.diff() != 0).sum(-1).float().mean()) + 1


def _dense(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(kind):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


# Causal attention of q [T, Hq, D] over all of k, v [T, Hk, D], by torch's kernels: [T, Hq, D].
DENSE = {
    "FA-2 dense": partial(_dense, SDPBackend.FLASH_ATTENTION),
    "cuDNN dense": partial(_dense, SDPBackend.CUDNN_ATTENTION),
}


def gradients(run: Callable[..., Tensor], args: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The backward alone, of a forward that runs once, when the backward is first asked for.

    With respect to every argument that is no index; what comes from above is unit normal.
    """
    kept: list = []

    def backward() -> tuple[Tensor, ...]:
        if not kept:
            leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in args]
            out = run(*leaves)
            grad_out = normal(*out.shape, seed=9).to(out.dtype)
            kept.extend((out, [x for x in leaves if x.requires_grad], grad_out))
        return torch.autograd.grad(*kept, retain_graph=True)

    return backward


class Sizes(NamedTuple):
    """What there is to move and to look at.

    Fields:
        q, kv, kv_cmp, indices, gates: bytes of q (or any tensor of its shape), of k, of k_cmp, of the blocks chosen, of
            the gates.
        compressed, selected, window, dense: pairs of a query and a key that it sees, over all query heads.
    """

    q: float
    kv: float
    kv_cmp: float
    indices: float
    gates: float
    compressed: float
    selected: float
    window: float
    dense: float


def sizes(shape: str, tokens: int) -> Sizes:
    heads, kv_heads = SHAPES[shape]
    compressed, rows = BLOCKS.num_compressed(tokens), tokens * heads
    return Sizes(
        q=2.0 * DIM * rows,
        kv=2.0 * DIM * tokens * kv_heads,
        kv_cmp=2.0 * DIM * compressed * kv_heads,
        indices=4.0 * tokens * kv_heads * BLOCKS.topk,
        gates=2.0 * 3 * rows,
        compressed=rows * compressed / 2,
        selected=rows * BLOCKS.topk * BLOCKS.block_size,
        window=rows * BLOCKS.window_size,
        dense=rows * tokens / 2,
    )


def floor_ms(products: float, size: float) -> float:
    """Milliseconds that no implementation goes below.

    Args:
        products: of one row with one row, DIM multiplications and additions each.
        size: bytes, each tensor once.
    """
    return 1e3 * max(2.0 * DIM * products / FLOPS, size / BANDWIDTH)
