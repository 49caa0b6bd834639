"""What can be measured: workloads, found by entry point.

A package offers them without knowing this one: an entry point of the group `nsa.bench` names a callable that returns
objects with the attributes of `Workload`. Any class will do; those of the family are small dataclasses.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

GROUP = "nsa.bench"
PARTS = ("cmp", "sel", "win", "slc_win", "choice", "compress", "combine")  # columns `ms_*` beside the whole
FACTS = (
    *("backend", "why", "profile", "preset"),
    *("reads_actual", "reads_expected", "reads_actual_decode", "reads_expected_decode"),
)

Value = int | str


class Workload(Protocol):
    """Something to time, at points that a suite names.

    Fields:
        name: as suites and rows name it, "nsa.decode"; one whose name begins with "dense." is an anchor: dense
            attention over the same tokens.
        about: one line, for `nsa-bench list`.
        parameters: each with its default, an int or a word; "S", the context length, is always one. The type of the
            default is what a suite may give.
        calls: how many different calls there are; one sample of the time makes them all.
    """

    name: str
    about: str
    parameters: Mapping[str, Value]
    calls: int

    def refuse(self, device: str, **parameters: Value) -> str | None:
        """Why it cannot run there ("cpu" or "cuda") with these parameters, in words; None if it can."""

    def setup(self, device: str, seed: int, **parameters: Value) -> Any:
        """A state to call on: everything that is not timed. Other seeds make states that share no memory that is read.

        Memory that does not suffice, a kernel that does not compile: whatever it raises becomes the row's status.
        """

    def call(self, state: Any, index: int) -> Any:
        """What is timed, of `calls` calls the one with this index: the same result however often it is made.

        Under the clock "graph" it is captured in a CUDA graph.
        """

    def parts(self, state: Any) -> Mapping[str, Callable[[int], Any]]:
        """Of the call, the parts that have kernels of their own, by the names of PARTS; each takes an index too."""

    def cost(self, **parameters: Value) -> tuple[float, float]:
        """(floating-point operations, bytes moved at least) of one call, on average."""

    def check(self, state: Any, results: Sequence[Any]) -> str:
        """In words, how far `results`, of all calls in order, are from the oracle's.

        Raises:
            AssertionError: too far; then there is no time.
        """

    def facts(self, state: Any) -> Mapping[str, Value]:
        """What is known of FACTS: the backend that runs and who decided so, and keys read, of one state."""


class WorkloadError(ValueError):
    """An entry point that offers no sound workloads."""


_METHODS = ("refuse", "setup", "call", "parts", "cost", "check", "facts")


def load_workloads(points: Iterable[EntryPoint] | None = None) -> tuple[dict[str, Workload], dict[str, str]]:
    """Workloads by name, in the order of their names, and what is wrong with entry points that have none to offer.

    Raises:
        WorkloadError: two workloads of one name.
    """
    found: dict[str, Workload] = {}
    broken: dict[str, str] = {}
    for point in sorted(entry_points(group=GROUP) if points is None else points, key=lambda point: point.name):
        try:
            offered = [_checked(workload) for workload in point.load()()]
        # Somebody else's module: whatever is wrong with it, the other workloads are wanted all the same.
        except Exception as error:  # noqa: BLE001
            broken[point.name] = f"{type(error).__name__}: {error}"
            continue
        for workload in offered:
            if workload.name in found:
                raise WorkloadError(f"workload {workload.name}: expected one of that name, got two, by {point.value}")
            found[workload.name] = workload
    return dict(sorted(found.items())), broken


def _checked(workload: Any) -> Workload:
    name = getattr(workload, "name", None)
    missing = [x for x in _METHODS if not callable(getattr(workload, x, None))]
    if not isinstance(name, str) or not name or missing:
        expected = f"a workload with a name, {', '.join(_METHODS)}"
        raise WorkloadError(f"expected {expected}, got {workload!r} without {missing}")
    parameters, calls = getattr(workload, "parameters", None), getattr(workload, "calls", None)
    if not isinstance(parameters, Mapping) or type(parameters.get("S")) is not int:
        raise WorkloadError(f"{name}: expected parameters, S an int among them, got {parameters!r}")
    if any(type(value) not in (int, str) for value in parameters.values()):
        raise WorkloadError(f"{name}: expected parameters that are ints and words, got {dict(parameters)!r}")
    if type(calls) is not int or calls < 1:
        raise WorkloadError(f"{name}: expected calls, an int of at least 1, got {calls!r}")
    return workload  # type: ignore[no-any-return]
