"""Launch configurations of the Triton kernels, measured on a GPU: `python bench/tune_triton.py --out FILE.csv`.

For each kernel's table and each shape, candidates are checked against the configuration in force (the first row of each
case), then timed: one sequence of 65,536 tokens, bf16, head_dim 128, medians of calls before each of which 1 GB is
written over. Candidates are compiled beforehand by as many processes as there are cores, which share Triton's cache.

`--apply FILE.csv` (on any machine with tomlkit) writes the fastest candidate into each rule of
`configurations/smXX.toml` that gains by it over all the cases that take it, with the date and the file it came from;
look at the difference, and run `hatch run kernels:compile`, which knows what a kernel may not do.
"""

import argparse
import contextlib
import csv
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import BLOCKS, DIM, DTYPE, SHAPES
from nsa_kernels_triton import BACKEND, configurations
from nsa_varlen import VarlenLayout, masks
from timing import measure, quartiles, write
from torch import Tensor

TOKENS = 65_536
FOLDER = Path(__file__).parents[1] / "packages/nsa-kernels-triton/src/nsa_kernels_triton/configurations"
FIELDS = ("table", "case", "shape", "inputs", "numbers", "median_ms", "p25_ms", "p75_ms", "ratio", "gpu", "versions")
CORRELATION = 1 - 1 / 1024  # between the scores of neighbouring queries on smooth inputs
MARGIN = 0.04  # that a candidate has to gain: the first measurement of a case is up to 3 % slow
CLOSE = 4 * 2.0**-8  # of two sound bf16 results, relative to the largest value


def grid(**numbers: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(numbers, values, strict=True)) for values in itertools.product(*numbers.values())]


INTERVAL = [
    *grid(rows=(64,), keys=(64,), num_warps=(4,), num_stages=(2, 3), maxnreg=(0, 168)),
    *grid(rows=(128,), keys=(64, 128), num_warps=(8,), num_stages=(2, 3), maxnreg=(0, 128)),
]
BY_QUERY = {"by_block": 0, "keys": 64, "tma": 1}
SMALL_TILES = [BY_QUERY | x for x in grid(rows=(64,), num_warps=(4,), num_stages=(2, 3), maxnreg=(0, 168))]
LARGE_TILES = [BY_QUERY | x for x in grid(rows=(128,), num_warps=(8,), num_stages=(2, 3), maxnreg=(128,))]
BY_BLOCK = {"by_block": 1, "tma": 1, "rows": 64, "chunk_rows": 65_536, "programs": 3, "turns": 8}
# table: (operation, its candidates by shape; "" is any)
CANDIDATES: dict[str, tuple[str, dict[str, list[dict[str, int]]]]] = {
    "compress_mean": ("compress_mean", {"": grid(rows=(8, 16, 32), num_warps=(2, 4))}),
    "compressed_attention": ("compressed_attention", {"": INTERVAL}),
    "window_attention": ("window_attention", {"": INTERVAL}),
    "block_scores": (
        "select_blocks",
        {
            "g16": grid(keys=(64,), columns=(128, 256), num_warps=(4,), num_stages=(2, 3)),
            "": [
                *grid(keys=(64,), columns=(128,), num_warps=(4,), num_stages=(2, 3)),
                *grid(keys=(64,), columns=(256,), num_warps=(8,), num_stages=(2, 3)),
            ],
        },
    ),
    "topk": ("select_blocks", {"": grid(rows=(1, 2, 4, 8), maxnreg=(0, 64, 80))}),
    "selected_attention": (
        "selected_attention",
        {
            "g16": [*SMALL_TILES, *LARGE_TILES],
            "": [
                *SMALL_TILES,
                *LARGE_TILES,
                *(BY_BLOCK | x for x in grid(num_stages=(1, 3), programs=(2, 3))),
                *(BY_BLOCK | x for x in grid(num_stages=(1,), turns=(4, 16))),
                *(BY_BLOCK | x for x in grid(num_stages=(1,), chunk_rows=(16_384, 32_768))),
                *(BY_BLOCK | x for x in grid(num_stages=(1,), tma=(0,))),
            ],
        },
    ),
    "near": (
        "selected_attention",
        {
            "": [
                *grid(num_warps=(4,), num_stages=(1, 2, 3)),
                *grid(num_warps=(8,), num_stages=(1, 2, 3), maxnreg=(0, 128)),
            ]
        },
    ),
    "merging": ("selected_attention", {"": grid(rows=(8, 16, 32), num_warps=(4,), num_stages=(1, 3, 5))}),
    "filing": ("selected_attention", {"": grid(num_warps=(4, 8))}),
    "combine": ("combine", {"": grid(rows=(8, 16, 32), num_warps=(2, 4, 8))}),
}


class Trial(NamedTuple):
    """One candidate of one case; no numbers: the configuration in force."""

    table: str
    shape: str
    inputs: str
    numbers: dict[str, int]

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.table, self.shape, self.inputs


def trials(tables: list[str], shapes: list[str]) -> list[Trial]:
    found = []
    for table, shape in itertools.product(tables, shapes):
        op, by_shape = CANDIDATES[table]
        kinds = ("random", "smooth") if op == "selected_attention" else ("random",)
        for kind in kinds:
            if table in ("near", "merging", "filing") and (shape == "g16" or kind == "smooth"):
                continue
            found += [
                Trial(table, shape, kind, numbers) for numbers in [{}, *by_shape.get(shape, by_shape.get("", []))]
            ]
    return found


class Inputs:
    """Arguments of every operation for one shape, made as they are asked for."""

    def __init__(self, shape: str) -> None:
        heads, self.kv_heads = SHAPES[shape]
        generator = torch.Generator("cuda").manual_seed(0)
        self.q, self.k, self.v = (
            torch.randn(TOKENS, h, DIM, generator=generator, device="cuda", dtype=DTYPE)
            for h in (heads, self.kv_heads, self.kv_heads)
        )
        self.gates = torch.rand(TOKENS, heads, 3, generator=generator, device="cuda", dtype=DTYPE)
        self.layout = VarlenLayout.from_lengths([TOKENS], device="cuda")
        self.k_cmp, self.v_cmp = (BACKEND.compress_mean(x, self.layout, BLOCKS) for x in (self.k, self.v))
        self.o, self.lse = BACKEND.compressed_attention(self.q, self.k_cmp, self.v_cmp, self.layout, BLOCKS)
        self.indices: dict[str, Tensor] = {}

    def chosen(self, kind: str) -> Tensor:
        """The forced blocks and those of the highest scores, which are random, or change slowly from query to query."""
        if kind not in self.indices:
            self.indices[kind] = torch.cat(list(self._chunks(kind == "smooth")))
        return self.indices[kind]

    def _chunks(self, smooth: bool) -> Iterator[Tensor]:
        candidate, forced = masks.candidate_blocks(self.layout, BLOCKS)
        generator = torch.Generator("cuda").manual_seed(1)
        count = candidate.shape[1]
        state = torch.randn(self.kv_heads, count, generator=generator, device="cuda")
        for rows in torch.arange(TOKENS, device="cuda").split(512):
            score = torch.randn(len(rows), self.kv_heads, count, generator=generator, device="cuda")
            if smooth:  # s_i = r s_(i-1) + sqrt(1 - r^2) n_i, all rows of the chunk at once
                decay = CORRELATION ** torch.arange(1, len(rows) + 1, device="cuda")[:, None, None]
                score = ((score * (1 - CORRELATION**2) ** 0.5 / decay).cumsum(0) + state) * decay
                state = score[-1].clone()
            score = score.masked_fill(forced[rows][:, None], torch.inf).masked_fill(
                ~candidate[rows][:, None], -torch.inf
            )
            best, index = score.topk(BLOCKS.topk, -1)
            index = index.masked_fill(best == -torch.inf, count).sort(-1).values
            yield index.masked_fill(index == count, -1).int()

    def run(self, trial: Trial) -> Tensor:
        """The operation's first result under the trial's numbers, or those that its case takes."""
        with configurations.overridden(trial.table, **(trial.numbers or in_force(trial))):
            return self._run(CANDIDATES[trial.table][0], trial.inputs)

    def _run(self, op: str, kind: str) -> Tensor:
        args = self.layout, BLOCKS
        run: dict[str, Callable[[], Any]] = {
            "compress_mean": lambda: BACKEND.compress_mean(self.k, *args),
            "compressed_attention": lambda: BACKEND.compressed_attention(self.q, self.k_cmp, self.v_cmp, *args)[0],
            "select_blocks": lambda: BACKEND.select_blocks(self.q, self.k_cmp, self.lse, *args),
            "selected_attention": lambda: BACKEND.selected_attention(
                *(self.q, self.k, self.v, self.chosen(kind), *args), deterministic=True
            )[0],
            "window_attention": lambda: BACKEND.window_attention(self.q, self.k, self.v, *args)[0],
            "combine": lambda: BACKEND.combine(self.gates, self.o, self.o, self.o),
        }
        return run[op]()


def in_force(trial: Trial) -> dict[str, int]:
    """The numbers of the rule that the trial's case takes: what was measured of its inputs, a call does not know."""
    found = configurations.launch(trial.table, torch.device("cuda"), **taken(trial))
    return {**found.sizes, **{name: getattr(found, name) for name in configurations.OPTIONS}}


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two sound results of one operation could differ so: choices in near-ties, values by rounding."""
    if found.dtype == torch.int32:
        return float((found != expected).any(-1).float().mean()) < 0.01
    return float((found.float() - expected.float()).abs().max()) <= CLOSE * float(expected.float().abs().max())


def warm(tables: list[str], shapes: list[str]) -> None:
    """Compile every candidate, in processes of their own: a compiler that dies takes one of them with it."""
    count = min(12, os.cpu_count() or 1)  # each holds up to 5 GB of inputs
    command = [sys.executable, __file__, "--tables", *tables, "--shapes", *shapes]
    children = [subprocess.Popen([*command, "--warm", str(i), str(count)]) for i in range(count)]
    for child in children:
        child.wait()


def tune(tables: list[str], shapes: list[str], repeats: int) -> list[dict[str, str]]:
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    rows, expected, base = [], {}, {}
    inputs, made = None, ""
    for trial in sorted(trials(tables, shapes), key=lambda x: x.shape):
        if trial.shape != made:
            inputs, made = None, trial.shape
            torch.cuda.empty_cache()
            inputs = Inputs(made)
        try:
            result = inputs.run(trial)
            torch.cuda.synchronize()
            if not same(result, expected.setdefault(trial.kind, result)):
                raise ValueError("another result than the configuration in force")
            times = measure({"": partial(inputs.run, trial)}, repeats, flush_bytes=1 << 30)[""].gpu
        except Exception as error:  # noqa: BLE001 - a candidate that cannot run is told, and the next one tried
            print(f"{trial}: {type(error).__name__} {str(error)[:200]}", flush=True)
            continue
        median = statistics.median(times)
        ratio = median / base.setdefault(trial.kind, median)
        numbers = *quartiles(times), f"{ratio:.4f}"
        told = *trial.kind[1:], json.dumps(trial.numbers), *numbers, torch.cuda.get_device_name(), versions
        case = json.dumps(taken(trial))
        rows.append(dict(zip(FIELDS, (trial.table, case, *told), strict=True)))
        print(f"{ratio:6.3f} {median:8.3f}  {' '.join(trial.kind)}  {trial.numbers or 'in force'}", flush=True)
    return rows


def taken(trial: Trial) -> dict[str, int]:
    """The case that the launcher states for a trial."""
    heads, kv_heads = SHAPES[trial.shape]
    case = {"head_dim": DIM, "group_size": heads // kv_heads, "row_bytes": 2 * DIM, "itemsize": 2}
    case |= {"block_size": BLOCKS.block_size, "rows_per_sequence": TOKENS * heads // kv_heads, "entries": 1024}
    free = BLOCKS.topk - BLOCKS.init_blocks - BLOCKS.local_blocks
    return case | {"free": free, "slots": BLOCKS.topk, "spread": 130 if trial.inputs == "smooth" else 1 << 20}


def apply(source: Path, name: str) -> None:
    """Write into each rule the numbers that are fastest on average over the cases that take it.

    Only such as were measured in all of them, and are MARGIN faster than what is in force.
    """
    import tomlkit

    path = FOLDER / f"{name}.toml"
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    inherited = tomlkit.parse((FOLDER / "base.toml").read_text(encoding="utf-8")).unwrap()
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    ratios: dict[tuple[str, int], dict[str, dict[tuple[str, str], float]]] = {}
    for row in rows:
        table, case = row["table"], json.loads(row["case"])
        rules = document[table].unwrap() if table in document else inherited[table]
        number = next(
            number
            for number, rule in enumerate(rules)
            if all(case[key] <= most for key, most in rule.get("up_to", {}).items())
        )
        of_rule = ratios.setdefault((table, number), {})
        of_rule.setdefault(row["numbers"], {})[row["shape"], row["inputs"]] = float(row["ratio"])
    for (table, number), of_rule in ratios.items():
        cases = of_rule["{}"]  # what is in force, in every case
        means = {
            numbers: statistics.geometric_mean(found.values())
            for numbers, found in of_rule.items()
            if found.keys() == cases.keys()
        }
        best = min(means, key=means.__getitem__)
        if means[best] > 1 - MARGIN:
            continue
        if table not in document:
            document[table] = tomlkit.aot()
            for rule in inherited[table]:
                document[table].append(tomlkit.item(rule))
        rule = document[table][number]
        for key, value in json.loads(best).items():
            rule[key] = value
        rule["measured"] = f"{datetime.date.today()}, {rows[0]['gpu']}, {rows[0]['versions']}, {source.name}"
        print(f"{table}, up_to {rule.get('up_to', 'anything')}: {best}, {means[best]:.3f} of what was in force")
    path.write_text(tomlkit.dumps(document), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="launch configurations of the Triton kernels, measured")
    parser.add_argument("--tables", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--warm", nargs=2, type=int, metavar=("I", "N"), help=argparse.SUPPRESS)
    parser.add_argument("--apply", type=Path, metavar="FILE.csv", help="write a file's fastest numbers into --sm")
    parser.add_argument("--sm", default="sm90", help="which file of configurations `--apply` writes")
    given = parser.parse_args()
    if given.apply:
        apply(given.apply, given.sm)
        return
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    with torch.no_grad():
        if given.warm:
            part = trials(given.tables, given.shapes)[given.warm[0] :: given.warm[1]]
            for shape, of_shape in itertools.groupby(sorted(part, key=lambda x: x.shape), key=lambda x: x.shape):
                inputs = Inputs(shape)
                for trial in of_shape:
                    with contextlib.suppress(Exception):  # told when it is timed
                        inputs.run(trial)
                        torch.cuda.synchronize()
                del inputs
            return
        warm(given.tables, given.shapes)
        rows = tune(given.tables, given.shapes, given.repeats)
    if given.out:
        write(given.out, FIELDS, rows)


if __name__ == "__main__":
    main()
