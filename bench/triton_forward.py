"""The Triton forward on a GPU beside dense attention, in one run: `python bench/triton_forward.py --out FILE`.

`whole` is one `nsa_attention` call and the mean pooling of its keys and values, routed in preset perf as it ships
(NSA_CHECK_FINITE=off leaves out the look at every result); `graph` is that in a CUDA graph, without the host's part.
The other rows are single operations of backend `triton` (and, for the compressed branch, of `cudnn`). Dense attention
is torch's FlashAttention-2 and cuDNN. One sequence, bf16, head_dim 128, default block sizes.

Random and smooth inputs are those of `cases`; `union8` says how many different blocks eight neighbours choose between
them (16 each). `selected_attention` runs on the blocks that `select_blocks` chose for those inputs.

What is timed is checked first, against the oracle at 2,048 tokens. Variants of a row take turns; before each call 2 GB
are written over, which empties the L2 cache and hides the launches. `floor_ms` is the larger of operations over 692
TFLOP/s and bytes, each tensor once, over 3.0 TB/s: rates that this kind of GPU reached.
"""

import os
from functools import partial

os.environ.setdefault("NSA_PRESET", "perf")

import torch
from cases import BLOCKS, DENSE, Inputs, asked, floor_ms, sizes
from nsa import nsa_attention, ops
from nsa_fa2 import CUDNN
from nsa_kernels_triton import BACKEND
from nsa_varlen import masks, reference
from nsa_varlen.testing import assert_within_budget, plain_attention
from timing import Run, header, measure, quartiles, told, write
from torch import Tensor

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


def whole(made: Inputs) -> Tensor:
    q, k, v, layout = made.q, made.k, made.v, made.layout
    k_cmp, v_cmp = (ops.compress_mean(x, layout, BLOCKS) for x in (k, v))
    return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, made.gates, layout, BLOCKS)


def graph(run: Run) -> Run:
    """`run`, captured: a second run of it has measured what the first could not know."""
    for _ in range(2):
        run()
        torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def operations(made: Inputs) -> dict[str, dict[str, Run]]:
    args = made.layout, BLOCKS
    outs = made.o_cmp, made.o_cmp.clone(), made.o_cmp.clone()
    cmp = made.q, made.k_cmp, made.v_cmp, *args
    return {
        "compress_mean": {"triton": partial(BACKEND.compress_mean, made.k, *args)},
        "compressed_attention": {
            "triton": partial(BACKEND.compressed_attention, *cmp),
            "cudnn": partial(CUDNN.compressed_attention, *cmp),
        },
        "select_blocks": {"triton": partial(BACKEND.select_blocks, made.q, made.k_cmp, made.lse, *args)},
        "selected_attention": {
            "triton": partial(BACKEND.selected_attention, made.q, made.k, made.v, made.indices, *args)
        },
        "window_attention": {"triton": partial(BACKEND.window_attention, made.q, made.k, made.v, *args)},
        "combine": {"triton": partial(BACKEND.combine, made.gates, *outs)},
    }


def floors(shape: str, tokens: int) -> dict[str, float]:
    """Milliseconds that no implementation of an operation goes below, by what it has to compute and to move.

    Attention takes two products a query and key, q.k and p.v; scores take one.
    """
    of = sizes(shape, tokens)
    found = {
        "compress_mean": floor_ms(0, of.kv + of.kv_cmp),
        "compressed_attention": floor_ms(2 * of.compressed, 2 * of.q + 2 * of.kv_cmp),
        "select_blocks": floor_ms(of.compressed, of.q + of.kv_cmp + of.indices),
        "selected_attention": floor_ms(2 * of.selected, 2 * of.q + 2 * of.kv + of.indices),
        "window_attention": floor_ms(2 * of.window, 2 * of.q + 2 * of.kv),
        "combine": floor_ms(0, 4 * of.q),
        "dense": floor_ms(2 * of.dense, 2 * of.q + 2 * of.kv),
    }
    return found | {"whole": sum(found.values()) - found["dense"] + found["compress_mean"]}


def check(shape: str) -> None:
    """Every timed operation within the budget of the dtype at 2,048 tokens, or no timing."""
    made = Inputs(BACKEND, shape, 2048, smooth=False)
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
    assert_within_budget(whole(made), summed, reference.combine(doubles["gates"], *exact), "whole")


def measured(row: str, shape: str, tokens: int, inputs: str, union8: float, runs: dict[str, Run], repeats: int):
    floor = floors(shape, tokens)
    found = []
    for name, times in measure(runs, repeats).items():
        kind = "dense" if "dense" in name else row
        numbers = *quartiles(times.gpu), len(times.gpu), f"{floor[kind]:.3f}", f"{union8:.1f}"
        found.append(told(FIELDS, (row, shape, tokens, inputs, name, *numbers)))
    return found


def main() -> None:
    given = asked("the Triton forward beside dense attention", [8_192, 16_384, 65_536])
    import triton

    versions = f"torch {torch.__version__}", f"triton {triton.__version__}", f"cuDNN {torch.backends.cudnn.version()}"
    look = os.environ.get("NSA_CHECK_FINITE", "flag")
    comment = header("triton_forward.py", *versions, f"NSA_CHECK_FINITE={look}")
    print(comment, FIELDS, sep="\n")
    rows = []
    with torch.no_grad():
        for shape in given.shapes:
            check(shape)
            for tokens in given.tokens:
                for kind in ("random", "smooth"):
                    made = Inputs(BACKEND, shape, tokens, kind == "smooth")
                    union8 = made.union8()
                    runs = {"nsa": partial(whole, made), "graph": graph(partial(whole, made))}
                    if kind == "random":
                        runs |= {name: partial(dense, made.q, made.k, made.v) for name, dense in DENSE.items()}
                    rows += measured("whole", shape, tokens, kind, union8, runs, given.repeats)
                    del runs
                    for row, runs in operations(made).items():
                        if kind == "random" or row == "selected_attention":
                            rows += measured(row, shape, tokens, kind, union8, runs, given.repeats)
                    del made, runs
                    torch.cuda.empty_cache()
    if given.out:
        write(given.out, FIELDS, rows, comment)


if __name__ == "__main__":
    main()
