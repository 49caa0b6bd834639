"""What observing costs a decode step: `python bench/observing.py [--device cuda] [--out FILE.csv]`.

A *step* is `reserve`, `NSAAttention.decode` and `advance` of each layer, one token a sequence. Variants:

- `bare`: `decode` as it would be without observers, and the operation without its range: nothing to switch on.
- `off`: the layer as it is, `observer` None.
- `on`: `nsa.observe(model)`, nobody listening to the log.
- `sampled`: two of 64 steps are counted, `nsa.observe(model, every=64)`.
- `lines`: as `on`, with a line of every layer every 100 steps, formatted and thrown away.
- `parity`: the same as `on`, compared with `sdpa` every 100 steps.

On a GPU all but `bare` and `parity` also as replays of `nsa.DecodeGraph`, where parity is not sampled. The preset is
that of the environment, on a GPU `NSA_PRESET=perf` if it says nothing. Before anything is timed, observed steps and
replays run there with `torch.cuda.set_sync_debug_mode("error")`.

Variants take turns, each going first in one round after another; each has caches of its own, which grow alike. A number
is the time of STEPS steps over STEPS: on a GPU wall time, with one synchronisation at the end; on a CPU that of one
thread while it ran, which other work on the machine does not lengthen much. `over_off_us` is the median of the
differences from `off`, turn by turn. `checks_ns` is what the switched-off
parts take by themselves: the layer's look at its observer, and `noted` and the range around an operation.
"""

import argparse
import csv
import logging
import os
import platform
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from nsa import DecodeGraph, NSAAttention, NSACache, NSAConfig, Observer, observe, ops
from nsa.compression import pool_of
from nsa.noted_problems import noted
from nsa.profiler_ranges import ranged
from nsa_routing import Problem
from torch import Tensor, nn

STEPS = 20
WARM_UPS = 2  # rounds that do not count
SIZES = {"cpu": (512, 8, 2, 64, torch.float32), "cuda": (4096, 32, 4, 128, torch.bfloat16)}
OPTIONS = {
    **{"bare": None, "off": None, "on": {}, "sampled": {"every": 64}},
    **{"lines": {"log_every": 100}, "parity": {"parity_every": 100}},
}
FIELDS = ("case", "variant", "layers", "tokens", "batch", "median_us", "p25_us", "p75_us", "repeats", "over_off_us")

Step = Callable[[], object]


class Bare(NSAAttention):
    """`decode` before there were observers."""

    def decode(self, x: Tensor, cache: NSACache, counts: Tensor | None = None) -> Tensor:
        self._check(x, None, None, cache)
        step, batch = cache.decode(x.shape[1], counts), x.shape[:2]
        q, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, gates = self._project(x.flatten(0, 1))
        q_cmp, q, k_cmp, k_slc, k_win = self._rotate_new(q, k_cmp, k_slc, k_win, step.positions.flatten())
        q, q_cmp, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, gates = (
            y.unflatten(0, batch) for y in (q, q_cmp, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, gates)
        )
        compress = pool_of(self.compress_k, self.compress_v) or self._compress
        new = step.new_tokens((k_slc, v_slc), (k_win, v_win), (k_cmp, v_cmp), compress)
        out, block_indices = ops.decode_attention.__wrapped__(
            q, *step.cmp, *step.slc, *step.win, gates, step.counts, self.config.blocks, q_cmp=q_cmp, new=new
        )
        step.count(block_indices)
        step.commit()
        return self.o_proj(out.flatten(2))


class Model:
    """Layers with their caches, which hold `tokens` tokens of each sequence."""

    def __init__(self, variant: str, layers: int, tokens: int, batch: int, room: int, device: torch.device) -> None:
        torch.manual_seed(0)
        hidden, heads, kv_heads, dim, dtype = SIZES[device.type]
        config = NSAConfig(hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
        made = Bare if variant == "bare" else NSAAttention
        self.layers = nn.ModuleList(made(config) for _ in range(layers)).to(device, dtype).requires_grad_(False)
        self.caches = [NSACache(config, batch, tokens + room, device=device, dtype=dtype) for _ in range(layers)]
        self.x = torch.randn(batch, 1, hidden, device=device, dtype=dtype)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            for start in range(0, tokens, 4096):
                rows = min(4096, tokens - start)
                layer(torch.randn(batch, rows, hidden, device=device, dtype=dtype), cache=cache)
        options = OPTIONS[variant]
        self.observer: Observer | None = None if options is None else observe(self.layers, **options)

    def decode(self, x: Tensor, counts: Tensor | None) -> Tensor:
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x = x + layer.decode(x, cache, counts)
        return x

    def step(self) -> None:
        for cache in self.caches:
            cache.reserve(1)
        self.decode(self.x, None)
        for cache in self.caches:
            cache.advance(1)

    def graph(self) -> Step:
        return partial(DecodeGraph(self.decode, self.caches, self.x).replay, self.x)


def in_turns(runs: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds per step, `repeats` of each."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for turn in range(-WARM_UPS, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = clock()
            for _ in range(STEPS):
                runs[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                found[name].append(1e6 * (clock() - begin) / STEPS)
    return found


def checks_ns() -> dict[str, float]:
    """Nanoseconds of each switched-off part, the least of several runs."""
    problem = Problem("combine", "cpu", torch.float32, 64, 64, 4)
    layer = NSAAttention(NSAConfig(16, num_heads=2, num_kv_heads=1, head_dim=8))

    def nothing() -> None:
        return None

    def least(run: Callable[[], object]) -> float:
        return min(timeit.repeat(run, timer=time.process_time, number=100_000, repeat=7)) * 1e4

    empty = least(nothing)
    return {
        "observer is None": least(lambda: layer.observer is None) - empty,
        "noted": least(lambda: noted(problem)) - empty,
        "range": least(ranged(nothing)) - empty,
    }


def processor() -> str:
    """The CPU's model, where the system tells it in this way."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.machine()


def nobody_waits(step: Step) -> None:
    """Raise if the host waits for the GPU in any of some steps."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def rows_of(case: str, times: dict[str, list[float]], sizes: Sequence[int]) -> list[dict[str, object]]:
    rows = []
    for variant, found in times.items():
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        over = statistics.median(x - y for x, y in zip(found, times["off"], strict=True))
        numbers = (f"{median:.1f}", f"{low:.1f}", f"{high:.1f}", len(found), f"{over:.1f}")
        rows.append(dict(zip(FIELDS, (case, variant, *sizes, *numbers), strict=True)))
        print(*rows[-1].values(), sep=",", flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        os.environ.setdefault("NSA_PRESET", "perf")
    else:
        torch.set_num_threads(1)
    logger = logging.getLogger("nsa")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    comment = f"# {name}, Python {platform.python_version()}, torch {torch.__version__}; "
    comment += f"bench/observing.py --device {device} --layers {options.layers} --tokens {options.tokens} "
    comment += f"--batch {options.batch} --repeats {options.repeats}; "
    comment += "checks_ns " + ", ".join(f"{part}: {ns:.0f}" for part, ns in checks_ns().items())
    print(comment)
    print(*FIELDS, sep=",")

    sizes = options.layers, options.tokens, options.batch
    room = (options.repeats + WARM_UPS + 3) * STEPS + 100

    def listening(model: Model, run: Step) -> Step:
        """Lines are for one variant: the others' INFO goes nowhere, not even to be formatted."""
        level = logging.INFO if model is models["lines"] else logging.WARNING

        def step() -> object:
            logger.setLevel(level)
            return run()

        return step

    models: dict[str, Model] = {}
    for variant in OPTIONS:
        models[variant] = Model(variant, *sizes, room, device)
    runs = {variant: listening(model, model.step) for variant, model in models.items()}
    if device.type == "cuda":
        for variant in ("on", "sampled", "lines", "parity"):
            nobody_waits(runs[variant])
        for _ in range(3 + STEPS):
            runs["bare"]()
            runs["off"]()
    rows = rows_of("eager", in_turns(runs, options.repeats, device), sizes)
    if device.type == "cuda":
        in_graphs = ("off", "on", "sampled", "lines")
        models |= {variant: Model(variant, *sizes, room, device) for variant in in_graphs}
        runs = {variant: listening(models[variant], models[variant].graph()) for variant in in_graphs}
        for run in runs.values():
            nobody_waits(run)
        rows += rows_of("graph", in_turns(runs, options.repeats, device), sizes)
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            file.write(f"{comment}\n")
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
