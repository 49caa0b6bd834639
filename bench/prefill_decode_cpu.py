"""NSA against dense attention on this CPU, in one run: `hatch run bench`.

Prefill is one `nsa_attention` call with the mean pooling of K and V; dense is `scaled_dot_product_attention` with
`is_causal=True, enable_gqa=True`. A decode step is append, compressed emission, all three branches and combine on an
`NSACache`; dense appends to a preallocated K/V and attends to all of it, once as a caller would write it
(`dense`, enable_gqa=True) and once with the queries of a group as rows (`dense grouped`), which torch runs faster.

Both sides take turns, so that a busy machine slows both; times are medians, `spread` is (max - min) / median. Each
shape is checked against the oracle, at a length it can hold, before anything is timed.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from nsa import NSACache, NSAConfig, nsa_attention, ops
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, DIM = 8, 2, 64
BLOCKS = BlockGeometry()
LIMIT = 5e-5  # max-abs error of an fp32 backend at unit-scale inputs
FIELDS = ("phase", "S", "variant", "ms", "spread", "repeats", "speedup_over_dense")

Case = tuple[str, Callable[[], torch.Tensor]]


def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, gates at unit scale, the same for the same length."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(tokens, h, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v, torch.rand(tokens, HEADS, 3, generator=generator)


def nsa_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    layout = VarlenLayout.from_lengths([q.shape[0]])
    k_cmp, v_cmp = (ops.compress_mean(x, layout, BLOCKS) for x in (k, v))
    return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, layout, BLOCKS)


def check() -> float:
    """Largest difference between an NSA prefill of 2,048 tokens and the fp64 oracle; too large a one ends the run."""
    q, k, v, gates = (x.double() for x in inputs(2048))
    layout = VarlenLayout.from_lengths([len(q)])
    k_cmp, v_cmp = (reference.compress_mean(x, layout, BLOCKS) for x in (k, v))
    o_cmp, lse = reference.compressed_attention(q, k_cmp, v_cmp, layout, BLOCKS)
    indices = reference.select_blocks(q, k_cmp, lse, layout, BLOCKS)
    o_slc, _ = reference.selected_attention(q, k, v, indices, layout, BLOCKS)
    o_win, _ = reference.window_attention(q, k, v, layout, BLOCKS)
    exact = reference.combine(gates, o_cmp, o_slc, o_win)
    error = float((nsa_prefill(*(x.float() for x in (q, k, v, gates))) - exact).abs().amax())
    if not error <= LIMIT:
        raise SystemExit(f"wrong result: max-abs error {error:.1e} against the oracle, expected at most {LIMIT:.0e}")
    return error


def prefill_cases(tokens: int) -> list[Case]:
    q, k, v, gates = inputs(tokens)
    rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return [
        ("dense", lambda: scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)),
        ("nsa", lambda: nsa_prefill(q, k, v, gates)),
    ]


def decode_cases(tokens: int, steps: int) -> list[Case]:
    """Steps of one sequence that has `tokens` tokens; every call appends one more."""
    q, k, v, gates = (x[-1:] for x in inputs(tokens))
    cache = NSACache(NSAConfig(HEADS * DIM, HEADS, KV_HEADS, DIM), 1, tokens + steps)
    _, past_k, past_v, _ = inputs(tokens)

    def mean(
        k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, layout: VarlenLayout, starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.compress_mean(k, layout, BLOCKS), ops.compress_mean(v, layout, BLOCKS)

    def append(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor | None) -> torch.Tensor:
        with cache.extend([len(k)]) as step:
            step.write_slc(k, v)
            step.write_win(k, v)
            step.write_cmp(k, v, mean)
            if q is None:
                return k
            return nsa_attention(q, *step.cmp, *step.slc, *step.win, gates, step.layout, BLOCKS)

    append(past_k, past_v, None)
    dense_k, dense_v = (torch.zeros(1, KV_HEADS, tokens + steps, DIM) for _ in range(2))
    dense_k[0, :, :tokens], dense_v[0, :, :tokens] = past_k.transpose(0, 1), past_v.transpose(0, 1)

    def dense(grouped: bool) -> Callable[[], torch.Tensor]:
        length = tokens
        query = q.reshape(1, KV_HEADS, -1, DIM) if grouped else q.reshape(1, HEADS, 1, DIM)

        def call() -> torch.Tensor:
            nonlocal length
            dense_k[0, :, length], dense_v[0, :, length] = k[0], v[0]
            length += 1
            keys, values = dense_k[:, :, :length], dense_v[:, :, :length]
            return scaled_dot_product_attention(query, keys, values, enable_gqa=not grouped)

        return call

    return [("dense", dense(False)), ("dense grouped", dense(True)), ("nsa", lambda: append(k, v, q))]


def measure(cases: list[Case], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each case, taking turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name, _ in cases}
    for turn in range(repeats + 1):
        for name, call in cases:
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def rows_of(phase: str, tokens: int, times: dict[str, list[float]]) -> list[dict[str, object]]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "phase": phase,
            "S": tokens,
            "variant": name,
            "ms": round(medians[name], 3),
            "spread": round((max(values) - min(values)) / medians[name], 2),
            "repeats": len(values),
            "speedup_over_dense": round(medians["dense"] / medians[name], 2),
        }
        for name, values in times.items()
    ]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths only, to see that it runs")
    parser.add_argument("--out", type=Path, help="also write the rows as CSV")
    arguments = parser.parse_args()

    prefills = [(4096, 5)] if arguments.quick else [(4096, 9), (16384, 5), (65536, 3)]
    decodes = [(8192, 20)] if arguments.quick else [(8192, 100), (65536, 100)]
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; fp32, {HEADS} query / {KV_HEADS} kv heads, head_dim {DIM}, {BLOCKS}")
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        print(f"max-abs error against the fp64 oracle at 2,048 tokens: {check():.1e}\n")
        print(f"{'phase':<8} {'S':>6}  {'variant':<14} {'ms':>10} {'spread':>7} {'speed-up over dense':>20}")
        for phase, lengths in (("prefill", prefills), ("decode", decodes)):
            for tokens, repeats in lengths:
                cases = prefill_cases(tokens) if phase == "prefill" else decode_cases(tokens, repeats + 1)
                new = rows_of(phase, tokens, measure(cases, repeats))
                rows += new
                for row in new:
                    print(
                        f"{row['phase']:<8} {row['S']:>6}  {row['variant']:<14} {row['ms']:>10} {row['spread']:>7} "
                        f"{row['speedup_over_dense']:>20}",
                        flush=True,
                    )
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            file.write(f"# {machine}; {' '.join(sys.argv)}\n")
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
