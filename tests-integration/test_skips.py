"""Does a lane fail where a test is skipped for a reason that nobody allowed, and does its report leave none out?"""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import inner_runs
import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
ALLOWED = """
lanes = ["cpu", "gpu"]

[[allowed]]
lanes = ["cpu"]
reason = "needs .+ (tool|two)"
why = "it is not here"

[[allowed]]
lanes = ["gpu"]
reason = "too small"
why = "GPUs differ"
"""
ENTRY = "lanes = ['cpu']\n[[allowed]]\n"
FINE = """
import pytest

def test_runs(): pass

@pytest.mark.parametrize("x", [1, 2])
@pytest.mark.skipif(True, reason="needs a tool")
def test_two_at_once(x): pass
"""
OF_EACH_KIND = """
def test_called(): pytest.skip("odd: in the call")

@pytest.fixture
def absent(): pytest.skip("odd: in a fixture")

def test_fixture(absent): pass

@pytest.mark.skip
def test_without_a_reason(): pass

@pytest.mark.xfail(reason="odd: it fails")
def test_fails(): assert False

@pytest.mark.xfail(reason="odd: it passes")
def test_passes(): pass

def test_prefix(): pytest.skip("it needs a tool")

def test_suffix(): pytest.skip("needs a tool, they say")

def test_two_lines(): pytest.skip("needs a tool\\nor two")
"""
MODULE = """
import pytest

pytest.skip("odd: a module", allow_module_level=True)
"""


@pytest.fixture
def lane(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Run the folder's tests in a lane, with the repository's conftest."""
    inner_runs.prepare(pytester)
    (pytester.path / "skips.toml").write_text(ALLOWED)

    def run(name: str, *words: str) -> pytest.RunResult:
        words = "--lane", name, "--skips", "skips.toml", "--skip-report", "out/skips.txt", *words
        return inner_runs.run(pytester, *words)

    return run


def report(pytester: pytest.Pytester) -> list[str]:
    return (pytester.path / "out" / "skips.txt").read_text().splitlines()


def test_allowed_reasons_pass_and_are_told(pytester: pytest.Pytester, lane: Callable) -> None:
    pytester.makepyfile(FINE)
    result = lane("cpu")
    result.assert_outcomes(passed=1, skipped=2)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*skips in lane cpu*", "    2 skipped: needs a tool"])
    result.stdout.no_fnmatch_line("*NOT ALLOWED*")
    module = "test_allowed_reasons_pass_and_are_told.py"
    assert report(pytester) == [
        "lane cpu: 2 skipped, 0 of them for a reason that is not allowed",
        "    2 skipped: needs a tool",
        "",
        *(f"{module}::test_two_at_once[{x}]: skipped: needs a tool" for x in (1, 2)),
    ]


@pytest.mark.parametrize("processes", ["0", "2"])
def test_any_other_reason_fails(processes: str, pytester: pytest.Pytester, lane: Callable) -> None:
    pytester.makepyfile(test_kinds=FINE + OF_EACH_KIND, test_whole=MODULE)
    result = lane("cpu", "-n", processes)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "failed" not in result.parseoutcomes(), "the tests themselves are fine"
    refused = [
        "test_kinds.py::test_fails: expected to fail: odd: it fails",
        "test_kinds.py::test_passes: expected to fail and passed: odd: it passes",
        "test_whole.py: skipped: odd: a module",
        "test_kinds.py::test_called: skipped: odd: in the call",
        "test_kinds.py::test_fixture: skipped: odd: in a fixture",
        "test_kinds.py::test_without_a_reason: skipped: unconditional skip",
        "test_kinds.py::test_prefix: skipped: it needs a tool",
        "test_kinds.py::test_suffix: skipped: needs a tool, they say",
    ]
    lines = [line for line in report(pytester) if line.startswith("NOT ALLOWED")]
    assert sorted(lines) == sorted(f"NOT ALLOWED: {line}" for line in refused)
    assert report(pytester)[0] == "lane cpu: 11 skipped, 8 of them for a reason that is not allowed"
    assert {f"NOT ALLOWED in lane cpu: {line}" for line in refused} <= set(result.outlines)


def test_subtests_are_told_one_by_one(pytester: pytest.Pytester, lane: Callable) -> None:
    """They share their test's name: the last reason is not that of all."""
    code = "def test_parts(subtests):\n"
    for part, reason in enumerate(["odd: nobody allowed it", "needs a tool"]):
        code += f"    with subtests.test(part={part}):\n        pytest.skip('{reason}')\n"
    pytester.makepyfile("import pytest\n" + code)
    assert lane("cpu").ret == pytest.ExitCode.TESTS_FAILED
    assert report(pytester)[0] == "lane cpu: 2 skipped, 1 of them for a reason that is not allowed"


def test_what_one_lane_may_skip_another_may_not(pytester: pytest.Pytester, lane: Callable) -> None:
    pytester.makepyfile(FINE)
    assert lane("gpu").ret == pytest.ExitCode.TESTS_FAILED
    pytester.makepyfile('import pytest\ndef test_runs(): pass\ndef test_small(): pytest.skip("too small")')
    assert lane("gpu").ret == 0
    assert lane("cpu").ret == pytest.ExitCode.TESTS_FAILED


def test_a_failure_stays_what_it_is(pytester: pytest.Pytester, lane: Callable) -> None:
    pytester.makepyfile(test_broken="import nothing_of_this_name", test_whole=MODULE)
    assert lane("cpu").ret == pytest.ExitCode.INTERRUPTED
    (pytester.path / "test_broken.py").unlink()
    pytester.makepyfile("def test_runs(): assert False")
    assert lane("cpu").ret == pytest.ExitCode.TESTS_FAILED
    assert lane("cpu", "-k", "nothing").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_an_entry_that_nothing_meets_is_told(pytester: pytest.Pytester, lane: Callable) -> None:
    """In the report always; to the person only after everything ran, and it fails nothing."""
    pytester.makepyfile("def test_runs(): pass")
    pytester.makeini("[pytest]\ntestpaths = .")
    told = "allowed and not met: needs .+ (tool|two) (it is not here)"
    result = lane("cpu")
    assert result.ret == 0
    assert told in result.outlines
    assert report(pytester)[-1] == told
    assert told not in lane("cpu", "-k", "runs").outlines
    assert told not in lane("cpu", ".").outlines
    assert report(pytester)[-1] == told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory: 'skips.toml'"),
        ("lanes = [", "skips.toml: Invalid"),
        ("lanes = ['gpu']", "--lane: expected one of ['gpu'] of skips.toml, got 'cpu'"),
        ("lanes = ['cpu']\nallow = 1", "skips.toml: expected `lanes` and `[[allowed]]`, got ['allow']"),
        (f"{ENTRY}lanes = ['cpu']\nreason = 'x'", "expected lanes of ['cpu'], reason and why, got {'lanes': ['cpu']"),
        (f"{ENTRY}lanes = ['tpu']\nreason = 'x'\nwhy = ''", "expected lanes of ['cpu'], reason and why, got"),
        (f"{ENTRY}lanes = ['cpu']\nreason = '('\nwhy = ''", "reason '(' is no regular expression"),
    ],
    ids=["none", "no TOML", "another lane", "another key", "no why", "an unknown lane", "no expression"],
)
def test_a_wrong_file_stops_the_run(text: str | None, message: str, pytester: pytest.Pytester, lane: Callable) -> None:
    pytester.makepyfile("def test_runs(): pass")
    file = pytester.path / "skips.toml"
    file.unlink() if text is None else file.write_text(text)
    result = lane("cpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in str(result.stderr)


def test_a_report_needs_a_lane(pytester: pytest.Pytester, lane: Callable) -> None:
    pytester.makepyfile("def test_runs(): pass")
    result = pytester.runpytest_inprocess("--skip-report", "skips.txt", "-p", "no:randomly")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--skip-report: expected --lane beside it*"])


@pytest.mark.parametrize("lane", ["gpu", "4090"])
@pytest.mark.parametrize(
    "reason",
    [
        "flash-attn 2.8.3.post2 was built without a kernel for head_dim 192 in torch.bfloat16",
        "flash-attn 2.8.3.post2 was built without a kernel of windows for head_dim 192 in torch.bfloat16",
        "cudnn: needs head_dim and v_head_dim up to 128, got 192 and 128",
    ],
)
def test_what_an_h200_skipped_is_allowed(lane: str, reason: str) -> None:
    """As its reports had it: docs/gpu-test-plan.md."""
    allowed = tomllib.loads((ROOT / ".github" / "skips.toml").read_text(encoding="utf-8"))["allowed"]
    assert any(lane in entry["lanes"] and re.fullmatch(entry["reason"], reason) for entry in allowed)
