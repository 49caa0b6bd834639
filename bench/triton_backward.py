"""The Triton backward on a GPU beside dense attention, in one run: `python bench/triton_backward.py --out FILE`.

What is timed is the backward alone: the forward runs once, then `torch.autograd.grad` is called again and again on what
it kept, for a gradient of the output that is unit normal. `whole` is `nsa_attention` with the mean pooling of its keys
and values, routed in preset perf as it ships, on blocks that were chosen beforehand (`select_blocks` has no backward),
with gradients for q, k, v and gates. The other rows are single operations:

- `triton`, and of the selected branch also with `deterministic=True`;
- `cudnn`, the compressed branch through the fold, and `plan: NAME`, what routing takes at that length, routed;
- `fa2` (or `fa2-torch`, where flash-attn is not installed), the window through nsa-fa2, and `bare FA-2`, the call of
  flash-attn alone;
- `FA-2 dense` and `cuDNN dense`, torch's causal attention to everything: `DENSE_REPEATS` turns, for they are slow.

Inputs are those of `cases`, random for every row and smooth for those that read chosen blocks; `union8` says how many
different blocks eight neighbours choose between them (16 each). Variants of a row take turns, see `timing`.

What is timed is checked first, every shape before anything is timed: each gradient at 2,048 tokens within the budget of
the dtype, against the oracle's in fp64. `floor_ms` is the larger of operations over 692 TFLOP/s and bytes, each tensor
once, over 3.0 TB/s: rates that an H100 reached. `peak_mib` is what one backward takes beyond all that lives before it,
the gradients that it returns included.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

os.environ.setdefault("NSA_PRESET", "perf")

import torch
from cases import BLOCKS, DENSE, DIM, DTYPE, Inputs, asked, floor_ms, gradients, normal, sizes
from nsa import nsa_attention, ops
from nsa_fa2 import CUDNN, FA2, FA2_TORCH
from nsa_kernels_triton import BACKEND
from nsa_routing import plan_for
from nsa_routing.workload import Workload
from nsa_varlen import masks, reference
from nsa_varlen.testing import assert_within_budget, plain_attention
from timing import header, measure, peak, quartiles, told, write
from torch import Tensor

CHECKED = 2048  # tokens
DENSE_REPEATS = 3
FLASH_ATTN = find_spec("flash_attn") is not None
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
    "peak_mib",
)

Forward = Callable[..., Tensor]


class Operation(NamedTuple):
    """One row of the table.

    Fields:
        leaves: what gradients are taken to, by name.
        variants: forwards to time the backward of. These and the next two are functions of the leaves.
        exact: the oracle's forward, for leaves in fp64.
        plain: plain torch's, every step in the leaves' dtype. Both hold whole masks: for CHECKED tokens only.
    """

    leaves: dict[str, Tensor]
    variants: dict[str, Forward]
    exact: Forward
    plain: Forward


def operations(made: Inputs) -> dict[str, Operation]:
    layout, indices = made.layout, made.indices
    args = layout, BLOCKS
    raw = {"q": made.q, "k": made.k, "v": made.v}
    outs = {name: normal(*made.q.shape, seed=20 + i) for i, name in enumerate(("o_cmp", "o_slc", "o_win"))}
    fa2 = FA2 if FLASH_ATTN else FA2_TORCH

    def attention(op: Callable[..., tuple[Tensor, Tensor]], **options: bool) -> Forward:
        return lambda q, k, v: op(q, k, v, *args, **options)[0]

    def selected(op: Callable[..., tuple[Tensor, Tensor]], **options: bool) -> Forward:
        return lambda q, k, v: op(q, k, v, indices, *args, **options)[0]

    def plain(mask: Callable[[], Tensor]) -> Forward:
        return lambda q, k, v: plain_attention(q, k, v, mask())

    found = {
        "compress_mean": Operation(
            {"x": made.k},
            {"triton": lambda x: BACKEND.compress_mean(x, *args)},
            exact=lambda x: reference.compress_mean(x, *args),
            plain=lambda x: x.unfold(0, BLOCKS.kernel_size, BLOCKS.kernel_stride).mean(-1),
        ),
        "compressed_attention": Operation(
            {"q": made.q, "k_cmp": made.k_cmp, "v_cmp": made.v_cmp},
            {
                "triton": attention(BACKEND.compressed_attention),
                "cudnn": attention(CUDNN.compressed_attention),
                f"plan: {planned('compressed_attention', made)}": attention(ops.compressed_attention),
            },
            exact=attention(reference.compressed_attention),
            plain=plain(lambda: masks.compressed_mask(*args)[:, None]),
        ),
        "selected_attention": Operation(
            raw,
            {
                "triton": selected(BACKEND.selected_attention),
                "triton deterministic": selected(BACKEND.selected_attention, deterministic=True),
            },
            exact=selected(reference.selected_attention),
            plain=plain(lambda: masks.selected_mask(indices, *args)),
        ),
        "window_attention": Operation(
            raw,
            {"triton": attention(BACKEND.window_attention), fa2.name: attention(fa2.window_attention)}
            | ({"bare FA-2": bare_window} if FLASH_ATTN else {}),
            exact=attention(reference.window_attention),
            plain=plain(lambda: masks.window_mask(*args)[:, None]),
        ),
        "combine": Operation(
            {"gates": made.gates, **outs},
            {"triton": BACKEND.combine},
            exact=reference.combine,
            plain=lambda gates, *outs: sum(gates[..., i, None] * out for i, out in enumerate(outs)),
        ),
    }

    def whole(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        k_cmp, v_cmp = (ops.compress_mean(x, *args) for x in (k, v))
        return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, *args, block_indices=indices)

    def composed(kind: str) -> Forward:
        pool, cmp, slc, win, combine = (getattr(operation, kind) for operation in found.values())
        return lambda q, k, v, gates: combine(gates, cmp(q, pool(k), pool(v)), slc(q, k, v), win(q, k, v))

    leaves = raw | {"gates": made.gates}
    return {"whole": Operation(leaves, {"nsa": whole}, exact=composed("exact"), plain=composed("plain"))} | found


def planned(op: str, made: Inputs) -> str:
    """The backend that routing takes for one sequence with gradients."""
    tokens, heads, kv_heads = len(made.q), made.q.shape[1], made.k.shape[1]
    lengths = {"total_q": tokens, "max_seqlen_q": tokens, "max_seqlen_k": tokens}
    layer = Workload(made.q.device.type, DTYPE, DIM, DIM, heads // kv_heads, **lengths, needs_grad=True)
    return plan_for(layer.problem(op)).backend or "none"


def bare_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q[None], k[None], v[None], causal=True, window_size=(BLOCKS.window_size - 1, 0))[0]


def timed(row: str, kind: str) -> bool:
    """Whether a row is there for inputs of a kind: smooth ones matter where chosen blocks are read."""
    return kind == "random" or row in ("whole", "selected_attention")


def check(shape: str) -> None:
    """Every gradient of what is timed within the budget of the dtype at CHECKED tokens, or no timing."""
    for kind in ("random", "smooth"):
        for row, operation in operations(Inputs(BACKEND, shape, CHECKED, kind == "smooth")).items():
            if not timed(row, kind):
                continue
            leaves = list(operation.leaves.values())
            exact = gradients(operation.exact, [x.double() for x in leaves])()
            plain = gradients(operation.plain, leaves)()
            for variant, run in operation.variants.items():
                for name, *found in zip(operation.leaves, gradients(run, leaves)(), plain, exact, strict=True):
                    assert_within_budget(*found, f"d{name} of {row}, {variant}, {shape}, {kind} inputs")
        torch.cuda.empty_cache()


def floors(shape: str, tokens: int) -> dict[str, float]:
    """Milliseconds that no implementation of a backward goes below, by what it has to compute and to move.

    Attention takes five products a query and key: q.k and do.v anew, and those that make dq, dk and dv. It reads q, k,
    v, out and its gradient, and writes dq, dk and dv.
    """
    of = sizes(shape, tokens)
    found = {
        "compress_mean": floor_ms(0, of.kv + of.kv_cmp),
        "compressed_attention": floor_ms(5 * of.compressed, 4 * of.q + 4 * of.kv_cmp),
        "selected_attention": floor_ms(5 * of.selected, 4 * of.q + 4 * of.kv + of.indices),
        "window_attention": floor_ms(5 * of.window, 4 * of.q + 4 * of.kv),
        "combine": floor_ms(0, 7 * of.q + 2 * of.gates),  # three branches' results, their gradients, that of the sum
        "dense": floor_ms(5 * of.dense, 4 * of.q + 4 * of.kv),
    }
    return found | {"whole": sum(found.values()) - found["dense"] + found["compress_mean"]}


def measured(
    row: str, shape: str, tokens: int, inputs: str, union8: float, operation: Operation, repeats: int
) -> list[dict[str, object]]:
    runs = {name: gradients(run, list(operation.leaves.values())) for name, run in operation.variants.items()}
    if row == "whole" and inputs == "random":
        qkv = [operation.leaves[name] for name in "qkv"]
        runs |= {name: gradients(run, qkv) for name, run in DENSE.items()}
    for run in runs.values():
        run()  # the forward, and what a first backward sets up
    memory = {name: peak(run) for name, run in runs.items()}
    floor = floors(shape, tokens)
    found = []
    for name, times in measure(runs, repeats, fewer=dict.fromkeys(DENSE, min(repeats, DENSE_REPEATS))).items():
        least = floor["dense" if name in DENSE else row]
        numbers = *quartiles(times.gpu), len(times.gpu), f"{least:.3f}", f"{union8:.1f}", memory[name]
        found.append(told(FIELDS, (row, shape, tokens, inputs, name, *numbers)))
    return found


def main() -> None:
    given = asked("the Triton backward beside dense attention", [16_384, 32_768, 65_536])
    import triton

    versions = [f"torch {torch.__version__}", f"triton {triton.__version__}"]
    if FLASH_ATTN:
        import flash_attn

        versions.append(f"flash-attn {flash_attn.__version__}")
    comment = header("triton_backward.py", *versions, f"cuDNN {torch.backends.cudnn.version()}")
    for shape in given.shapes:
        check(shape)
    print(comment, ",".join(FIELDS), sep="\n", flush=True)
    rows = []
    for shape in given.shapes:
        for tokens in given.tokens:
            for kind in ("random", "smooth"):
                made = Inputs(BACKEND, shape, tokens, kind == "smooth")
                union8 = made.union8()
                for row, operation in operations(made).items():
                    if timed(row, kind):
                        rows += measured(row, shape, tokens, kind, union8, operation, given.repeats)
                        torch.cuda.empty_cache()
                del made, operation
                torch.cuda.empty_cache()
    if given.out:
        write(given.out, FIELDS, rows, comment)


if __name__ == "__main__":
    main()
