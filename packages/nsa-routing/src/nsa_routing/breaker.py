"""Closed routes: a backend that returned nonsense, or does not compile, is not asked again until someone resets it."""

import threading
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured there: nothing may wait, and memory that is taken is the graph's.

    Example:
        >>> capturing(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclass(eq=False)
class Breaker:
    """Whether one backend may run one operation on one device.

    `failures` counts what went wrong, by kind. Results that are checked without waiting for them leave their verdict in
    `flag`, on the device; `mirror` is a copy in pinned memory that arrives some time later and costs nothing to read.
    """

    backend: str
    op: str
    device: str
    closed: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    flag: Tensor | None = None
    mirror: Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Make the flag, outside any graph capture: memory taken inside one is the graph's."""
        if self.flag is not None or capturing(device):
            return
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be updated outside it
            self.flag = torch.zeros((), dtype=torch.bool, device=device)
            if device.type == "cuda":
                self.mirror = torch.zeros((), dtype=torch.bool, pin_memory=True)

    def note(self, bad: Tensor) -> None:
        """Remember on the device that a result was bad; no synchronisation, and it may be captured in a graph."""
        if self.flag is None and not torch.compiler.is_compiling():
            self.prepare(bad.device)  # the route was planned inside a capture
        if self.flag is not None:
            self.flag.logical_or_(bad)
            if self.mirror is not None and not torch.compiler.is_compiling():
                self.mirror.copy_(self.flag, non_blocking=True)

    def noted(self, *, wait: bool) -> bool:
        """Whether a bad result has been noted; `wait` synchronises with the device, else the news may be late."""
        if self.flag is None:
            return False
        return bool(self.flag if wait or self.mirror is None else self.mirror)


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
        if found.flag is not None:
            found.flag.zero_()
            if found.mirror is not None:
                found.mirror.copy_(found.flag)
