"""Operations judged by what comes of them: one look at an outcome instead of one at whatever went in and came out.

NaN and infinities reach the end through sums and products, so a finite outcome says that all was well on the way. One
that is not finite does not say whose fault it was, an operation's or that of what it was given: it raises the alarm of
its device, after which each operation is looked at by itself, with its inputs.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from nsa_routing.device_flag import Alarm
from nsa_routing.events import tell
from nsa_routing.finiteness import each_once, largest_of


class _Chain:
    """Operations between the beginning and the end of `judged_together`.

    Fields:
        outcome: as named by `outcome`.
        postponed: whether any of the operations is to be judged by it.
        lses: of those operations.
    """

    def __init__(self) -> None:
        self.outcome: Tensor | None = None
        self.postponed = False
        self.lses: list[Tensor] = []

    def postpone(self, result: Any) -> None:
        """Judge an operation's result with the outcome."""
        self.postponed = True
        if not isinstance(result, Tensor) and result[1].is_floating_point():
            self.lses.append(result[1])


_chain: ContextVar[_Chain | None] = ContextVar("chain", default=None)
_alarms: dict[torch.device, Alarm] = {}
_lock = threading.Lock()  # of the dictionary


def judged_together() -> AbstractContextManager[None]:
    """Within, with `NSA_CHECK_FINITE=flag`, only the `outcome` and each log-sum-exp is looked at, at the end.

    The first time that they are not finite, the alarm is raised: from then on, until `reset()`, each operation is
    judged by itself, every tensor once however many take or return it, so that the route at fault is closed. Nobody may
    write to their tensors before the end. In code that is traced by torch.compile each operation is judged by itself;
    a graph holds the looks that are due when it is captured, and keeps them. A chain within a chain is part of it: the
    last outcome named counts, which has to be of all.

    Raises:
        RuntimeError: at the end, where something ran and no `outcome` was named.

    Example:
        >>> with judged_together():
        ...     out = outcome(torch.ones(2, 3))
    """
    return nullcontext() if torch.compiler.is_compiling() or _chain.get() is not None else _together()


def outcome(x: Tensor) -> Tensor:
    """`x`, into which went every result of this `judged_together`, log-sum-exps excepted."""
    chain = None if torch.compiler.is_compiling() else _chain.get()
    if chain is not None:
        chain.outcome = x
    return x


@contextmanager
def _together() -> Iterator[None]:
    chain = _Chain()
    token = _chain.set(chain)
    try:
        with each_once():
            yield
    finally:
        _chain.reset(token)
    if not chain.postponed:
        return
    if chain.outcome is None:
        raise RuntimeError("judged_together: expected an outcome, got none")
    _alarm(chain.outcome.device).look(largest_of((chain.outcome, *chain.lses)))


def by_outcome(result: Any) -> bool:
    """Judge a result by the outcome of its chain or, outside of any, by itself alone; False after an alarm.

    Then, and in code that is traced, whoever asks has to look at it, and at what it was made of.
    """
    if torch.compiler.is_compiling():
        return False
    device = (result if isinstance(result, Tensor) else result[0]).device
    if _raised(device, wait=False):
        return False
    chain = _chain.get()
    if chain is None:
        _alarm(device).look(largest_of(result))
    else:
        chain.postpone(result)
    return True


def prepare(device: torch.device) -> None:
    """Make the alarm of a device, outside any graph capture."""
    _alarm(device).prepare(device)


def read_alarms() -> None:
    """Wait for the news of every device, and tell them."""
    with _lock:
        devices = tuple(_alarms)
    for device in devices:
        _raised(device, wait=True)


def forget() -> None:
    """No alarm is raised."""
    with _lock:
        alarms = tuple(_alarms.values())
    for alarm in alarms:
        alarm.lower()


def _alarm(device: torch.device) -> Alarm:
    found = _alarms.get(device)
    if found is None:
        with _lock:
            found = _alarms.setdefault(device, Alarm())
    return found


def _raised(device: torch.device, *, wait: bool) -> bool:
    if not _alarm(device).noted(wait=wait):
        return False
    message = (
        f"operations returned non-finite values on {device} in an earlier call; each is looked at with what it is "
        "given from now on, until nsa_routing.reset(). A CUDA graph keeps the looks that it was captured with"
    )
    tell(logging.WARNING, message, "alarm", str(device))
    return True
