"""A workload that computes nothing, with everything about it that a test may want to be otherwise."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest


@dataclass
class Toy:
    """Calls are told to `said`; `wrong` and `failing` say at which S it misbehaves."""

    name: str = "toy"
    about: str = "a toy"
    parameters: dict[str, Any] = field(default_factory=lambda: {"S": 8, "batch": 1, "topk": 16, "backend": "auto"})
    calls: int = 2
    wrong: frozenset[int] = frozenset()
    failing: frozenset[int] = frozenset()
    refusing: frozenset[int] = frozenset()
    slow: float = 0.0  # seconds a call
    own_parts: tuple[str, ...] = ("cmp", "slc_win")
    said: list[Any] = field(default_factory=list)

    def refuse(self, device: str, **parameters: Any) -> str | None:
        return "too short" if parameters["S"] in self.refusing else None

    def setup(self, device: str, seed: int, **parameters: Any) -> dict[str, Any]:
        self.said.append(("setup", seed, parameters))
        return parameters | {"seed": seed}

    def call(self, state: dict[str, Any], index: int) -> int:
        if state["S"] in self.failing:
            raise MemoryError("no room,\nnone at all")
        self.said.append(("call", state["S"], index))
        time.sleep(self.slow)
        return index

    def parts(self, state: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
        return {name: lambda index: index for name in self.own_parts}

    def cost(self, **parameters: Any) -> tuple[float, float]:
        return 1e6 * parameters["S"], 1e3 * parameters["S"]

    def check(self, state: dict[str, Any], results: list[int]) -> str:
        self.said.append(("check", state["S"], list(results)))
        if state["S"] in self.wrong:
            raise AssertionError("off by\n1.0")
        return "off by 0"

    def facts(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"backend": "toys", "why": "plan", "reads_actual": 3 * state["S"], "no such fact": 1}

    def but(self, **changes: Any) -> "Toy":
        return replace(self, said=[], **changes)


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def document() -> Callable[..., dict[str, Any]]:
    """A suite of toys, as its file has it."""

    def make(*lengths: int, **changes: Any) -> dict[str, Any]:
        variant = {"workload": "toy", "clock": "host"}
        return {"about": "toys", "variant": [variant], "cpu": {"points": [{"S": list(lengths)}]}} | changes

    return make
