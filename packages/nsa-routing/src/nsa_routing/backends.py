"""Backends by entry point: any package may offer one without this package knowing it."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

GROUP = "nsa.backends"


class Backend(Protocol):
    """What the entry point of a backend names: an object with one callable per operation it implements.

    It may also have `uses_triton = True`: then it is held to the Triton that belongs to the installed torch. Importing
    it must be quick and must import neither triton nor flash_attn; its operations do that when they are called.
    """

    name: str

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        """Why the backend cannot run `op` on this problem and machine, in words; None if it can, at every length."""


def installed_backends(*, strict: bool = True) -> dict[str, EntryPoint]:
    """Entry points of the installed backends by name, ordered by name; nothing is imported.

    Without `strict` a name that is offered twice is left out.

    Raises:
        RuntimeError: two distributions offer different objects by the same name.
    """
    found: dict[str, EntryPoint] = {}
    twice: set[str] = set()
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name in found and found[point.name].value != point.value:
            if strict:
                raise RuntimeError(
                    f"backend {point.name}: expected one distribution to offer it, got {found[point.name].value} "
                    f"and {point.value}"
                )
            twice.add(point.name)
        found[point.name] = point
    return {name: point for name, point in found.items() if name not in twice}


@cache
def load_backend(name: str) -> Backend:
    """Import and return an installed backend.

    Raises:
        ValueError: no backend of that name is installed.
        TypeError: the object is no backend, or carries another name.
        ImportError, OSError: its module, or a library that it needs, does not load.
    """
    points = installed_backends(strict=False)
    if name not in points:
        raise ValueError(f"backend: expected one of {sorted(points)}, got {name!r}")
    backend = points[name].load()
    if getattr(backend, "name", None) != name or not callable(getattr(backend, "refuse", None)):
        raise TypeError(
            f"backend {name}: expected an object with name={name!r} and refuse() at {points[name].value}, "
            f"got {backend!r}"
        )
    return backend
