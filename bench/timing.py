"""Calls on a GPU, timed by CUDA events, and the CSV files that scripts here write.

Variants take turns, each going first in one round after another. Before each call memory is written over, which
empties the L2 cache and keeps the GPU busy while the call is being launched, as other work does in a model.
"""

import csv
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

Run = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


class Times(NamedTuple):
    """Of one call after another: milliseconds of the GPU, microseconds that launching took."""

    gpu: list[float]
    host: list[float]


def measure(
    runs: Mapping[Name, Run],
    repeats: int,
    *,
    fewer: Mapping[Name, int] | None = None,
    warm_up: int = 2,
    flush_bytes: int = 2 << 30,
) -> dict[Name, Times]:
    """Each variant `repeats` times, or as often as `fewer` says of it, after `warm_up` calls that do not count."""
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")
    counts = dict.fromkeys(runs, repeats) | dict(fewer or {})
    found = {name: Times([], []) for name in runs}
    names = list(runs)
    for turn in range(-warm_up, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn >= counts[name]:
                continue
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            begin = time.perf_counter()
            runs[name]()
            launched = time.perf_counter()
            end.record()
            end.synchronize()
            if turn >= 0:
                found[name].gpu.append(start.elapsed_time(end))
                found[name].host.append(1e6 * (launched - begin))
    return found


def peak(run: Run) -> int:
    """MiB that a call takes beyond what lives before it, its results included."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def quartiles(milliseconds: Sequence[float]) -> tuple[str, str, str]:
    """Median, first and third quartile, as the columns median_ms, p25_ms and p75_ms have them."""
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return f"{median:.4f}", f"{low:.4f}", f"{high:.4f}"


def told(fields: Iterable[str], values: Iterable[object]) -> dict[str, object]:
    """A row of the file, printed as soon as it is known."""
    row = dict(zip(fields, values, strict=True))
    print(",".join(str(value) for value in row.values()), flush=True)
    return row


def header(script: str, *versions: str) -> str:
    """The comment over a file's columns: GPU, versions, the script it came from."""
    return f"# {', '.join((torch.cuda.get_device_name(), *versions))}; bench/{script}"


def write(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, object]], comment: str = "") -> None:
    """A CSV file; `comment` is a line of its own above the names of the columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if comment:
            file.write(f"{comment}\n")
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
