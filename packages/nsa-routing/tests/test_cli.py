"""Does the command line say what the library knows, to people and to programs, and end as it promises?"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nsa_routing import OPS, Environment, Problem, backends, cli, environment, load_profile, reset
from nsa_routing.pins import constraints
from nsa_routing.tuning import _tune
from packaging.requirements import Requirement
from typer.testing import CliRunner, Result


@dataclass
class Made:
    """A backend that doubles; `refused` is its answer to every question."""

    name: str
    refused: str | None = None

    def refuse(self, op: str, problem: Problem, environment: Environment) -> str | None:
        return self.refused

    def double(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


for op in OPS:
    setattr(Made, op, Made.double)


def op_inputs(op: str, lengths_q: list[int], lengths_k: list[int], **given: Any) -> tuple[tuple[Any], dict[str, Any]]:
    return (torch.ones(lengths_q[0], 2, 2),), {}


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install these backends, and no others, as entry points of a module that is not there otherwise."""

    def install(*made: Any) -> None:
        module = ModuleType("made_backends")
        module.op_inputs = op_inputs
        points = []
        for number, backend in enumerate(made):
            if backend.refused != "does not import":
                setattr(module, f"backend_{number}", backend)
            points.append(EntryPoint(backend.name, f"made_backends:backend_{number}", "nsa.backends"))
        monkeypatch.setitem(sys.modules, "made_backends", module)
        monkeypatch.setattr(backends, "entry_points", lambda group: tuple(points))
        inputs = EntryPoint("made", "made_backends:op_inputs", "nsa.op_inputs")
        monkeypatch.setattr(_tune, "entry_points", lambda group: {"nsa.op_inputs": (inputs,)}[group])
        reset()

    return install


@pytest.fixture(autouse=True)
def _plain(offer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends as on a GPU machine, on a CPU, at 80 columns."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    offer(Made("sdpa"), Made("fa2"), Made("triton", "needs a CUDA device, got cpu"))


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="nsa-routing")


def answer(*words: str, exit_code: int = 0) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def squeezed(text: str) -> str:
    """Without what wrapping and columns do to it."""
    return " ".join(text.split())


ENVIRONMENT = {field.name for field in fields(Environment)} | {"memory_gib"}


def test_probe() -> None:
    found = answer("probe")
    assert found.keys() == {"environment", "backends"}
    assert found["environment"].keys() == ENVIRONMENT
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["backends"] == ["fa2", "sdpa", "triton"]
    gib = found["environment"]["memory"] / 2**30
    assert abs(found["environment"]["memory_gib"] - gib) <= 0.05 + 1e-9  # one decimal
    assert [backend["name"] for backend in found["backends"]] == ["fa2", "sdpa", "triton"]
    assert all(backend.keys() == {"name", "object", "distribution", "version"} for backend in found["backends"])
    text = squeezed(run("probe").stdout)
    assert f"memory {found['environment']['memory_gib']:.1f} GiB" in text
    assert f"torch {torch.__version__}" in text
    assert "fa2 - - made_backends:backend_1" in text
    assert "unknown nothing" in text


@pytest.mark.parametrize(("number", "words"), [(91900, "9.19.0"), (90100, "9.1.0"), (8902, "8.9.2"), (None, "-")])
def test_probe_shows_cudnn_as_people_write_it(number: int | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, cudnn=number)
    assert answer("probe")["environment"]["cudnn"] == number
    assert f"cuDNN {words} driver" in squeezed(run("probe").stdout)


def test_probe_says_what_is_unknown_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: bool) -> dict[str, EntryPoint]:
        raise RuntimeError("the metadata are broken")

    monkeypatch.setattr(environment, "installed_backends", broken)
    assert answer("probe")["environment"]["unknown"] == ["backends: RuntimeError: the metadata are broken"]
    text = squeezed(run("probe").stdout)
    assert "unknown backends: RuntimeError: the metadata are broken" in text
    assert "no backend is installed" in text


def test_probe_names_distribution_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        name, version = "some-kernels", "1.2.3"

    point = EntryPoint("sdpa", "made_backends:backend_0", "nsa.backends")
    vars(point).update(dist=Distribution)
    monkeypatch.setattr(backends, "entry_points", lambda group: (point,))
    (backend,) = answer("probe")["backends"]
    assert (backend["distribution"], backend["version"]) == ("some-kernels", "1.2.3")
    assert "made_backends:backend_0 of some-kernels 1.2.3" in squeezed(run("check").stdout)


def statuses(found: dict[str, Any]) -> dict[str, str]:
    assert found.keys() == {"ok", "checks"}
    assert all(check.keys() == {"name", "status", "reason"} for check in found["checks"])
    return {check["name"]: check["status"] for check in found["checks"]}


def reason(found: dict[str, Any], name: str) -> str:
    (check,) = (check for check in found["checks"] if check["name"] == name)
    return check["reason"]


def test_check_of_a_sound_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answer("check")
    assert found["ok"] is True
    names = ["flags", "device", "profile", "torch-triton", "entry-points", "sdpa"]
    names += [f"backend:{name}" for name in ("fa2", "sdpa", "triton")] + [f"plan:{op}" for op in OPS]
    assert statuses(found) == dict.fromkeys(names, "ok")
    text = run("check").stdout
    assert "FAIL" not in text
    assert text.endswith("16 checks, 0 failed\n")


def failing(name: str, *words: str) -> str:
    """The reason why exactly this check, and what hangs on it, fails: on stdout both ways, with status 1."""
    found = answer("check", *words, exit_code=1)
    assert found["ok"] is False
    assert statuses(found)[name] == "fail"
    result = run("check", *words)
    assert result.exit_code == 1
    assert squeezed(f"{name} FAIL") in squeezed(result.stdout)
    return reason(found, name)


def test_check_of_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_PRESET", "fast")
    assert failing("flags") == "NSA_PRESET: expected one of ['safe', 'perf'], got 'fast'"
    monkeypatch.setenv("NSA_PRESET", "perf")
    assert reason(answer("check"), "flags") == "NSA_PRESET=perf"
    monkeypatch.setenv("NSA_TYPO", "1")
    assert failing("flags").startswith("NSA_TYPO: expected one of the variables")


def test_check_of_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsource: a test\nextends: base\norder: {combine: [fa2]}\n")
    assert "order.combine: expected sdpa at the end" in failing("profile", "--profile", path)
    assert not [name for name in statuses(answer("check", "--profile", path, exit_code=1)) if "plan" in name]
    monkeypatch.setenv("NSA_PROFILE", "sm999")
    assert "got 'sm999'" in failing("profile")
    assert reason(answer("check", "--profile", "sm90"), "profile") == "sm90", "the option outranks the flag"


def test_check_warns_of_a_profile_made_for_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answer("check", "--device", "mps")
    assert statuses(found)["profile"] == "warn"
    assert reason(found, "profile") == "base (no profile for device mps without an SM: base is used)"


def with_versions(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """The machine as it is, but for these facts."""
    machine = cli.probe_machine

    def probe(device: str | None = None, index: int = 0) -> Environment:
        found = machine(device, index)
        return Environment(**({field.name: getattr(found, field.name) for field in fields(found)} | facts))

    monkeypatch.setattr(cli, "probe_machine", probe)


def test_check_of_torch_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch="2.11.0+cu130", triton="3.7.1", triton_pin=None)
    assert failing("torch-triton") == "torch 2.11.0+cu130 needs triton 3.6, got triton 3.7.1"
    with_versions(monkeypatch, triton=None)
    assert statuses(answer("check"))["torch-triton"] == "ok"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("torch_version", "triton", "pin", "right"),
    [
        ("2.4.1+cu121", "3.0.0", "3.0.0", None),
        ("2.13.0+cpu", "3.7.1", None, None),
        ("2.15.0+cu130", "3.9.0", "3.9.0", None),
        ("2.4.1+cpu", "3.7.1", None, "3.0"),
        ("2.13.0+cpu", "3.6.0", None, "3.7"),
        ("2.15.0+cu130", "3.8.1", "3.9.0", "3.9"),
    ],
)
def test_the_exit_status_knows_the_pair_with_and_without_a_gpu(
    torch_version: str, triton: str, pin: str | None, right: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the device is: lanes begin with this command."""
    facts = {"device": device, "sm": 90 if device == "cuda" else None, "unknown": ()}
    with_versions(monkeypatch, torch=torch_version, triton=triton, triton_pin=pin, **facts)
    if right is None:
        assert statuses(answer("check"))["torch-triton"] == "ok"
    else:
        message = f"torch {torch_version} needs triton {right}, got triton {triton}"
        assert failing("torch-triton") == message


def test_check_of_what_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, unknown=("driver: OSError: none",))
    found = answer("check")
    assert (statuses(found)["environment"], reason(found, "environment")) == ("warn", "driver: OSError: none")


def test_check_of_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that asks for a GPU stops; a device that torch knows by name alone is one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (_ for _ in ()).throw(RuntimeError("none")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: (_ for _ in ()).throw(RuntimeError("none")))
    assert failing("device", "--device", "cuda") == "cuda was asked for, and torch finds none"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    found = answer("check", "--device", "cuda")
    assert (statuses(found)["device"], reason(found, "device")) == ("ok", "a GPU")


def test_check_of_backends(offer: Callable) -> None:
    offer(Made("sdpa"), Made("gone", "does not import"))
    assert failing("backend:gone").startswith("AttributeError: module 'made_backends' has no attribute")
    named = Made("fa2")
    offer(Made("sdpa"), named)
    named.name = "other"
    assert failing("backend:fa2").startswith("TypeError: backend fa2: expected an object with name='fa2'")
    assert statuses(answer("check", exit_code=1))["plan:combine"] == "ok", "sdpa is sound"


def test_check_of_a_backend_whose_import_fails_in_its_own_way(offer: Callable) -> None:
    """It is reported, and the plans are made without it."""
    offer(Made("sdpa"), Made("fa2", "does not import"))
    sys.modules["made_backends"].__getattr__ = lambda name: 1 // 0
    assert failing("backend:fa2") == "ZeroDivisionError: integer division or modulo by zero"
    assert statuses(answer("check", exit_code=1))["plan:window_attention"] == "ok"


def test_check_of_entry_points(offer: Callable) -> None:
    offer(Made("sdpa"), Made("sdpa"))
    assert failing("entry-points").startswith("backend sdpa: expected one distribution to offer it")


def test_check_of_sdpa_and_of_plans(offer: Callable) -> None:
    offer(Made("fa2"))
    assert failing("sdpa") == "nothing to fall back to: install nsa-varlen"
    assert "sdpa: not installed" in failing("plan:combine")
    offer(Made("sdpa", "not today"))
    assert "sdpa: not today" in failing("plan:window_attention")


def test_check_of_pins(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    pins = {"packaging": "<1", "PyYAML": ">=1", "no-such-distribution": "==1"}
    path.write_text(f"{{name: mine, source: a test, extends: base, pins: {json.dumps(pins)}}}")
    found = answer("check", "--profile", path)
    assert found["ok"] is True
    assert {name: status for name, status in statuses(found).items() if name.startswith("pin:")} == {
        "pin:packaging": "warn",
        "pin:PyYAML": "ok",
        "pin:no-such-distribution": "ok",
    }
    assert re.fullmatch(r"[\d.]+ is not within <1", reason(found, "pin:packaging"))
    assert reason(found, "pin:no-such-distribution") == "not installed (==1)"


def test_explain() -> None:
    found = answer("explain")
    assert found.keys() == {"environment", "made_up", "profile", "preset", "plans"}
    assert found["environment"].keys() == ENVIRONMENT
    assert found["profile"] == {"name": "cpu", "source": load_profile("cpu").source, "note": None}
    assert (found["made_up"], found["preset"]) == (False, "safe")
    assert [plan["op"] for plan in found["plans"]] == list(OPS)
    for plan in found["plans"]:
        assert plan.keys() == {"op", "backend", "requested", "problem", "candidates"}
        assert plan["problem"].keys() == {field.name for field in fields(Problem)}
        assert (plan["backend"], plan["requested"], plan["problem"]["dtype"]) == ("sdpa", None, "float32")
        assert all(candidate.keys() == {"backend", "verdict", "reason"} for candidate in plan["candidates"])
        assert plan["candidates"][-1] == {"backend": "sdpa", "verdict": "chosen", "reason": None}
        refused = {"backend": "triton", "verdict": "rejected", "reason": "needs a CUDA device, got cpu"}
        assert refused in plan["candidates"]


def test_explain_to_people() -> None:
    text = run("explain").stdout
    for op in OPS:
        assert re.search(rf"^{op} +sdpa +triton +needs a CUDA device, got cpu$", text, re.MULTILINE)
    assert "fa2 preset safe does not take it; NSA_BACKEND can name it" in squeezed(text)
    assert "preset safe" in squeezed(text)
    assert f"source {load_profile('cpu').source}" in squeezed(text)
    assert "problem float32, head_dim 128/128, group size 16, 8192 queries over 8192 keys" in squeezed(text)


def test_explain_for_a_gpu_that_is_not_here() -> None:
    found = answer("explain", "--sm", "86", "--op", "window_attention", "--preset", "perf")
    assert (found["made_up"], found["environment"]["sm"], found["environment"]["device"]) == (True, 86, "cuda")
    assert found["profile"]["note"] == "no profile for SM 8.6: the nearest lower one of its family is used"
    (plan,) = found["plans"]
    assert (plan["backend"], plan["problem"]["dtype"], plan["problem"]["device"]) == ("fa2", "bfloat16", "cuda")
    assert plan["candidates"][-1] == {"backend": "sdpa", "verdict": "accepted", "reason": None}
    text = squeezed(run("explain", "--sm", "86", "--op", "window_attention", "--preset", "perf").stdout)
    assert "a GPU, SM 8.6 (not this machine; backends and versions are those installed here)" in text
    assert "sm80 (no profile for SM 8.6: the nearest lower one of its family is used)" in text
    assert "sdpa accepted, but later in the order" in text


def test_a_gpu_that_is_not_here_has_the_cudnn_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found = answer("explain", "--sm", "90")["environment"]
    assert (found["cudnn"], found["unknown"]) == (91900, [])
    assert answer("explain")["environment"]["cudnn"] is None


def test_explain_takes_the_problem_from_its_options() -> None:
    words = "--dtype float16 --head-dim 64 --v-head-dim 32 --group-size 4"
    words += " --max-seqlen-q 3 --max-seqlen-k 70 --total-q 5"
    problem = answer("explain", *words.split(), "--op", "window_attention", "--grad", "--paged", "--deterministic")
    asked = problem["plans"][0]["problem"]
    expected = {
        "dtype": "float16",
        "head_dim": 64,
        "v_head_dim": 32,
        "group_size": 4,
        "max_seqlen_q": 3,
        "max_seqlen_k": 70,
        "total_q": 5,
        "needs_grad": True,
        "paged": True,
        "deterministic": True,
    }
    assert {name: asked[name] for name in expected} == expected
    alone = answer("explain", "--max-seqlen-k", "70", "--head-dim", "64")["plans"][4]["problem"]
    assert [alone[name] for name in ("max_seqlen_q", "total_q", "v_head_dim", "deterministic")] == [70, 70, 64, False]


@pytest.mark.parametrize(
    "words, uniform",
    [
        ("", True),
        ("--max-seqlen-k 70 --total-q 140", True),
        ("--max-seqlen-k 70 --total-q 140 --ragged", False),
        ("--max-seqlen-k 70 --total-q 100", False),
        ("--max-seqlen-q 1", False),
    ],
    ids=["typical", "two", "ragged", "two by total", "decode"],
)
def test_explain_plans_for_uniform_and_ragged_batches(words: str, uniform: bool) -> None:
    asked = {plan["op"]: plan["problem"]["uniform"] for plan in answer("explain", *words.split())["plans"]}
    assert asked == {op: uniform and op not in ("compress_mean", "combine", "decode_attention") for op in OPS}
    assert ("keys, ragged" in squeezed(run("explain", *words.split()).stdout)) is ("--ragged" in words)


def test_options_outrank_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_PRESET", "perf")
    monkeypatch.setenv("NSA_PROFILE", "sm90")
    monkeypatch.setenv("NSA_BACKEND", "sdpa")
    monkeypatch.setenv("NSA_DETERMINISTIC", "1")

    def told(*words: str) -> tuple[Any, ...]:
        found = answer("explain", "--op", "window_attention", *words)
        plan = found["plans"][0]
        return found["profile"]["name"], found["preset"], plan["requested"], plan["problem"]["deterministic"]

    assert told() == ("sm90", "perf", "sdpa", True)
    assert told("--profile", "cpu", "--preset", "safe", "--backend", "window_attention=fa2", "--no-deterministic") == (
        "cpu",
        "safe",
        "fa2",
        False,
    )


def test_explain_shows_a_request_that_nobody_can_obey() -> None:
    (plan,) = answer("explain", "--backend", "triton", "--op", "combine")["plans"]
    assert (plan["backend"], plan["requested"]) == (None, "triton")
    text = run("explain", "--backend", "triton", "--op", "combine").stdout
    assert re.search(r"^combine +none +triton +needs a CUDA device, got cpu$", text, re.MULTILINE)


def test_a_profile_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("{name: mine, source: a test, extends: cpu, presets: {safe: {fa2: always}}}")
    assert answer("explain", "--profile", path, "--op", "window_attention")["plans"][0]["backend"] == "fa2"


def test_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run("pins", "--profile", "sm90").stdout
    assert text == constraints(load_profile("sm90"))
    assert {Requirement(line).name for line in text.splitlines()[1:]} == {"nsa-kernels-triton", "nsa-fa2"}
    found = answer("pins", "--profile", "sm90")
    assert found.keys() == {"profile", "source", "pins"}
    assert found["pins"] == dict(load_profile("sm90").pins)
    assert run("pins", "--profile", "sm90", "--out", tmp_path / "c.txt").stdout == f"wrote {tmp_path / 'c.txt'}\n"
    assert (tmp_path / "c.txt").read_text() == text
    assert run("pins").stdout.startswith("# profile cpu: "), "this machine's"
    monkeypatch.setenv("NSA_PROFILE", "sm80")
    assert run("pins").stdout.startswith("# profile sm80: ")


TUNE = ("--lengths", "16,32", "--num-heads", "2", "--num-kv-heads", "1", "--repeat", "3", "--device", "cpu")


def test_tune(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    words = ("--ops", "combine,compress_mean", "--backends", "fa2", "--preset", "perf")
    found = answer("tune", "--out", out, *TUNE, *words)
    assert found.keys() == {"profile", "csv", "extends", "note", "findings", "measurements"}
    assert (found["profile"], found["csv"], found["extends"]) == (str(out), str(tmp_path / "mine.csv"), "cpu")
    assert all(one.keys() == {"op", "backend", "outcome", "at_least", "words"} for one in found["findings"])
    assert [(one["op"], one["backend"]) for one in found["findings"]] == [("compress_mean", "fa2"), ("combine", "fa2")]
    times = {"median_ms", "p25_ms", "p75_ms", "min_ms"}
    assert all(row.keys() == {"op", "backend", "length", "grad"} | times for row in found["measurements"])
    assert len(found["measurements"]) == 2 * 2 * 2  # ops, lengths, backends
    assert load_profile(out).name == "mine"


def test_tune_takes_how_fast_a_backend_must_be(tmp_path: Path) -> None:
    words = ("--ops", "combine", "--backends", "fa2", "--preset", "perf", "--speedup", "1e9")
    (found,) = answer("tune", "--out", tmp_path / "mine.yaml", *TUNE, *words)["findings"]
    assert found["words"] == "no threshold: at no length 1e+09 times as fast as sdpa, beyond the spread"
    assert load_profile(tmp_path / "mine.yaml").source.endswith("at least 1e+09 times as fast as sdpa.")


def test_tune_to_people(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    result = run("tune", "--out", out, *TUNE, "--ops", "combine")
    assert result.exit_code == 0, result.output
    assert re.search(r"^combine +triton +not measured: needs a CUDA device, got cpu$", result.stdout, re.MULTILINE)
    assert f"wrote {out}, which extends cpu, and {tmp_path / 'mine.csv'}\n" in result.stdout
    assert result.stdout.endswith(f"to plan by it: NSA_PROFILE={out}\n")
    told = r"^combine, (?:16|32) tokens: sdpa [\d.]+ ms, fa2 [\d.]+ ms$"
    assert len(re.findall(told, result.stderr, re.MULTILINE)) == 2


def test_tune_with_sdpa_alone(offer: Callable, tmp_path: Path) -> None:
    offer(Made("sdpa"))
    result = run("tune", "--out", tmp_path / "mine.yaml", *TUNE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "nsa-routing: expected sdpa and another backend to compare it with, got (installed) sdpa\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "option", "message"),
    [
        ("explain --op attention", "--op", "expected one of compress_mean, .*, got 'attention'"),
        ("explain --preset fast", "--preset", "expected one of safe, perf, got 'fast'"),
        ("explain --dtype int8", "--dtype", "expected one of bfloat16, float16, float32, got 'int8'"),
        ("explain --device banana", "--device", "expected a device such as cpu or cuda, got 'banana'"),
        ("explain --device cuda:1", "--device", "expected a device without its number, .*, got 'cuda:1'"),
        ("explain --sm 90 --device cpu", "--sm", "expected no --device but cuda with --sm, got 'cpu'"),
        ("explain --sm 9", "--sm", ".+"),
        ("explain --head-dim 0", "--head-dim", ".+"),
        ("explain --max-seqlen-k many", "--max-seqlen-k", ".+"),
        ("explain --total-q 9", "--total-q", "expected at least 8192, the longest sequence's, got 9"),
        ("explain --backend combine=", "--backend", "expected a name or op=name pairs, got 'combine='"),
        ("check --index -1", "--index", ".+"),
        ("pins --out no-such-folder/c.txt", "--out", "expected a file that can be written, got .*No such file"),
        ("tune --out mine.txt", "--out", r"expected a path in an existing folder that ends in \.yaml, got 'mine\.txt'"),
        ("tune --out no-such-folder/mine.yaml", "--out", "expected a path in an existing folder"),
        ("tune --out m.yaml --ops combine,win", "--ops", "expected one of compress_mean, .*, got 'win'"),
        ("tune --out m.yaml --lengths 1,x", "--lengths", "expected numbers of tokens joined by commas, got '1,x'"),
        ("tune --out m.yaml --lengths 0", "--lengths", "expected numbers of tokens joined by commas, got '0'"),
        ("tune --out m.yaml --lengths ,", "--lengths", "expected values joined by commas, got ','"),
        ("tune --out m.yaml --ops ,", "--ops", "expected values joined by commas, got ','"),
        ("tune --out m.yaml --backends fa2,", "--backends", "expected values joined by commas, got 'fa2,'"),
        ("tune --out m.yaml --backends fa3", "--backends", "expected some of fa2, sdpa, triton, got 'fa3'"),
        ("tune --out m.yaml --num-heads 6", "--num-heads", "expected a multiple of --num-kv-heads=4, got 6"),
        ("tune --out m.yaml --repeat 2", "--repeat", ".+"),
        ("tune --out m.yaml --speedup 0.9", "--speedup", ".+"),
    ],
)
def test_wrong_options_end_with_status_2_and_say_which(words: str, option: str, message: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.search(rf"Invalid value for '{option}': {message}", squeezed(result.stderr)), result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("m.yaml").exists()


@pytest.mark.parametrize("words", ["explain", "pins", "explain --json"])
@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("NSA_PRESET", "fast", "NSA_PRESET: expected one of ['safe', 'perf'], got 'fast'"),
        ("NSA_PROFILE", "sm999", "profile: expected one of ['base', 'cpu', 'sm100', 'sm80', 'sm89', 'sm90'] or a"),
    ],
)
def test_wrong_flags_end_with_status_1_and_one_line(
    words: str, flag: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flag, value)
    result = run(*words.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"nsa-routing: {message}")
    assert result.stderr.count("\n") == 1


def test_tune_reads_the_flags_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_PROFILE", "sm999")  # does not matter: the new profile extends the device's
    assert answer("tune", "--out", tmp_path / "m.yaml", *TUNE, "--ops", "combine")["extends"] == "cpu"
    monkeypatch.setenv("NSA_FA2", "2")
    result = run("tune", "--out", tmp_path / "n.yaml", *TUNE)
    assert result.exit_code == 1
    assert result.stderr == "nsa-routing: NSA_FA2: expected one of ['auto', '0', '1'], got '2'\n"


def test_yaml_with_a_mistake_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: [\n")
    result = run("explain", "--profile", tmp_path / "mine.yaml")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"nsa-routing: {tmp_path / 'mine.yaml'}: expected YAML, got ")
    assert result.stderr.count("\n") == 1


LONG = "takes float16 and bfloat16 only, got torch.float32, and heads of at most two hundred and fifty-six dimensions"
REPORTS = ("probe", "check", "explain", "explain --sm 90 --preset perf", "explain --sm 89", "check --profile sm90")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", REPORTS)
def test_reports_keep_to_the_width_and_cut_no_word(
    words: str, columns: int, offer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    offer(Made("sdpa"), Made("fa2", LONG), Made("fa2-torch", LONG), Made("triton"))
    text = run(*words.split()).stdout
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    assert not re.search(r"\s$", text.replace("\n", "|")), "trailing blanks"
    monkeypatch.setenv("COLUMNS", "400")
    wide = run(*words.split()).stdout
    assert sorted(text.split()) == sorted(wide.split()), "no word is broken or lost"


def test_a_pipe_without_columns_gets_80() -> None:
    assert 60 < max(map(len, run("explain").stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("environ", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)]
)
def test_colour_is_for_terminals(environ: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for words in ("check", "explain"):
        text = run(words).stdout
        assert bool(re.search(r"\x1b\[[\d;]*3[12]m", text)) is coloured, "red or green"
    assert "\x1b" not in run("explain", "--json").stdout


@pytest.mark.parametrize("words", ["", "probe", "check", "explain", "pins", "tune"])
def test_help(words: str) -> None:
    result = run(*words.split(), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: nsa-routing {words}".rstrip())
    assert "..." not in re.sub(r",\.\.\.|ARGS\]\.\.\.|cuda, \.\.\.", "", result.stdout), "a summary is cut off"


def test_importing_the_package_imports_no_command_line() -> None:
    code = "import sys, nsa_routing; print(*({'typer', 'rich', 'click', 'nsa_routing.cli'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
