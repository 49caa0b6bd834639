"""Closed routes: a backend that returned nonsense, or does not compile, is not asked again until someone resets it."""

import threading
from collections import Counter
from dataclasses import dataclass, field

from nsa_routing.device_flag import DeviceFlag


@dataclass(eq=False)
class Breaker(DeviceFlag):
    """Whether one backend may run one operation on one device.

    `failures` counts what went wrong, by kind. Results that are checked without waiting for them raise the flag.
    """

    backend: str
    op: str
    device: str
    closed: bool = False
    failures: Counter[str] = field(default_factory=Counter)


_breakers: dict[tuple[str, str, str], Breaker] = {}
_lock = threading.Lock()  # of the dictionary: a thread that adds to it must not meet one that goes through it


def breaker(backend: str, op: str, device: str) -> Breaker:
    """The breaker of a route."""
    key = (backend, op, device)
    with _lock:
        if key not in _breakers:
            _breakers[key] = Breaker(*key)
        return _breakers[key]


def all_breakers() -> tuple[Breaker, ...]:
    """Those of every route taken so far."""
    with _lock:
        return tuple(_breakers.values())


def closed() -> frozenset[tuple[str, str, str]]:
    """(backend, op, device) of the routes that are closed: what `plan` takes.

    Example:
        >>> closed()
        frozenset()
    """
    return frozenset((found.backend, found.op, found.device) for found in all_breakers() if found.closed)


def failure_counts() -> dict[tuple[str, str, str], dict[str, int]]:
    """How often each (backend, op, device) failed since the last reset, by kind; routes that never did are left out.

    Example:
        >>> failure_counts()
        {}
    """
    return {(found.backend, found.op, found.device): dict(found.failures) for found in all_breakers() if found.failures}


def forget() -> None:
    """Open every route, those that someone holds included, and count from 0."""
    for found in all_breakers():
        found.closed = False
        found.failures.clear()
        found.lower()
