"""Backends that do not exist, offered through entry points that look real, and profiles that order them."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from nsa_routing import OPS, Environment, Problem, Profile, backends, reset


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No flags of the person who runs the tests, nothing remembered before or after."""
    for name in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(name)
    reset()
    yield
    reset()


@dataclass
class FakeBackend:
    """Refuses the ops in `refuses`, each with its reason, and has none of those in `lacks`.

    An op returns its first argument times `factor`, as what that op returns, unless `runs` has something else for it.
    """

    name: str
    refuses: dict[str, str] = field(default_factory=dict)
    factor: float = 1.0
    uses_triton: bool = False
    lacks: tuple[str, ...] = ()
    runs: dict[str, Callable[..., Any]] = field(default_factory=dict)
    asked: list[tuple[str, Problem, Environment]] = field(default_factory=list)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def refuse(self, op: str, problem: Problem, environment: Environment) -> str | None:
        self.asked.append((op, problem, environment))
        return self.refuses.get(op)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in OPS or op in self.lacks:
            raise AttributeError(op)
        return partial(self._run, op)

    def _run(self, op: str, x: Any, *args: Any, **options: Any) -> Any:
        self.calls.append((op, options))
        if op in self.runs:
            return self.runs[op](x, *args, **options)
        out = x * self.factor
        if op == "select_blocks":
            return out.int()
        return (out, out.detach().amax(-1).T.float()) if op.endswith("attention") else out


@dataclass
class FakePoint:
    """What `importlib.metadata.entry_points` returns, holding its object."""

    name: str
    held: Any
    value: str = "somewhere:BACKEND"
    loads: int = 0

    def load(self) -> Any:
        self.loads += 1
        return self.held


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these entry points, and no others, the installed ones."""

    def install(*points: FakePoint) -> None:
        def entry_points(*, group: str) -> tuple[FakePoint, ...]:
            assert group == "nsa.backends"
            return points

        monkeypatch.setattr(backends, "entry_points", entry_points)
        reset()

    return install


@pytest.fixture
def install(offer: Callable[..., None]) -> Callable[..., dict[str, FakeBackend]]:
    """Install fake backends: objects, names, or names with the ops they refuse."""

    def make(*given: str | FakeBackend, **refuses: dict[str, str]) -> dict[str, FakeBackend]:
        fakes = [x if isinstance(x, FakeBackend) else FakeBackend(x) for x in given]
        made = {x.name: x for x in (*fakes, *(FakeBackend(name, ops) for name, ops in refuses.items()))}
        offer(*(FakePoint(name, backend, f"{name}_package:BACKEND") for name, backend in made.items()))
        return made

    return make


@pytest.fixture(scope="session")
def fake_point() -> type[FakePoint]:
    return FakePoint


@pytest.fixture(scope="session")
def fake_backend() -> type[FakeBackend]:
    return FakeBackend


@pytest.fixture
def environment() -> Callable[..., Environment]:
    def make(*names: str, **facts: Any) -> Environment:
        return Environment(
            **({"device": "cpu", "sm": None, "torch": "2.13.0", "triton": None} | facts),
            flash_attn=None,
            backends=names,
        )

    return make


def document_of(*names: str, **changes: Any) -> dict[str, Any]:
    """A profile's text: these backends and then sdpa for every op, taken by every preset."""
    document: dict[str, Any] = {
        "name": "made",
        "source": "a test",
        "order": {op: [*names, "sdpa"] for op in OPS},
        "presets": {preset: dict.fromkeys(names, "always") for preset in ("safe", "perf")},
    }
    return document | changes


@pytest.fixture(scope="session")
def document() -> Callable[..., dict[str, Any]]:
    return document_of


@pytest.fixture
def ordered() -> Callable[..., Profile]:
    """The profile of `document_of`."""
    return lambda *names, **changes: Profile.model_validate(document_of(*names, **changes))


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the profile of `document_of` the one that routes follow."""

    def use(*names: str, **changes: Any) -> None:
        path = tmp_path / "made.yaml"
        path.write_text(yaml.safe_dump(document_of(*names, **changes)), encoding="utf-8")
        monkeypatch.setenv("NSA_PROFILE", str(path))
        reset()

    return use


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set flags, given without their prefix; None unsets. They count from the next route on."""

    def use(**values: str | None) -> None:
        for name, value in values.items():
            if value is None:
                monkeypatch.delenv(f"NSA_{name}", raising=False)
            else:
                monkeypatch.setenv(f"NSA_{name}", value)
        reset()

    return use


@pytest.fixture
def problem() -> Problem:
    return Problem("window_attention", "cpu", torch.float32, 64, 32, 4)


class Lines:
    """Keeps what is logged as text and stops it there: a record kept anywhere keeps a traceback's tensors alive."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.tracebacks: list[str] = []

    def __call__(self, record: logging.LogRecord) -> bool:
        self.seen.append((record.levelname, record.getMessage()))
        if record.exc_info:
            self.tracebacks.append(logging.Formatter().formatException(record.exc_info))
        return False

    def warnings(self) -> list[str]:
        return [message for level, message in self.seen if level == "WARNING"]


@pytest.fixture
def logged() -> Iterator[Lines]:
    """What the package says, and nobody else hears."""
    logger, lines = logging.getLogger("nsa_routing"), Lines()
    logger.addFilter(lines)
    yield lines
    logger.removeFilter(lines)
