"""What lanes ask of tests: none is skipped in silence, and none takes a GPU from the others that run on it.

`--lane` fails a run in which a test was skipped for a reason that nobody allowed.
The reasons are those of `.github/skips.toml`, or of the file of `--skips`: tables `[[allowed]]` with `lanes`, with
`reason`, a regular expression for the whole of it, and with `why` it is allowed. A test that was expected to fail
counts as skipped, whether it failed or not. Without `--lane` nothing is judged.

A test for a GPU fails, with or without a lane, if it took more than `MEMORY` and is not marked `alone`. Behind each,
what torch keeps of the memory it had is given back. The summary has those that took most.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SKIPS = Path(__file__).parent / ".github" / "skips.toml"
MEMORY = 8 << 30
"""Bytes of a GPU that a test may take beside others: as many tests as a lane runs at once fit into 80 GB."""
TAKEN = "bytes of the GPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lanes")
    group.addoption("--lane", metavar="LANE", help="fail where a test is skipped for a reason not allowed in this lane")
    group.addoption("--skips", metavar="FILE", type=Path, default=SKIPS, help="the reasons that are allowed")
    group.addoption("--skip-report", metavar="FILE", type=Path, help="write every skip there; needs --lane")


def pytest_configure(config: pytest.Config) -> None:
    """Workers of xdist leave it to the process that they report to."""
    lane, report = config.getoption("--lane"), config.getoption("--skip-report")
    if hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(Memory(), "memory")
    if lane is not None:
        config.pluginmanager.register(Skips(lane, read(config.getoption("--skips"), lane), report), "skips")
    elif report is not None:
        raise pytest.UsageError("--skip-report: expected --lane beside it")


@dataclass(frozen=True)
class Allowed:
    """One reason of the file."""

    reason: str
    why: str


def read(file: Path, lane: str) -> list[Allowed]:
    """The reasons that are allowed in a lane. Raises UsageError where the file is not as it should be."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise pytest.UsageError(f"{file}: {error}") from None
    lanes = document.pop("lanes", None)
    if not isinstance(lanes, list) or lane not in lanes:
        raise pytest.UsageError(f"--lane: expected one of {lanes} of {file}, got {lane!r}")
    entries = document.pop("allowed", [])
    if document:
        raise pytest.UsageError(f"{file}: expected `lanes` and `[[allowed]]`, got {sorted(document)}")
    found = []
    for entry in entries:
        if entry.keys() != {"lanes", "reason", "why"} or not set(entry["lanes"]) <= set(lanes) or not entry["lanes"]:
            raise pytest.UsageError(f"{file}: expected lanes of {lanes}, reason and why, got {entry}")
        try:
            re.compile(entry["reason"])
        except re.error as error:
            raise pytest.UsageError(f"{file}: reason {entry['reason']!r} is no regular expression: {error}") from None
        if lane in entry["lanes"]:
            found.append(Allowed(entry["reason"], entry["why"]))
    return found


@dataclass(eq=False)  # pytest keeps plugins in sets
class Skips:
    """What was skipped, and whether it may be."""

    lane: str
    allowed: list[Allowed]
    report: Path | None
    seen: set[tuple[str, str, str]] = field(default_factory=set)  # (what, kind, reason): subtests share a name

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "wasxfail"):
            kind = "expected to fail" if report.skipped else "expected to fail and passed"
            self.seen.add((report.nodeid, kind, report.wasxfail.removeprefix("reason: ")))
        elif report.skipped:
            self.seen.add((report.nodeid, "skipped", reason_of(report)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:  # a whole module; with xdist every worker says it
            self.seen.add((report.nodeid, "skipped", reason_of(report)))

    def not_allowed(self) -> list[tuple[str, str, str]]:
        """(kind, reason, what) of each skip that no entry covers."""
        return sorted(
            (kind, reason, name)
            for name, kind, reason in self.seen
            if not any(re.fullmatch(entry.reason, reason, re.DOTALL) for entry in self.allowed)
        )

    def unused(self) -> list[Allowed]:
        """The entries that covered nothing."""
        reasons = {reason for _, _, reason in self.seen}
        return [x for x in self.allowed if not any(re.fullmatch(x.reason, reason, re.DOTALL) for reason in reasons)]

    def lines(self) -> list[str]:
        """The report: every reason with its number of tests, then every skip, then what is wrong or idle."""
        counts = Counter((kind, reason) for _, kind, reason in self.seen)
        refused = self.not_allowed()
        return [
            f"lane {self.lane}: {len(self.seen)} skipped, {len(refused)} of them for a reason that is not allowed",
            *(f"{number:5} {kind}: {reason}" for (kind, reason), number in sorted(counts.items())),
            "",
            *(f"{name}: {kind}: {reason}" for name, kind, reason in sorted(self.seen)),
            *(f"NOT ALLOWED: {name}: {kind}: {reason}" for kind, reason, name in refused),
            *(f"allowed and not met: {entry.reason} ({entry.why})" for entry in self.unused()),
        ]

    @pytest.hookimpl(tryfirst=True)  # before the summary is printed with the exit status
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.report is not None:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            self.report.write_text("\n".join(self.lines()) + "\n", encoding="utf-8")
        if self.not_allowed() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        terminalreporter.section(f"skips in lane {self.lane}")
        counts = Counter((kind, reason) for _, kind, reason in self.seen)
        for (kind, reason), number in sorted(counts.items()):
            terminalreporter.line(f"{number:5} {kind}: {reason}")
        for kind, reason, name in self.not_allowed():
            terminalreporter.line(f"NOT ALLOWED in lane {self.lane}: {name}: {kind}: {reason}", red=True)
        whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.getoption("keyword")
        for entry in self.unused() if whole else []:
            terminalreporter.line(f"allowed and not met: {entry.reason} ({entry.why})", yellow=True)


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What was said where it was skipped."""
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Behind a test for a GPU, fixtures included, its memory is free for those of other processes."""
    result = yield
    if item.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What fixtures hold counts, and what torch keeps between two tensors: others do not have it either."""
    if not item.get_closest_marker("gpu"):
        return (yield)
    import torch

    if not torch.cuda.is_available():
        return (yield)
    torch.cuda.reset_peak_memory_stats()
    result = yield
    taken = torch.cuda.max_memory_reserved()
    item.user_properties.append((TAKEN, taken))
    if taken > MEMORY and not item.get_closest_marker("alone"):
        pytest.fail(f"took {gib(taken)} of the GPU: expected at most {gib(MEMORY)}, or the marker alone")
    return result


def gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


class Memory:
    """The summary of what tests took."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == TAKEN:
                self.taken[report.nodeid] = value

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.taken:
            terminalreporter.section("memory of the GPU")
        for name, taken in sorted(self.taken.items(), key=lambda item: -item[1])[:5]:
            terminalreporter.line(f"{gib(taken):>10} {name}")
