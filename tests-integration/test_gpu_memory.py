"""Does a test for a GPU give back what it had, and fail where it takes what others beside it need?"""

from collections.abc import Callable
from functools import partial

import inner_runs
import pytest
import torch

pytest_plugins = ["pytester"]

TESTS = """
import pytest
import torch

def reserve(size):
    torch.cuda.taken.append(size << 30)

@pytest.fixture
def rows():
    reserve(5)
    yield
    reserve(1)

@pytest.mark.gpu
def test_little(): reserve(8)

@pytest.mark.gpu
def test_much(rows): reserve(9)

@pytest.mark.gpu
@pytest.mark.alone
def test_more(): reserve(60)

@pytest.mark.gpu
def test_wrong(): reserve(9); assert False

def test_elsewhere(): reserve(90)
"""
INI = "[pytest]\nmarkers =\n    gpu\n    alone\n"


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Run TESTS with the repository's conftest, and torch's account of a GPU in a list, `torch.cuda.taken`."""
    inner_runs.prepare(pytester)
    pytester.makeini(INI)
    pytester.makepyfile(test_those=TESTS)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "taken", taken, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: max(taken, default=0))
    monkeypatch.setattr(torch.cuda, "empty_cache", taken.clear)
    return partial(inner_runs.run, pytester)


def test_who_takes_much_says_so(run: Callable[..., pytest.RunResult]) -> None:
    result = run()
    result.assert_outcomes(passed=3, failed=2)
    result.stdout.fnmatch_lines(["*took 9.0 GiB of the GPU: expected at most 8.0 GiB, or the marker alone"])
    result.stdout.fnmatch_lines_random(["FAILED test_those.py::test_much*", "FAILED test_those.py::test_wrong*"])


def test_those_that_took_most_are_told(run: Callable[..., pytest.RunResult]) -> None:
    result = run()
    result.stdout.fnmatch_lines(
        [
            "*memory of the GPU*",
            "  60.0 GiB test_those.py::test_more",
            "   9.0 GiB test_those.py::test_much",
            "   8.0 GiB test_those.py::test_little",
        ],
        consecutive=True,
    )
    result.stdout.no_fnmatch_line("*GiB test_those.py::test_elsewhere")


def test_behind_each_it_is_given_back_with_what_fixtures_had(run: Callable[..., pytest.RunResult]) -> None:
    """A failed one's, too; otherwise the next would seem to have taken it."""
    run("-k", "not elsewhere")
    assert torch.cuda.taken == []


def test_without_a_gpu_nothing_is_judged(run: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.no_fnmatch_line("*memory of the GPU*")
