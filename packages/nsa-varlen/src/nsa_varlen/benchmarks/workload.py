"""Something to time, as nsa-bench takes it: each attribute means what `nsa_bench.workload` says of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = int | str


def _runs_anywhere(device: str, **parameters: Any) -> str | None:
    return None


def _nothing(state: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Workload:
    """What nsa-bench needs of a workload; nsa-bench itself is not needed for it.

    Fields:
        name, about: as suites and people call it.
        parameters: each with its default; "S" is the context length.
        setup: `(device, seed, **parameters) -> state`.
        call: `(state, index) -> result`, what is timed.
        cost: `(**parameters) -> (flops, bytes)` of a call.
        check: `(state, results) -> words`, or an AssertionError.
        facts: `(state) -> mapping`: backend, why, keys read.
        refuse: `(device, **parameters) -> reason or None`.
        parts: `(state) -> {column: (index) -> result}`.
        calls: how many different calls there are.

    Example:
        >>> Workload("nothing", "", {"S": 1}, *[lambda *x, **y: None] * 5).refuse("cpu", S=1) is None
        True
    """

    name: str
    about: str
    parameters: Mapping[str, Value]
    setup: Callable[..., Any]
    call: Callable[[Any, int], Any]
    cost: Callable[..., tuple[float, float]]
    check: Callable[[Any, Sequence[Any]], str]
    facts: Callable[[Any], Mapping[str, Value]] = field(default=_nothing)
    refuse: Callable[..., str | None] = field(default=_runs_anywhere)
    parts: Callable[[Any], Mapping[str, Callable[[int], Any]]] = field(default=_nothing)
    calls: int = 1
