"""nsa-fa2 on a GPU beside the bare calls of the libraries behind it, in one run: `python bench/fa2.py --out FILE`.

Bare means: the tensors lie as the library wants them, and nothing comes before or after. For the window that is
`flash_attn_varlen_func` on q, k, v as they are; for the compressed branch the causal call on queries that were folded
beforehand (d phases inside each group of heads, over all kv heads), through cuDNN and through both FlashAttention-2.
The selected branch has nothing to stand beside: its time and memory are stated, for blocks chosen at random. Batches
are one sequence of 16,384 or 65,536 tokens, or (`ragged`) 65,536 tokens in seven sequences.

What is timed is checked first, against the oracle at a length it can hold. Variants of a row take turns, each going
first in one round after another. Before each call 2 GB are written over, which empties the L2 cache and keeps the GPU
busy while the call is being launched, as other work does in a model: `median_ms` and its quartiles are the GPU's time,
`host_us` is what launching took. Memory is the peak beyond the arguments.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from cases import BLOCKS, DIM, SHAPES, gradients, normal
from nsa_fa2 import CUDNN, FA2, FA2_TORCH, FlashBackend
from nsa_varlen import VarlenLayout, masks, reference
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import assert_within_budget, plain_attention
from timing import Run, header, measure, peak, quartiles, told, write
from torch import Tensor

BATCHES = {
    "16384": [16_384],
    "65536": [65_536],
    "ragged": [1_000, 3_000, 7_000, 9_000, 11_536, 15_000, 19_000],  # 65,536 in all
}
FIELDS = (
    *("op", "direction", "shape", "batch", "variant", "median_ms", "p25_ms", "p75_ms", "min_ms", "repeats"),
    *("ratio_to_bare", "host_us", "peak_mib"),
)
WARM_UP = 3


class Variant(NamedTuple):
    """Forward, and the backward of what it gave; `bare`: what ratios are taken to, None for itself."""

    forward: Run
    backward: Run
    bare: str | None


def arguments(op: str, lengths: list[int], heads: tuple[int, int]) -> tuple[tuple[Tensor, ...], VarlenLayout]:
    layout = VarlenLayout.from_lengths(lengths, device="cuda")
    q, k, v = (normal(layout.total_q, h, DIM, seed=seed) for seed, h in enumerate((heads[0], heads[1], heads[1])))
    if op == "window_attention":
        return (q, k, v), layout
    k_cmp, v_cmp = (BACKEND.compress_mean(x, layout, BLOCKS) for x in (k, v))
    if op == "compressed_attention":
        return (q, k_cmp, v_cmp), layout
    return (q, k, v, random_indices(layout, heads[1])), layout


def random_indices(layout: VarlenLayout, kv_heads: int) -> Tensor:
    """For each query and kv head the forced blocks and others at random: neighbours share nothing but by chance."""
    candidate, forced = masks.candidate_blocks(layout, BLOCKS)
    chosen = []
    for rows in torch.arange(layout.total_q, device="cuda").split(4096):
        generator = torch.Generator("cuda").manual_seed(int(rows[0]))
        score = torch.rand(len(rows), kv_heads, candidate.shape[1], generator=generator, device="cuda")
        score = score.masked_fill(forced[rows][:, None], 2.0).masked_fill(~candidate[rows][:, None], -1.0)
        best, index = score.topk(min(BLOCKS.topk, candidate.shape[1]), -1)
        chosen.append(index.masked_fill(best < 0, -1).int())
    return torch.cat(chosen)


def check(op: str, backend: FlashBackend, heads: tuple[int, int]) -> None:
    """Within the budget of the dtype at 1,024 tokens, forward, or no timing."""
    args, layout = arguments(op, [1024], heads)
    if op == "compressed_attention":
        mask = masks.compressed_mask(layout, BLOCKS)[:, None]
    elif op == "window_attention":
        mask = masks.window_mask(layout, BLOCKS)[:, None]
    else:
        mask = masks.selected_mask(args[3], layout, BLOCKS)
    out, _ = getattr(backend, op)(*args, layout, BLOCKS)
    exact, _ = getattr(reference, op)(*(x.double() if x.is_floating_point() else x for x in args), layout, BLOCKS)
    assert_within_budget(out, plain_attention(*args[:3], mask), exact, f"{op} of {backend.name}")


def through_backend(backend: FlashBackend, op: str, args: tuple[Tensor, ...], layout: VarlenLayout, bare: str | None):
    def forward() -> object:
        with torch.no_grad():
            return getattr(backend, op)(*args, layout, BLOCKS)

    return Variant(forward, gradients(lambda *x: getattr(backend, op)(*x, layout, BLOCKS)[0], args), bare)


def bare_window(args: tuple[Tensor, ...], layout: VarlenLayout) -> Variant:
    from flash_attn import flash_attn_varlen_func

    offsets, longest, window = layout.cu_seqlens_q, layout.max_seqlen_q, (BLOCKS.window_size - 1, 0)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=True, window_size=window)

    def forward() -> object:
        with torch.no_grad():
            return call(*args)

    return Variant(forward, gradients(call, args), None)


def bare_compressed(backend: FlashBackend, args: tuple[Tensor, ...], tokens: int, heads: tuple[int, int]) -> Variant:
    """The causal call over whole rows of the fold, everything laid out beforehand."""
    rows, d = (tokens - BLOCKS.kernel_size + 1) // BLOCKS.kernel_stride, BLOCKS.kernel_stride

    def folded(x: Tensor) -> Tensor:
        seen = x[BLOCKS.kernel_size - 1 :][: rows * d].view(rows, d, heads[1], -1, DIM)
        return seen.permute(0, 2, 3, 1, 4).reshape(1, rows, heads[0] * d, DIM)

    q, k, v = folded(args[0]), *(x[None, :rows] for x in args[1:])
    mask = {"segments": None, "scale": DIM**-0.5, "causal": True, "window": None}
    kept: list = []

    def backward() -> object:
        if not kept:
            kept.extend((folded(normal(*args[0].shape, seed=9)), q, k, v, *backend.kernel.forward(q, k, v, **mask)))
        return backend.kernel.backward(*kept, **mask, deterministic=False)

    return Variant(lambda: backend.kernel.forward(q, k, v, **mask), backward, None)


def variants(op: str, lengths: list[int], heads: tuple[int, int]) -> dict[str, Variant]:
    args, layout = arguments(op, lengths, heads)
    if op == "selected_attention":
        return {b.name: through_backend(b, op, args, layout, None) for b in (FA2, FA2_TORCH)}
    if op == "window_attention":
        through = {b.name: through_backend(b, op, args, layout, "bare flash-attn") for b in (FA2, FA2_TORCH)}
        return {"bare flash-attn": bare_window(args, layout)} | through
    if len(lengths) > 1:  # no bare call, and nothing for cuDNN
        return {b.name: through_backend(b, op, args, layout, None) for b in (FA2, FA2_TORCH)}
    made = {}
    for backend in (CUDNN, FA2, FA2_TORCH):
        made[f"bare {backend.name}"] = bare_compressed(backend, args, lengths[0], heads)
        made[backend.name] = through_backend(backend, op, args, layout, f"bare {backend.name}")
    return made


def rows_of(op: str, shape: str, batch: str, repeats: int) -> list[dict[str, object]]:
    made = variants(op, BATCHES[batch], SHAPES[shape])
    rows = []
    for direction in ("forward", "backward"):
        runs = {name: getattr(variant, direction) for name, variant in made.items()}
        for run in runs.values():
            run()
        torch.cuda.synchronize()
        memory = {name: peak(run) for name, run in runs.items()}
        # The gathered selection is slow: a few turns say what there is to say.
        found = measure(runs, repeats if op != "selected_attention" else min(repeats, 5), warm_up=WARM_UP)
        for name, (gpu, host) in found.items():
            bare = made[name].bare
            ratio = f"{statistics.median(gpu) / statistics.median(found[bare].gpu):.3f}" if bare else ""
            numbers = *quartiles(gpu), f"{min(gpu):.4f}", len(gpu)
            more = ratio, round(statistics.median(host)), memory[name]
            rows.append(told(FIELDS, (op, direction, shape, batch, name, *numbers, *more)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="nsa-fa2 beside the bare calls")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--shapes", nargs="+", default=["g16"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), choices=BATCHES)
    parser.add_argument("--ops", nargs="+", default=["window_attention", "compressed_attention", "selected_attention"])
    parser.add_argument("--repeats", type=int, default=21)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    import flash_attn

    versions = f"torch {torch.__version__}", f"flash-attn {flash_attn.__version__}"
    comment = header("fa2.py", *versions, f"cuDNN {torch.backends.cudnn.version()}")
    print(comment)
    rows = []
    for op in given.ops:
        for shape in given.shapes:
            backends = (FA2, FA2_TORCH, *((CUDNN,) if op == "compressed_attention" else ()))
            for backend in backends:
                check(op, backend, SHAPES[shape])
            for batch in given.batches:
                rows += rows_of(op, shape, batch, given.repeats)
                torch.cuda.empty_cache()
    if given.out:
        write(given.out, FIELDS, rows, comment)


if __name__ == "__main__":
    main()
