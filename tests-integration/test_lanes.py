"""Do lanes begin with the check, run all the rest, leave out only what somebody said, and report it?

And what workflows and scripts are made of: nothing that lets a failure pass.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import ahead_of_time
import lane
import pytest
import routes
import sanitize
import yaml
from built_packages import PACKAGES, ROOT
from nsa_kernels_triton.contracts import OLDEST_TRITON
from nsa_routing import load_profile
from nsa_routing.compatibility import TRITON_OF_TORCH, minor, wrong_triton

SCRIPTS = ROOT / ".github" / "scripts"
WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))}
HATCH = tomllib.loads((ROOT / "hatch.toml").read_text(encoding="utf-8"))["envs"]


ALL = [(name, step) for name, steps in lane.LANES.items() for step in steps]


class Fake:
    """Commands that do nothing; those that hold a word of `failing` fail."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.ran = failing, []

    def __call__(self, command: str, environment: dict[str, str]) -> int:
        self.ran.append(command)
        return int(any(word in command for word in self.failing))


def run(name: str, fake: Fake, tmp_path: Path, asked: dict[str, str] | None = None, **environment: str) -> Any:
    return lane.lane(name, tmp_path, asked or {}, environment, run=fake)


@pytest.mark.parametrize("name", lane.LANES)
def test_a_failing_check_stops_the_lane(name: str, tmp_path: Path) -> None:
    fake = Fake("nsa-routing check")
    fine, lines = run(name, fake, tmp_path)
    assert not fine
    assert fake.ran == ["nsa-routing check --device cuda"]
    assert lines[0].startswith("FAILED 1 check")
    assert len(lines) == len(lane.LANES[name])
    assert all(line.startswith("NOT RUN") for line in lines[1:])


def test_any_other_failure_stops_nothing_and_fails_the_lane(tmp_path: Path) -> None:
    fake = Fake("packages/nsa-fa2")
    fine, lines = run("gpu", fake, tmp_path)
    assert not fine
    assert len(fake.ran) == len(lane.LANES["gpu"])
    assert [line.split()[0] for line in lines] == ["ok", "FAILED", *["ok"] * (len(lines) - 2)]
    assert run("gpu", Fake(), tmp_path)[0] is True


def test_every_test_for_a_gpu_is_in_one_step() -> None:
    """Of each package and of the integration tests: those that want it alone, and the rest."""
    beside, alone = [], []
    for step in lane.LANES["gpu"]:
        words = shlex.split(step.command)
        if "-m" in words and "pytest" in words:
            markers = words[words.index("-m", words.index("pytest") + 1) + 1]
            assert markers in ("gpu and not alone", "gpu and alone")
            places = [word for word in words if word.startswith(("packages", "tests-integration"))]
            (alone if markers == "gpu and alone" else beside).extend(places)
            assert words[words.index("-n") + 1] == ("0" if markers == "gpu and alone" else "{workers}")
    assert sorted(beside) == sorted([*(f"packages/{name}" for name in PACKAGES), "tests-integration"])
    assert sorted(alone) == ["packages", "tests-integration"]


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_parity_on_a_4090_needs_the_flag(value: str | None, tmp_path: Path) -> None:
    fake = Fake()
    fine, lines = run("4090", fake, tmp_path, **({} if value is None else {"NSA_TRITON_SEL_FORCE": value}))
    assert fine
    parity = [command for command in fake.ran if re.search("packages/nsa-kernels-triton|--expect triton", command)]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    if value == "1":
        assert (len(parity), skipped) == (2, [])
    else:
        assert parity == []
        assert skipped == [f"SKIPPED  {name}: NSA_TRITON_SEL_FORCE=1 is not set" for name in ("parity", "forced")]
    assert any("--expect sdpa" in command for command in fake.ran)


def test_who_leaves_a_step_out_says_why(tmp_path: Path) -> None:
    names = [step.name for step in lane.LANES["gpu"]]
    fake = Fake()
    asked = lane.skips(["memcheck=no sanitizer here"], names)
    _, lines = run("gpu", fake, tmp_path, asked)
    assert "SKIPPED  memcheck: no sanitizer here" in lines
    assert not any("memcheck" in command for command in fake.ran)
    for wrong in ("memcheck", "memcheck= ", "nothing=x", "check=I know better"):
        with pytest.raises(SystemExit, match=r"--skip: expected STEP=REASON"):
            lane.skips([wrong], names)


def test_commands_run_with_this_python_their_variables_and_their_status() -> None:
    code = "import os, sys; sys.exit(7 * (os.environ['A'] == '1') + (sys.executable != os.environ['ME']))"
    assert lane.run(f'A=1 python -c "{code}"', {"ME": sys.executable}) == 7
    assert lane.run("no-such-program-anywhere", {}) == 127


@pytest.mark.parametrize("value", ["1", "true"])
def test_a_lane_of_compiled_kernels_refuses_the_interpreter(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(SystemExit, match="expected a lane of compiled kernels"):
        lane.main(["gpu", "--out", str(tmp_path)])


def test_a_lane_without_processes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="--workers: expected at least 1, got -3"):
        lane.main(["gpu", "--workers", "-3", "--out", str(tmp_path)])


def test_the_report_has_every_step_and_every_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run(command: str, environment: dict[str, str]) -> int:
        if "--skip-report" in command:
            Path(command.partition("--skip-report ")[2].split()[0]).write_text("lane gpu: 1 skipped\na::b: too small\n")
        return 0

    inner = lane.lane
    monkeypatch.setattr(lane, "lane", lambda *args: inner(*args, run=run))
    (tmp_path / "skips-old.txt").write_text("of an earlier run")
    assert lane.main(["gpu", "--out", str(tmp_path), "--skip", "bench=busy"]) == 0
    report = (tmp_path / "lane.txt").read_text().splitlines()
    assert report[0] == "lane gpu: all that ran is well"
    assert "SKIPPED  bench: busy" in report
    parts = [line for line in report if line.startswith("---")]
    assert parts == [f"--- skips-{x}" for x in ("alone", "fa2", "suite", "triton")]
    assert report.count("a::b: too small") == 4


@pytest.mark.parametrize("name, step", ALL, ids=[f"{name}-{step.name}" for name, step in ALL])
def test_what_steps_name_is_there(name: str, step: Any) -> None:
    for word in step.command.split():
        if word.startswith((".github/", "packages/", "tests-integration", "bench/")):
            assert (ROOT / word).exists(), word
    if "--lane" in step.command:
        assert f"--lane {name} " in step.command
    if step.needs:
        assert step.needs == "NSA_TRITON_SEL_FORCE"


def test_routes_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NSA_PRESET", raising=False)
    assert routes.main(["--device", "cpu", "--expect", "sdpa"]) == 0
    assert routes.main(["--device", "cpu", "--expect", "triton"]) == 1
    assert "FAILED  combine: sdpa" in capsys.readouterr().out
    assert routes.main(["--device", "cpu", "--expect", "sdpa", "--op", "combine"]) == 0
    assert capsys.readouterr().out == "ok      combine: sdpa\n"
    with pytest.raises(SystemExit, match=r"--op: expected some of compress_mean, .*, got choose"):
        routes.main(["--device", "cpu", "--expect", "sdpa", "--op", "choose"])


def test_on_a_4090_the_preset_that_takes_triton_is_asked_whether_adr_0001_holds() -> None:
    (step,) = (step for step in lane.LANES["4090"] if step.name == "denied")
    words = shlex.split(step.command)
    assert not step.needs
    assert {"NSA_PRESET=perf", "NSA_TRITON_SEL_FORCE=0"} <= set(words)
    denied = {op for op, names in load_profile("sm89").denials.items() if "triton" in names}
    assert {op for word, op in pairwise(words) if word == "--op"} == denied


ON_A_GPU = """
import compile_kernels, sanitize, sys
sanitize.DEVICE, sanitize.finite = "cpu", lambda *results: None
launches, recorder = sanitize.Counter(), compile_kernels.Recorder()
recorder.sm = 90
with recorder.active(), sanitize.counted(launches):
    for asked in sanitize.product(sanitize.PARTS, sanitize.DTYPES, sanitize.GROUPS):
        sanitize.PARTS[asked[0]](sanitize.DTYPES[asked[1]], asked[2])
sys.exit(", ".join(sorted(sanitize.all_kernels() - launches.keys())) or None)
"""


def test_the_sanitizers_script_would_launch_every_kernel_on_a_gpu() -> None:
    """On its sizes there; launches are noted instead. What kernels leave in memory is anything."""
    done = ahead_of_time.run(ON_A_GPU)
    assert done.returncode == 0, f"never launched: {done.stdout + done.stderr}"


@pytest.mark.slow
def test_the_sanitizers_script_launches_every_kernel() -> None:
    """Interpreted, and of one group; one kernel is for half precision alone, another is not for that."""
    words = [sys.executable, str(SCRIPTS / "sanitize.py"), "--group", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_launch_apart_is_asked_for_once_and_its_failure_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, failing = [], ""

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(" ".join(words[2:]))
        return subprocess.CompletedProcess(words, int(bool(failing) and failing in asked[-1]), "what it did\n", "")

    monkeypatch.setattr(sanitize.subprocess, "run", run)
    assert sanitize.main(["--processes", "3", "--part", "forward", "--part", "decode"]) == 0
    assert sorted(asked) == sorted(
        f"--part {part} --dtype {dtype} --group {group}"
        for part in ("forward", "decode")
        for dtype in sanitize.DTYPES
        for group in sanitize.GROUPS
    )
    failing = "--part decode --dtype half --group 4"
    assert sanitize.main(["--processes", "3"]) == 1


def test_launches_in_no_process_are_refused() -> None:
    for number in ("0", "-1"):
        with pytest.raises(SystemExit, match=f"--processes: expected at least 1, got {number}"):
            sanitize.main(["--processes", number])


def test_launches_are_compiled_before_a_sanitizer_watches() -> None:
    names = [step.name for step in lane.LANES["gpu"]]
    assert names.index("launch") + 1 == names.index("memcheck") < names.index("racecheck")


# --- versions ---------------------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_pins_are_pairs_that_belong_together() -> None:
    for name in ("constraints.txt", *(f"constraints/{each}.txt" for each in ("oldest", "kernels", "newest"))):
        found = pins(name)
        assert wrong_triton(found["torch"], found["triton"]) is None, name
    assert minor(pins("constraints/newest.txt")["torch"]) == list(TRITON_OF_TORCH)[-1]
    lower = re.search(r'"torch>=([\d.]+)"', (ROOT / "packages/nsa-varlen/pyproject.toml").read_text(encoding="utf-8"))
    assert lower is not None
    assert minor(pins("constraints/oldest.txt")["torch"]) == lower[1]
    assert minor(pins("constraints/kernels.txt")["triton"]) == ".".join(map(str, OLDEST_TRITON))


def test_ci_runs_the_matrix_of_hatch() -> None:
    parts = HATCH["matrix"]["matrix"]
    declared = {(python, torch) for part in parts for python in part["python"] for torch in part["torch"]}
    matrix = workflow("ci")["jobs"]["tests"]["strategy"]["matrix"]
    every = {(python, torch) for python in matrix["python"] for torch in matrix["torch"]}
    assert every - {(entry["python"], entry["torch"]) for entry in matrix["exclude"]} == declared
    assert {python for python, _ in declared} == {"3.11", "3.12", "3.13"}


# --- nothing lets a failure pass --------------------------------------------------------------------------------------


def workflow(name: str) -> dict[str, Any]:
    document = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    document["on"] = document.pop(True)  # YAML's word for it
    return document


def bash_scripts() -> list[Path]:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in files.split("\0") if name]
    shells = [path for path in paths if path.is_file() and path.suffix in ("", ".sh")]
    return [path for path in shells if re.match(rb"#!.*\b(ba)?sh\b", path.read_bytes()[:80])]


FORGIVING = {
    "or true": r"\|\|\s*(true|:|exit 0)(\s|$)",
    "a failure goes on": r"continue-on-error",
    "errors are let pass": r"set \+e|set \+o",
    "true at the end": r";\s*true\b",
    "Hatch's own way": r"""["']- """,  # a script's line that begins with a dash
}


def forgiven(text: str) -> list[str]:
    return [name for name, pattern in FORGIVING.items() if re.search(pattern, text, re.MULTILINE)]


@pytest.mark.parametrize(
    "line",
    [
        *("pytest || true", "x ||:", "  continue-on-error: true", "set +e", "set +o pipefail"),
        *("x | tee log; true", 'tests = "- pytest"'),
    ],
)
def test_what_forgives_is_recognised(line: str) -> None:
    assert forgiven(f"first\n{line}\nlast")


def test_no_workflow_and_no_script_forgives() -> None:
    scripts = [*bash_scripts(), *WORKFLOWS.values(), ROOT / "hatch.toml", *SCRIPTS.glob("*.py")]
    assert ROOT / ".ci" / "run" in scripts
    assert {path.name: found for path in scripts if (found := forgiven(path.read_text(encoding="utf-8")))} == {}


def test_bash_scripts_stop_at_the_first_failure() -> None:
    for path in bash_scripts():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert lines[0] == "set -euo pipefail", path


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_strict(name: str) -> None:
    found = workflow(name)
    assert found["defaults"]["run"]["shell"] == "bash", "GitHub then sets -eo pipefail"
    assert found["permissions"] in ({}, {"contents": "read"})
    assert "pull_request_target" not in found["on"]
    for job in found["jobs"].values():
        assert "defaults" not in job
        for step in job["steps"]:
            assert "shell" not in step, "it would take -eo pipefail away"
            assert "||" not in step.get("run", "")
        assert job["timeout-minutes"] <= 120
        own = any("self-hosted" in word for word in job["runs-on"]) if isinstance(job["runs-on"], list) else False
        if own:
            assert found["on"].get("pull_request", {"types": ["labeled"]}) == {"types": ["labeled"]}
            assert "github.event.label.name == 'gpu'" in job["if"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_workflows_run_is_in_hatch(name: str) -> None:
    for job in workflow(name)["jobs"].values():
        commands = job.get("strategy", {}).get("matrix", {}).get("command", [])
        for step in job["steps"]:
            commands = [*commands, *re.findall(r"hatch run ([a-z][\w:-]+)", step.get("run", ""))]
        for command in commands:
            environment, _, script = command.rpartition(":")
            own = HATCH[environment or "default"]
            template = HATCH[own.get("template", "default")]
            assert script in own.get("scripts", {}) | template["scripts"], command
