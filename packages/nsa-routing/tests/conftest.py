"""Backends that do not exist, offered through entry points that look real."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
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
    """Refuses the ops in `refuses`, each with its reason; every op returns (name, op, arguments)."""

    name: str
    refuses: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, Problem, Environment]] = field(default_factory=list)

    def refuse(self, op: str, problem: Problem, environment: Environment) -> str | None:
        self.asked.append((op, problem, environment))
        return self.refuses.get(op)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in OPS:
            raise AttributeError(op)
        return lambda *args: (self.name, op, args)


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
    """Install fake backends: names, or names with the ops they refuse."""

    def make(*names: str, **refuses: dict[str, str]) -> dict[str, FakeBackend]:
        made = {name: FakeBackend(name, refuses.get(name, {})) for name in (*names, *refuses)}
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


@pytest.fixture
def ordered() -> Callable[..., Profile]:
    """A profile that tries these backends for every op, in this order."""
    return lambda *names: Profile(name="made", order={op: list(names) for op in OPS})


@pytest.fixture
def problem() -> Problem:
    return Problem("window_attention", "cpu", torch.float32, 64, 32, 4)
