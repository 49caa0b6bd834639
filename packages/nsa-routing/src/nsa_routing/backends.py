"""Backends by entry point: any package may offer one without this package knowing it."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

GROUP = "nsa.backends"


class Backend(Protocol):
    """What the entry point of a backend names: an object with one callable per operation it implements."""

    name: str

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        """Why the backend cannot run `op` on this problem and machine, in words; None if it can."""


def installed_backends() -> dict[str, EntryPoint]:
    """Entry points of the installed backends by name, ordered by name; nothing is imported.

    Raises:
        RuntimeError: two distributions offer the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name in found and found[point.name].value != point.value:
            raise RuntimeError(
                f"backend {point.name}: expected one distribution to offer it, got {found[point.name].value} "
                f"and {point.value}"
            )
        found[point.name] = point
    return found


@cache
def load_backend(name: str) -> Backend:
    """Import and return an installed backend.

    Raises:
        ValueError: no backend of that name is installed.
        TypeError: the object is no backend, or carries another name.
    """
    points = installed_backends()
    if name not in points:
        raise ValueError(f"backend: expected one of {sorted(points)}, got {name!r}")
    backend = points[name].load()
    if getattr(backend, "name", None) != name or not callable(getattr(backend, "refuse", None)):
        raise TypeError(
            f"backend {name}: expected an object with name={name!r} and refuse() at {points[name].value}, "
            f"got {backend!r}"
        )
    return backend
