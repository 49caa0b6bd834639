"""Is the example of docs/adding-a-backend.md found, taken, right and guarded as the page says, once it is installed?"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from built_packages import ROOT
from nsa import nsa_attention, ops
from nsa_routing import Accepted, Problem, Rejected, closed, failure_counts, plan_for, reset
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.testing import FP32, Inputs, random_inputs

PAGE = ROOT / "docs" / "adding-a-backend.md"
EXAMPLE = ROOT / "docs" / "examples" / "nsa-backend-example"
MODULE = EXAMPLE / "src" / "nsa_backend_example" / "__init__.py"
LAYOUT = VarlenLayout.from_lengths([300, 5, 0, 7, 9, 3], [300, 40, 6, 3, 0, 3])
BLOCKS = BlockGeometry(window_size=50)
ROUTE = ("example", "window_attention", "cpu")


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(line: str, folder: Path) -> str:
    """What a command of the page prints, where `out` is `folder`; `pip` and `nsa-routing` are those of this Python."""
    line = re.sub(r"\bout/", f"{folder}/", line)
    flags = dict(re.findall(r"(\w+)=(\S+) ", line))
    words = shlex.split(re.sub(r"\w+=\S+ ", "", line), comments=True)
    start = {"pip": ["-m", "pip"], "nsa-routing": ["-c", "from nsa_routing.cli import app; app()"]}[words[0]]
    paths = [flags.pop("PYTHONPATH", None), os.environ.get("PYTHONPATH")]
    environment = os.environ | flags | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "200"}
    command = [sys.executable, *start, *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """What each command of the page prints, by the command's name, run in their order; and where they wrote to."""
    folder = tmp_path_factory.mktemp("out")
    lines = [line.removeprefix("$ ") for line in "".join(fenced("console")).splitlines() if line.startswith("$ ")]
    assert [re.findall(r"(?:pip|nsa-routing) \w+", line) for line in lines] == [
        ["pip wheel"],
        ["pip install"],
        ["nsa-routing check"],
        ["nsa-routing explain"],
    ]
    assert "--no-index --no-deps" in lines[1]
    names = ("wheel", "install", "check", "explain")
    return {name: run(line, folder) for name, line in zip(names, lines, strict=True)}, folder


@pytest.fixture(scope="module")
def installed(printed: tuple[dict[str, str], Path]) -> Path:
    """The folder that the wheel was installed to, and nothing else."""
    folder = printed[1] / "example"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["nsa_backend_example", "nsa_backend_example-0.1.0.dist-info"]
    return folder


@pytest.fixture
def example(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend as it is installed, found by its entry point."""
    monkeypatch.syspath_prepend(installed)
    reset()
    import nsa_backend_example

    assert Path(nsa_backend_example.__file__).is_relative_to(installed)
    yield nsa_backend_example.BACKEND
    reset()


@pytest.fixture
def planned(example: Any, flags: Callable[..., None]) -> Any:
    """The backend, with the profile that takes it."""
    flags(PROFILE=str(EXAMPLE / "profile.yaml"))
    return example


@pytest.fixture
def spoiled(planned: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """Let the backend's operation return what a function makes of its result, or raise what it raises."""

    def spoil(change: Callable[[Any], Any]) -> None:
        exact = type(planned).window_attention
        monkeypatch.setattr(planned, "window_attention", lambda *x, **y: change(exact(planned, *x, **y)), raising=False)
        reset()

    return spoil


def inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    return random_inputs(LAYOUT, head_dim=16, v_head_dim=8, dtype=dtype)


def window(backend: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, _ = inputs(dtype)
    return ops.window_attention(q, k, v, LAYOUT, BLOCKS, backend=backend)


def oracle() -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, _ = inputs(torch.float64)
    return reference.window_attention(q, k, v, LAYOUT, BLOCKS)


def close(result: tuple[torch.Tensor, torch.Tensor]) -> None:
    for got, exact in zip(result, oracle(), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0.0, atol=FP32)


def problem(**changed: Any) -> Problem:
    sizes = {"head_dim": 16, "v_head_dim": 8, "group_size": 2, "max_seqlen_q": 300, "max_seqlen_k": 300}
    return Problem(**{"op": "window_attention", "device": "cpu", "dtype": torch.float32, **sizes} | changed)


def reason(candidates: tuple[Accepted | Rejected, ...]) -> str:
    (rejected,) = [x for x in candidates if x.backend == "example"]
    assert isinstance(rejected, Rejected)
    return rejected.reason


def test_the_page_has_the_code_and_says_how_long_it_is() -> None:
    assert MODULE.read_text(encoding="utf-8") == fenced("python")[0]
    assert (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8") == fenced("toml")[0]
    assert (EXAMPLE / "profile.yaml").read_text(encoding="utf-8") == fenced("yaml")[0]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLE.glob("src/**/*.py"))
    assert lines <= 60
    assert f"in {lines} lines" in " ".join(PAGE.read_text(encoding="utf-8").split())


def test_check_and_explain_name_it(printed: tuple[dict[str, str], Path]) -> None:
    said = {name: [" ".join(line.split()) for line in text.splitlines()] for name, text in printed[0].items()}
    assert "backend:example ok nsa_backend_example:BACKEND of nsa-backend-example 0.1.0" in said["check"]
    assert "window_attention example sdpa accepted, but later in the order" in said["explain"]


def test_its_threshold_holds_it_back(planned: Any) -> None:
    short = plan_for(problem(max_seqlen_k=63))
    assert (short.backend, reason(short.candidates)) == ("sdpa", "pays from max_seqlen_k 64, got 63")


def test_it_is_not_there_where_it_is_not_installed() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*, got 'example'"):
        window(backend="example")


@pytest.mark.parametrize("asked", ["example", None])
def test_a_call_reaches_it_and_equals_the_oracle(
    planned: Any, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    calls = []
    exact = planned.window_attention
    monkeypatch.setattr(planned, "window_attention", lambda *x, **y: calls.append(1) or exact(*x, **y), raising=False)
    reset()
    close(window(backend=asked))
    assert calls == [1]


def test_gradients_equal_the_oracles(example: Any) -> None:
    leaves, exact = inputs().leaves(), inputs(torch.float64).leaves()
    out, lse = ops.window_attention(*leaves[:3], LAYOUT, BLOCKS, backend="example")
    assert not lse.requires_grad
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * grad.float()).sum().backward()
    (reference.window_attention(*exact[:3], LAYOUT, BLOCKS)[0] * grad).sum().backward()
    for got, expected in zip(leaves[:3], exact[:3], strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=0.0, atol=FP32)


def test_results_are_the_same_twice_and_inputs_stay(example: Any) -> None:
    given, before = inputs(), inputs()
    results = [
        ops.window_attention(*given[:3], LAYOUT, BLOCKS, deterministic=True, backend="example") for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_what_it_does_not_take_goes_to_sdpa_with_a_reason(planned: Any) -> None:
    half = plan_for(problem(dtype=torch.bfloat16))
    assert (half.backend, reason(half.candidates)) == ("sdpa", "takes torch.float32, not torch.bfloat16")
    paged = plan_for(problem(paged=True))
    assert (paged.backend, reason(paged.candidates)) == ("sdpa", "does not take paged")
    assert plan_for(problem()).backend == "example"
    out, _ = window(dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16


def test_a_request_that_it_does_not_take_raises_with_the_reason(planned: Any) -> None:
    with pytest.raises(RuntimeError, match=r"example +rejected: takes torch.float32, not torch.bfloat16"):
        window(backend="example", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "error, stays_open",
    [
        (MemoryError("no room"), True),
        (RuntimeError("Failed to find C compiler"), False),
        (RuntimeError("libexample does not load"), False),
    ],
    ids=["memory", "compiler", "library"],
)
def test_its_own_failures_fall_back_in_the_same_call(spoiled: Any, error: Exception, stays_open: bool) -> None:
    def fail(result: Any) -> Any:
        raise error

    spoiled(fail)
    close(window())
    assert (ROUTE not in closed()) is stays_open
    assert failure_counts()[ROUTE] == {"ran out of memory" if stays_open else "failed to compile": 1}


def test_nan_is_replaced_in_the_same_call_and_closes_the_route(spoiled: Any) -> None:
    spoiled(lambda result: (result[0] * torch.nan, result[1]))
    close(window())
    assert closed() == {ROUTE}
    close(window())
    assert failure_counts()[ROUTE] == {"returned non-finite values for finite inputs": 1}
    with pytest.raises(RuntimeError, match="closed on cpu after a failure"):
        window(backend="example")


def test_any_other_exception_reaches_the_caller(spoiled: Any) -> None:
    def fail(result: Any) -> Any:
        raise IndexError("a mistake in the backend")

    spoiled(fail)
    with pytest.raises(IndexError, match="a mistake in the backend"):
        window()
    assert closed() == frozenset()


def test_a_wrong_shape_is_stopped_by_the_operation_that_takes_it(spoiled: Any) -> None:
    """Nobody looks at shapes where results come out."""
    spoiled(lambda result: (result[0][:-1], result[1]))
    q, k, v, gates = inputs()
    k_cmp, v_cmp = (ops.compress_mean(x, LAYOUT, BLOCKS) for x in (k, v))
    with pytest.raises(ValueError, match=r"o_win: expected \[324, 4, 8\] .* got \[323, 4, 8\]"):
        nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, LAYOUT, BLOCKS)
    assert closed() == frozenset()
