"""What routing costs a call, in microseconds of Python: `hatch run bench-dispatch`. The goal for `dispatch` is 10.

Rows: `dispatch` with the problem in hand; `problem and dispatch`, which is what an operation of `nsa.ops` pays, for a
decode whose length grows at every call, under a profile with thresholds; `guarded call`, what fallback and breaker add
to a backend that does nothing, with the check of results off; `plan`, a plan made anew. Medians of
batches; `spread` is (max - min) / median.
"""

import argparse
import csv
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from nsa_routing import Problem, dispatch, plan_for
from nsa_routing.breaker import Breaker
from nsa_routing.route import GuardedRun

GOAL = 10.0
FIELDS = ("case", "us", "spread", "calls", "batches")
BATCHES = 21


def problem(length: int = 65_536) -> Problem:
    """A decode step's window attention, every field spelled out as `nsa.ops` does."""
    return Problem(
        "window_attention",
        "cpu",
        torch.float32,
        128,
        128,
        16,
        needs_grad=False,
        deterministic=None,
        paged=False,
        fp8_scales=False,
        device_index=0,
        kernel_size=32,
        kernel_stride=16,
        block_size=64,
        topk=16,
        init_blocks=1,
        local_blocks=2,
        window_size=512,
        uniform=False,
        total_q=1,
        max_seqlen_q=1,
        max_seqlen_k=length,
    )


def cases() -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> what one call does, and how many calls make a batch."""
    ready, lengths = problem(), itertools.count(1)
    guarded = GuardedRun(lambda: None, Breaker("made", "combine", "cpu"), "off", None, None)
    return {
        "dispatch": (lambda: dispatch("window_attention", ready), 20_000),
        "problem and dispatch": (lambda: dispatch("window_attention", problem(next(lengths))), 10_000),
        "guarded call": (guarded, 20_000),
        "plan": (lambda: plan_for(ready), 1_000),
    }


def measure(call: Callable[[], object], calls: int) -> dict[str, object]:
    times = []
    for _ in range(BATCHES + 1):  # the first is the warm-up
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    times = times[1:]
    median = statistics.median(times)
    return {
        "us": round(median, 3),
        "spread": round((max(times) - min(times)) / median, 2),
        "calls": calls,
        "batches": BATCHES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="what routing costs a call")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    out = parser.parse_args().out
    os.environ["NSA_PROFILE"] = "sm90"  # one with thresholds, so that lengths are looked at
    rows = [{"case": name, **measure(*case)} for name, case in cases().items()]
    for row in rows:
        print(f"{row['case']:<22}{row['us']:>8} us  spread {row['spread']}")
    if out:
        with out.open("w", newline="", encoding="utf-8") as file:
            file.write(f"# {platform.processor() or platform.machine()}, Python {platform.python_version()}, ")
            file.write(f"torch {torch.__version__}; bench/dispatch.py --out {out}\n")
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    slow = [row["case"] for row in rows[:3] if float(str(row["us"])) > GOAL]
    if slow:
        raise SystemExit(f"over the goal of {GOAL} us: {', '.join(map(str, slow))}")


if __name__ == "__main__":
    main()
