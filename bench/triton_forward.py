"""The Triton forward on a GPU beside dense attention, in one run: `python bench/triton_forward.py --out FILE`.

`whole` is one `nsa_attention` call and the mean pooling of its keys and values, routed in preset perf as it ships
(NSA_CHECK_FINITE=off leaves out the look at every result); `graph` is that in a CUDA graph, without the host's part.
The other rows are single operations of backend `triton` (and, for the compressed branch, of `cudnn`). Dense attention
is torch's FlashAttention-2 and cuDNN. One sequence, bf16, head_dim 128, default block sizes.

Random inputs: neighbouring queries are independent, so they choose unrelated blocks. Smooth inputs: each query is the
average of the last `SMOOTHED` of a random walk's steps, so neighbours choose much the same; `union8` says how many
different blocks eight neighbours choose between them (16 each). `selected_attention` runs on the blocks that
`select_blocks` chose for those inputs.

What is timed is checked first, against the oracle at 2,048 tokens. Variants of a row take turns; before each call 2 GB
are written over, which empties the L2 cache and hides the launches. `floor_ms` is the larger of operations over 692
TFLOP/s and bytes, each tensor once, over 3.0 TB/s: rates that this kind of GPU reached.
"""

import argparse
import csv
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("NSA_PRESET", "perf")

import torch
from nsa import nsa_attention, ops
from nsa_fa2 import CUDNN
from nsa_kernels_triton import BACKEND
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.testing import assert_within_budget, plain_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCKS = BlockGeometry()
SHAPES = {"g16": (64, 4), "g4": (32, 8), "g1": (16, 16)}  # query heads, kv heads
DIM, DTYPE = 128, torch.bfloat16
SMOOTHED = 1024
FIELDS = (
    "row",
    "shape",
    "tokens",
    "inputs",
    "variant",
    "median_ms",
    "p25_ms",
    "p75_ms",
    "repeats",
    "floor_ms",
    "union8",
)

Run = Callable[[], object]


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
    """q, k, v, gates of one sequence, and what each operation makes of them."""

    def __init__(self, shape: str, tokens: int, smooth: bool) -> None:
        heads, kv_heads = SHAPES[shape]
        self.layout = VarlenLayout.from_lengths([tokens], device="cuda")
        self.q = queries(tokens, heads, smooth)
        self.k, self.v = (normal(tokens, kv_heads, DIM, seed=seed) for seed in (1, 2))
        self.gates = normal(tokens, heads, 3, seed=3).sigmoid()
        self.k_cmp, self.v_cmp = (BACKEND.compress_mean(x, self.layout, BLOCKS) for x in (self.k, self.v))
        self.o_cmp, self.lse = BACKEND.compressed_attention(self.q, self.k_cmp, self.v_cmp, self.layout, BLOCKS)
        self.indices = BACKEND.select_blocks(self.q, self.k_cmp, self.lse, self.layout, BLOCKS)

    def union8(self) -> float:
        """Different blocks among those of eight neighbouring queries, on average, in the second half."""
        rows = self.indices[len(self.indices) // 2 :]
        eight = rows.transpose(0, 1).reshape(-1, 8 * rows.shape[-1]).sort(-1).values
        return float((eight.diff() != 0).sum(-1).float().mean()) + 1

    def whole(self) -> Tensor:
        k_cmp, v_cmp = (ops.compress_mean(x, self.layout, BLOCKS) for x in (self.k, self.v))
        return nsa_attention(
            *(self.q, k_cmp, v_cmp, self.k, self.v, self.k, self.v, self.gates, self.layout, BLOCKS),
        )

    def graph(self) -> Run:
        """`whole`, captured: a second run of it has measured what the first could not know."""
        for _ in range(2):
            self.whole()
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.whole()
        return graph.replay

    def rows(self) -> dict[str, dict[str, Run]]:
        args = self.layout, BLOCKS
        outs = self.o_cmp, self.o_cmp.clone(), self.o_cmp.clone()
        cmp = self.q, self.k_cmp, self.v_cmp, *args
        return {
            "compress_mean": {"triton": partial(BACKEND.compress_mean, self.k, *args)},
            "compressed_attention": {
                "triton": partial(BACKEND.compressed_attention, *cmp),
                "cudnn": partial(CUDNN.compressed_attention, *cmp),
            },
            "select_blocks": {"triton": partial(BACKEND.select_blocks, self.q, self.k_cmp, self.lse, *args)},
            "selected_attention": {
                "triton": partial(BACKEND.selected_attention, self.q, self.k, self.v, self.indices, *args)
            },
            "window_attention": {"triton": partial(BACKEND.window_attention, self.q, self.k, self.v, *args)},
            "combine": {"triton": partial(BACKEND.combine, self.gates, *outs)},
        }

    def dense(self) -> dict[str, Run]:
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))

        def run(kind: SDPBackend) -> Tensor:
            with sdpa_kernel(kind):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return {
            "FA-2 dense": lambda: run(SDPBackend.FLASH_ATTENTION),
            "cuDNN dense": lambda: run(SDPBackend.CUDNN_ATTENTION),
        }


def floors(shape: str, tokens: int) -> dict[str, float]:
    """Milliseconds that no implementation of an operation goes below, by what it has to compute and to move."""
    heads, kv_heads = SHAPES[shape]
    compressed = BLOCKS.num_compressed(tokens)
    pair = 4.0 * DIM * heads  # operations a query and key: q.k and p.v
    row = 2.0 * DIM  # bytes
    q, kv = tokens * heads * row, tokens * kv_heads * row
    kv_cmp, chosen = compressed * kv_heads * row, 4.0 * tokens * kv_heads * BLOCKS.topk
    parts = {
        "compress_mean": (0.0, kv + kv_cmp),
        "compressed_attention": (pair * tokens * compressed / 2, 2 * q + 2 * kv_cmp),
        "select_blocks": (pair * tokens * compressed / 4, q + kv_cmp + chosen),
        "selected_attention": (pair * tokens * BLOCKS.topk * BLOCKS.block_size, 2 * q + 2 * kv + chosen),
        "window_attention": (pair * tokens * BLOCKS.window_size, 2 * q + 2 * kv),
        "combine": (0.0, 4 * q),
        "dense": (pair * tokens * tokens / 2, 2 * q + 2 * kv),
    }
    found = {name: 1e3 * max(flop / 692e12, size / 3.0e12) for name, (flop, size) in parts.items()}
    return found | {"whole": sum(found.values()) - found["dense"] + found["compress_mean"]}


def check(shape: str) -> None:
    """Every timed operation within the budget of the dtype at 2,048 tokens, or no timing."""
    made = Inputs(shape, 2048, smooth=False)
    q, k, v, layout = made.q, made.k, made.v, made.layout
    doubles = {name: getattr(made, name).double() for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates")}
    branches = {
        "compressed_attention": ((made.k_cmp, made.v_cmp), masks.compressed_mask(layout, BLOCKS)[:, None]),
        "selected_attention": ((k, v, made.indices), masks.selected_mask(made.indices, layout, BLOCKS)),
        "window_attention": ((k, v), masks.window_mask(layout, BLOCKS)[:, None]),
    }
    plain, exact = [], []
    for name, (rest, mask) in branches.items():
        wide = [x.double() if x.is_floating_point() else x for x in rest]
        exact.append(getattr(reference, name)(doubles["q"], *wide, layout, BLOCKS)[0])
        plain.append(plain_attention(q, *rest[:2], mask))
        for backend in (BACKEND, *((CUDNN,) if name == "compressed_attention" else ())):
            out, _ = getattr(backend, name)(q, *rest, layout, BLOCKS)
            assert_within_budget(out, plain[-1], exact[-1], f"{name} of {backend.name}")
    summed = torch.einsum("thc,cthd->thd", made.gates, torch.stack(plain))
    assert_within_budget(made.whole(), summed, reference.combine(doubles["gates"], *exact), "whole")


def measure(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, by events, taking turns."""
    flush = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, repeats):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            runs[name]()
            end.record()
            end.synchronize()
            if turn >= 0:
                times[name].append(start.elapsed_time(end))
    return times


def measured(row: str, shape: str, tokens: int, inputs: str, union8: float, runs: dict[str, Run], repeats: int):
    floor = floors(shape, tokens)
    found = []
    for name, times in measure(runs, repeats).items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        kind = "dense" if "dense" in name else row
        numbers = (*(f"{x:.4f}" for x in (median, low, high)), len(times), f"{floor[kind]:.3f}", f"{union8:.1f}")
        found.append(dict(zip(FIELDS, (row, shape, tokens, inputs, name, *numbers), strict=True)))
        print(",".join(str(found[-1][field]) for field in FIELDS), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="the Triton forward beside dense attention")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8_192, 16_384, 65_536])
    parser.add_argument("--repeats", type=int, default=11)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}, cuDNN {torch.backends.cudnn.version()}"
    look = os.environ.get("NSA_CHECK_FINITE", "flag")
    header = f"# {torch.cuda.get_device_name()}, {versions}, NSA_CHECK_FINITE={look}; bench/triton_forward.py"
    print(header, FIELDS, sep="\n")
    rows = []
    with torch.no_grad():
        for shape in given.shapes:
            check(shape)
            for tokens in given.tokens:
                for kind in ("random", "smooth"):
                    made = Inputs(shape, tokens, kind == "smooth")
                    union8 = made.union8()
                    more = made.dense() if kind == "random" else {}
                    whole = {"nsa": made.whole, "graph": made.graph(), **more}
                    rows += measured("whole", shape, tokens, kind, union8, whole, given.repeats)
                    del whole, more
                    for row, runs in made.rows().items():
                        if kind == "random" or row == "selected_attention":
                            rows += measured(row, shape, tokens, kind, union8, runs, given.repeats)
                    del made
                    torch.cuda.empty_cache()
    if given.out:
        with given.out.open("w", newline="", encoding="utf-8") as file:
            file.write(f"{header}\n")
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
