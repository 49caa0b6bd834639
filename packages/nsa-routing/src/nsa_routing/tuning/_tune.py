"""From which lengths a backend pays on this machine: measured, and written down as a profile."""

import csv
import datetime
import io
import math
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
import yaml

from nsa_routing.backends import load_backend
from nsa_routing.dispatching import DETERMINISTIC_OPS
from nsa_routing.environment import Environment, cudnn_words, probe
from nsa_routing.failures import OUT_OF_MEMORY, failure_kind
from nsa_routing.planning import Rejected, plan
from nsa_routing.policy import PRESETS, Policy
from nsa_routing.problem import OPS, Problem, device_name
from nsa_routing.profile import LAST_RESORT, Profile, load_profile, profile_of
from nsa_routing.tuning.findings import SPEEDUP, Finding, Row, entries, judge
from nsa_routing.tuning.measuring import TOLERANCE, compare, on_device, stopwatch
from nsa_routing.workload import Workload

GROUP = "nsa.op_inputs"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
LEAST_REPEATS = 3
# Whose versions the numbers depend on: columns, and what people call them.
LIBRARIES = {"torch": "torch", "triton": "triton", "flash_attn": "flash-attn", "cudnn": "cuDNN"}

# Of the raw measurements: one row for each operation, backend and length; times are of one call, in milliseconds.
COLUMNS = (
    "date",  # ISO
    "device",  # the GPU's name, or the CPU's
    *LIBRARIES,  # their versions; empty where there is none
    "op",
    "backend",
    "length",  # tokens of the one sequence: as many queries as keys
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "v_head_dim",
    "dtype",
    "grad",  # 1: the operation and its gradients; 0: the operation alone
    "repeats",
    "median_ms",
    "p25_ms",
    "p75_ms",
    "min_ms",
)


class TuningError(RuntimeError):
    """There is nothing to measure here, or not enough memory to."""


# Those of a sequence prefilled whole, which is what a case is. What a decode takes depends on other lengths.
PREFILL_OPS = tuple(op for op in OPS if op != "decode_attention")


@dataclass(frozen=True)
class Tuned:
    """What `tune` wrote, and why."""

    profile: Path
    csv: Path
    extends: str
    note: str | None
    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]


def tune(
    out: Path,
    *,
    ops: Sequence[str] = PREFILL_OPS,
    backends: Sequence[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    num_heads: int = 64,
    num_kv_heads: int = 4,
    head_dim: int = 128,
    v_head_dim: int | None = None,
    dtype: torch.dtype | None = None,
    grad: bool = False,
    repeat: int = 20,
    speedup: float = SPEEDUP,
    preset: str | None = None,
    device: str | None = None,
    index: int = 0,
    policy: Policy | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Measure backends against `sdpa` and write a profile of the lengths from which they pay.

    A case is one sequence, prefilled whole: a uniform batch. Measured is what a plan would accept but for presets and
    thresholds; a backend whose results differ from those of `sdpa` gets no threshold, nor does one that is not
    `speedup` times as fast. A threshold bounds the longest sequence's queries and keys alike (`combine`: the queries in
    all), so that it speaks of nothing that was not measured: decode steps are left to other routes. It is taken to hold
    beyond the longest tested length.

    The profile extends the device's shipped one. Beside it, under the same name, lie the raw measurements as CSV with
    the columns COLUMNS. Neither is left half-written, and the profile is loaded before it is put in its place.

    Args:
        out: the profile, a path that ends in `.yaml`.
        backends: names; None is every installed one.
        lengths: in tokens.
        num_heads, num_kv_heads, head_dim, v_head_dim: Hq, Hk, Dk, Dv; `v_head_dim=None` is Dk.
        dtype: None is bfloat16, float32 on a CPU.
        grad: time the operation together with its gradients.
        repeat: timed calls for each case, at least 3.
        speedup: how many times as fast as `sdpa` a backend must be to pay, at least 1.
        preset: where a backend is entered that the profile does not try for the operation, or in no preset; None
            enters none. One that uses Triton is never entered in `safe`.
        device, index: as `probe` has them.
        policy: the flags; None reads them. Its requests, preset and profile do not count here.
        tell: called with a line for each case.

    Raises:
        ValueError: an argument that does not fit.
        TuningError: no inputs, nothing to measure, or `sdpa` runs out of memory.
    """
    _check(out, ops, lengths, repeat, speedup, preset)
    backends = None if backends is None else tuple(dict.fromkeys(backends))
    policy = Policy.from_env() if policy is None else policy
    environment = probe(device, index)
    if environment.device == "cuda" and environment.name is None:
        raise TuningError(f"expected a cuda device {index}, got none: {'; '.join(environment.unknown)}")
    extends, note = profile_of(environment.device, environment.sm)
    profile = load_profile(extends)
    dtype = dtype or (torch.float32 if environment.device == "cpu" else torch.bfloat16)
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype: expected one of {[str(x) for x in TOLERANCE]}, got {dtype}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads: expected a multiple of num_kv_heads={num_kv_heads}, got {num_heads}")
    v_head_dim = v_head_dim or head_dim
    longest = max(lengths)
    workload = Workload(
        environment.device,
        dtype,
        head_dim,
        v_head_dim,
        num_heads // num_kv_heads,
        *(longest, longest, longest),
        needs_grad=grad,
        deterministic=policy.deterministic,
        device_index=index,
    )
    measurable, findings = _candidates(environment, profile, policy, ops, backends, workload)
    inputs = _op_inputs()
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim}

    rows: list[Row] = []
    wrong: dict[tuple[str, str], str] = {}
    with on_device(environment.device, index):
        for op, names in measurable.items():
            for length in sorted(set(lengths)):
                left = [name for name in names if (op, name) not in wrong]
                if left:
                    new, bad = _measure(inputs, workload.problem(op), left, length, sizes, repeat)
                    rows += new
                    wrong |= {(op, name): f"{what}, at {length} tokens" for name, what in bad.items()}
                    tell(_progress(op, length, new, bad))
    for op, names in measurable.items():
        findings += (judge(op, name, rows, wrong.get((op, name)), profile, preset, speedup) for name in names)
    findings.sort(key=lambda found: OPS.index(found.op))

    csv_path = out.with_suffix(".csv")
    date, gpu, dtype_name = datetime.date.today(), environment.name or _cpu_name(), str(dtype).removeprefix("torch.")
    gradients = ", with gradients" if grad else ""
    versions = {name: getattr(environment, name) for name in LIBRARIES}
    versions["cudnn"] = versions["cudnn"] and cudnn_words(versions["cudnn"])
    known = {
        "date": date,
        "gpu": gpu,
        "csv": csv_path.name,
        "versions": ", ".join(f"{LIBRARIES[name]} {version}" for name, version in versions.items() if version),
    }
    document = {
        "name": out.stem,
        "extends": extends,
        "source": f"Measured by nsa-routing tune on {date}, {gpu}: {num_heads}/{num_kv_heads} heads, head_dim "
        f"{head_dim}/{v_head_dim}, {dtype_name}{gradients}. A backend pays where it is at least {speedup:g} times as "
        f"fast as {LAST_RESORT}.",
        **entries(findings, profile, preset, known),
    }
    comments = [f"Written by nsa-routing tune; the raw measurements are in {csv_path.name}.", *map(str, findings)]
    text = "".join(f"# {line}\n" for line in comments)
    text += yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    common = {"date": date, "device": gpu, **versions, **sizes}
    raw = _csv([common | {"dtype": dtype_name, "repeats": repeat} | _cells(row) for row in rows])
    _write(out, text, csv_path, raw)
    return Tuned(out, csv_path, extends, note, tuple(findings), tuple(rows))


def _check(
    out: Path, ops: Sequence[str], lengths: Sequence[int], repeat: int, speedup: float, preset: str | None
) -> None:
    if out.suffix != ".yaml":
        raise ValueError(f"out: expected a path that ends in .yaml, got {str(out)!r}")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"out: expected a folder that can be written to, got {str(out.parent)!r}")
    unknown = [op for op in ops if op not in PREFILL_OPS]
    if unknown or not ops:
        raise ValueError(f"ops: expected some of {list(PREFILL_OPS)}, got {unknown or list(ops)}")
    if not lengths or min(lengths) < 1 or max(lengths) >= 2**31:
        raise ValueError(f"lengths: expected numbers from 1 to 2^31 - 1, got {list(lengths)}")
    if out.is_dir() or out.with_suffix(".csv").is_dir():
        raise ValueError(f"out: expected a path that is no folder, as {out.with_suffix('.csv').name}, got {str(out)!r}")
    if repeat < LEAST_REPEATS:
        raise ValueError(f"repeat: expected at least {LEAST_REPEATS}, got {repeat}")
    if not 1 <= speedup < math.inf:
        raise ValueError(f"speedup: expected a number of at least 1, got {speedup}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {list(PRESETS)}, got {preset!r}")


def _candidates(
    environment: Environment,
    profile: Profile,
    policy: Policy,
    ops: Sequence[str],
    backends: Sequence[str] | None,
    workload: Workload,
) -> tuple[dict[str, list[str]], list[Finding]]:
    """The backends to measure by operation, and the others with their reasons."""
    installed = ", ".join(environment.backends) or "none"
    names = [name for name in backends or environment.backends if name != LAST_RESORT]
    if LAST_RESORT not in environment.backends or not names:
        raise TuningError(f"expected {LAST_RESORT} and another backend to compare it with, got (installed) {installed}")
    measurable: dict[str, list[str]] = {}
    findings = []
    for op in OPS:
        for name in names if op in ops else ():
            (verdict,) = plan(
                environment, profile, workload.problem(op), replace(policy, backends=((op, name),))
            ).candidates
            if isinstance(verdict, Rejected):
                findings.append(Finding(op, name, "refused", None, f"not measured: {verdict.reason}"))
            else:
                measurable.setdefault(op, []).append(name)
    if not measurable:
        reasons = "; ".join(map(str, findings))
        raise TuningError(f"expected a backend that can be measured, got none: {reasons}")
    return measurable, findings


def _op_inputs() -> Callable[..., Any]:
    """What makes the arguments of an operation, by entry point."""
    found = {point.value: point for point in entry_points(group=GROUP)}
    if len(found) != 1:
        hint = "" if found else "; nsa-varlen offers one"
        raise TuningError(f"expected one entry point in the group {GROUP}, got {sorted(found)}{hint}")
    (point,) = found.values()
    load: Callable[..., Any] = point.load()
    return load


def _measure(
    inputs: Callable[..., Any], problem: Problem, names: list[str], length: int, sizes: dict[str, int], repeat: int
) -> tuple[list[Row], dict[str, str]]:
    op, grad = problem.op, problem.needs_grad
    device = torch.device(device_name(problem))
    try:
        args, kwargs = inputs(op, [length], [length], **sizes, dtype=problem.dtype, device=device, requires_grad=grad)
        if problem.deterministic and op in DETERMINISTIC_OPS:
            kwargs = kwargs | {"deterministic": True}
        exact, *others = (getattr(load_backend(name), op) for name in (LAST_RESORT, *names))
        timings, wrong = compare(
            exact,
            dict(zip(names, others, strict=True)),
            args,
            kwargs,
            repeat=repeat,
            watch=stopwatch(problem.device),
            name=LAST_RESORT,
        )
    except (RuntimeError, MemoryError) as error:
        if failure_kind(error) != OUT_OF_MEMORY:
            raise
        raise TuningError(f"{op} at {length} tokens: {LAST_RESORT} ran out of memory; take shorter lengths") from None
    return [Row(op, name, length, grad, timing) for name, timing in timings.items()], wrong


def _progress(op: str, length: int, rows: list[Row], wrong: dict[str, str]) -> str:
    words = [f"{row.backend} {row.timing.median_ms:.3f} ms" for row in rows]
    return f"{op}, {length} tokens: {', '.join(words + [f'{name} {what}' for name, what in wrong.items()])}"


def _cells(row: Row) -> dict[str, Any]:
    times = {name: f"{value:.6f}" for name, value in asdict(row.timing).items()}
    return {"op": row.op, "backend": row.backend, "length": row.length, "grad": int(row.grad), **times}


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(out: Path, profile: str, csv_path: Path, raw: str) -> None:
    """Both files or none: made in a folder beside them, the profile loaded, then moved."""
    with tempfile.TemporaryDirectory(prefix=".tune-", dir=out.parent) as folder:
        made, made_csv = Path(folder, out.name), Path(folder, csv_path.name)
        made.write_text(profile, encoding="utf-8")
        made_csv.write_text(raw, encoding="utf-8")
        load_profile(made)
        os.replace(made_csv, csv_path)
        os.replace(made, out)
    load_profile.cache_clear()  # of the same path, an earlier profile may be remembered


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*names, platform.processor(), platform.machine()]), "CPU")
