"""Run a lane on a machine with a GPU: python .github/scripts/lane.py gpu|4090

The first step is `nsa-routing check`: where torch and Triton do not belong together, or anything else is wrong with
the installation, nothing else runs. The other steps all run, whatever becomes of one another; one that fails fails the
lane.

Tests run in several processes, as they are bound by the host, and those marked `alone` after them in one. A step is
left out by `--skip STEP=REASON` alone, never since a tool is missing. On an RTX 4090 (lane 4090) Triton's kernels are
compared with the oracle only with NSA_TRITON_SEL_FORCE=1: docs/adr/0001-triton-selection-off-on-ada.md.

Under --out lie a report, `lane.txt`, of every step and every skip, with its reason, and what steps write.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ".github/scripts/sanitize.py"
RACES = "--part forward --part decode"  # the backward takes racecheck too long
CHECK = "nsa-routing check --device cuda"
FORCE = "NSA_TRITON_SEL_FORCE"
SAFE = "NSA_PRESET=safe"
UNFORCED = f"NSA_PRESET=perf {FORCE}=0"
SELECTING = "--op select_blocks --op selected_attention --op decode_attention"
BESIDE, ALONE = "gpu and not alone", "gpu and alone"
WORKERS = 8


@dataclass(frozen=True)
class Step:
    """A command, and the variable that must be 1 for it to run, if any. A word NAME=VALUE before it sets a variable."""

    name: str
    command: str
    needs: str = ""


def pytest_step(lane: str, name: str, what: str, markers: str = BESIDE, workers: str = "{workers}") -> Step:
    """Tests with these markers; skips for reasons that are not the lane's fail."""
    report = f"--skip-report {{out}}/skips-{name}.txt"
    spread = f"-n {workers} --dist worksteal"
    return Step(name, f'python -m pytest -p no:cacheprovider {spread} -m "{markers}" --lane {lane} {report} {what}')


SUITE = "packages/nsa packages/nsa-routing packages/nsa-varlen packages/nsa-bench tests-integration"
TRITON = "packages/nsa-kernels-triton"
LANES = {
    "gpu": (
        Step("check", CHECK),
        pytest_step("gpu", "fa2", "packages/nsa-fa2"),
        pytest_step("gpu", "triton", TRITON),
        pytest_step("gpu", "suite", SUITE),
        pytest_step("gpu", "alone", "packages tests-integration", ALONE, "0"),
        Step("launch", f"python {SANITIZE} --processes {{workers}}"),
        Step("memcheck", f"compute-sanitizer --tool memcheck --error-exitcode 9 python {SANITIZE}"),
        Step("racecheck", f"compute-sanitizer --tool racecheck --error-exitcode 9 python {SANITIZE} {RACES}"),
        Step("bench", "NSA_PRESET=perf nsa-bench run bench_decode --quick --device cuda --out {out}/bench_decode.csv"),
        Step("summary", "nsa-bench summarize {out}/bench_decode.csv"),
    ),
    "4090": (
        Step("check", CHECK),
        Step("defaults", f"{SAFE} python .github/scripts/routes.py --device cuda --expect sdpa"),
        # Of what chooses blocks, in the preset that would take Triton for it: ADR 0001, not the preset, keeps it away.
        Step("denied", f"{UNFORCED} python .github/scripts/routes.py --device cuda --expect sdpa {SELECTING}"),
        pytest_step("4090", "sdpa", "tests-integration/test_cuda.py"),
        Step("parity", pytest_step("4090", "parity", TRITON).command, needs=FORCE),
        Step("forced", "NSA_PRESET=perf python .github/scripts/routes.py --device cuda --expect triton", needs=FORCE),
    ),
}


def reason_to_skip(step: Step, asked: dict[str, str], environment: dict[str, str]) -> str:
    """Why a step is left out, or nothing."""
    if step.name in asked:
        return asked[step.name]
    if step.needs and environment.get(step.needs) != "1":
        return f"{step.needs}=1 is not set"
    return ""


def run(command: str, environment: dict[str, str]) -> int:
    """Run a command from the repository's root, with this Python; its exit status, 127 if there is no such program."""
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment = environment | {name: value}
    words = [sys.executable if word == "python" else word for word in words]
    try:
        return subprocess.run(words, cwd=ROOT, env=environment).returncode
    except FileNotFoundError:
        print(f"no such program: {words[0]}", flush=True)
        return 127


def lane(
    name: str,
    out: Path,
    asked: dict[str, str],
    environment: dict[str, str],
    workers: int = WORKERS,
    run: Callable[[str, dict[str, str]], int] = run,
) -> tuple[bool, list[str]]:
    """(whether all that ran is well, a line for each step)."""
    lines, fine = [], True
    for number, step in enumerate(LANES[name]):
        skipped = reason_to_skip(step, asked, environment)
        if skipped:
            lines.append(f"SKIPPED  {step.name}: {skipped}")
            continue
        command = step.command.format(out=shlex.quote(str(out)), workers=workers)
        print(f"::: {step.name}: {command}", flush=True)
        start = time.monotonic()
        status = run(command, environment)
        seconds = time.monotonic() - start
        lines.append(f"{f'FAILED {status}' if status else 'ok':8} {step.name}: {seconds:.0f} s: {command}")
        print(f"::: {lines[-1]}", flush=True)  # a lane that somebody ends has told so far
        fine &= status == 0
        if status and number == 0:
            lines += [f"NOT RUN  {later.name}: {step.name} failed" for later in LANES[name][1:]]
            break
    return fine, lines


def skips(words: list[str], names: list[str]) -> dict[str, str]:
    """STEP=REASON as reason by step. The first step, the check, is never left out."""
    found = {}
    for word in words:
        step, _, reason = word.partition("=")
        if step not in names[1:] or not reason.strip():
            raise SystemExit(f"--skip: expected STEP=REASON, STEP one of {', '.join(names[1:])}, got {word!r}")
        found[step] = reason.strip()
    return found


def main(words: list[str] | None = None) -> int:
    """Run the lane, print and write its report, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lane", choices=LANES)
    parser.add_argument("--skip", action="append", default=[], metavar="STEP=REASON", help="leave it out; repeatable")
    parser.add_argument("--out", type=Path, help="where reports go  [default: out/lane-LANE]")
    fewer = "at a time: fewer where the GPU has little memory  [default: %(default)s]"
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N", help=f"processes {fewer}")
    arguments = parser.parse_args(words)
    asked = skips(arguments.skip, [step.name for step in LANES[arguments.lane]])
    interpret = os.environ.get("TRITON_INTERPRET") or "0"
    if interpret != "0":
        said = "expected a lane of compiled kernels"
        raise SystemExit(f"TRITON_INTERPRET: {said}, got {interpret}; `hatch run gpu:lane` unsets it")
    if arguments.workers < 1:
        raise SystemExit(f"--workers: expected at least 1, got {arguments.workers}")
    out = (arguments.out or ROOT / "out" / f"lane-{arguments.lane}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("skips-*.txt"), out / "bench_decode.csv", out / "lane.txt"]:
        old.unlink(missing_ok=True)
    fine, lines = lane(arguments.lane, out, asked, dict(os.environ), arguments.workers)
    lines.insert(0, f"lane {arguments.lane}: {'all that ran is well' if fine else 'FAILED'}")
    for report in sorted(out.glob("skips-*.txt")):
        lines += ["", f"--- {report.stem}", *report.read_text(encoding="utf-8").splitlines()]
    (out / "lane.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
