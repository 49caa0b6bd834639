"""Machines that are not there, and backends that run sdpa under another name."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from nsa_routing import OPS, Environment, backends, dispatching, reset
from nsa_varlen.sdpa import BACKEND


@pytest.fixture(autouse=True)
def _fresh_routes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No flags of the person who runs the tests, nothing remembered before or after."""
    for name in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(name)
    reset()
    yield
    reset()


class Delegate:
    """sdpa under another name. `spoil[op]` takes what an op returns, or raises, and gives what the caller gets."""

    def __init__(self, name: str, **spoil: Callable[[Any], Any]) -> None:
        self.name = name
        self.uses_triton = name == "triton"
        self.spoil = spoil
        self.ran: list[str] = []

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        return BACKEND.refuse(op, problem, environment)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in OPS:
            raise AttributeError(op)
        return partial(self._run, op)

    def _run(self, op: str, *args: Any, **options: Any) -> Any:
        self.ran.append(op)
        result = getattr(BACKEND, op)(*args, **options)
        return self.spoil[op](result) if op in self.spoil else result


class Point:
    """An entry point that holds its object."""

    def __init__(self, held: Any) -> None:
        self.name, self.value, self.held = held.name, f"made:{held.name}", held

    def load(self) -> Any:
        return self.held


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Make these objects, or delegates of these names, the installed backends beside sdpa."""

    def use(*given: Any) -> dict[str, Any]:
        made = [Delegate(x) if isinstance(x, str) else x for x in given]
        points = [Point(x) for x in (*made, BACKEND)]
        monkeypatch.setattr(backends, "entry_points", lambda group: tuple(points))
        reset()
        return {x.name: x for x in made}

    return use


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let CPU tensors be those of a GPU with this SM, as far as routing knows."""

    def use(sm: int | None, **facts: Any) -> None:
        def probe(device: str | None = None, index: int = 0) -> Environment:
            found = {"torch": "2.11.0+cu130", "triton": "3.6.0", "flash_attn": None} | facts
            return Environment(device="cuda", sm=sm, backends=tuple(backends.installed_backends()), **found)

        monkeypatch.setattr(dispatching, "probe", probe)
        reset()

    return use


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set flags, given without their prefix; None unsets."""

    def use(**values: str | None) -> None:
        for name, value in values.items():
            if value is None:
                monkeypatch.delenv(f"NSA_{name}", raising=False)
            else:
                monkeypatch.setenv(f"NSA_{name}", value)
        reset()

    return use


@pytest.fixture(scope="session")
def delegate() -> type[Delegate]:
    return Delegate
