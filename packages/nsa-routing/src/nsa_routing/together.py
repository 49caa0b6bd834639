"""Operations that feed one another, judged by what comes of them: one look at the end instead of one at each.

NaN and infinities reach the end through sums and products, so a finite outcome says that all was well on the way. One
that is not finite does not say whose fault it was: it raises the alarm of its device, after which each operation is
looked at by itself.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from nsa_routing.device_flag import DeviceFlag, capturing
from nsa_routing.events import tell
from nsa_routing.finiteness import each_once, result_finite


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
_alarms: dict[torch.device, DeviceFlag] = {}
_lock = threading.Lock()  # of the dictionary


def judged_together() -> AbstractContextManager[None]:
    """Within, with `NSA_CHECK_FINITE=flag`, only the `outcome` and each log-sum-exp is looked at, at the end.

    The first time that they are not finite, the alarm is raised: from then on, until `reset()`, each operation is
    judged by itself, every tensor once however many take or return it, so that the route at fault is closed. Nobody may
    write to their tensors before the end. In code that is traced by torch.compile or captured in a graph each operation
    is judged by itself. A chain within a chain is part of it: the last outcome named counts, which has to be of all.

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
    finite = result_finite((chain.outcome, *chain.lses))
    if finite is not None:
        _alarm(finite.device).note(~finite)


def postponed(result: Any) -> bool:
    """Whether a result will be judged with the outcome of its chain: outside of any, and after an alarm, it is not."""
    chain = None if torch.compiler.is_compiling() else _chain.get()
    if chain is None:
        return False
    device = (result if isinstance(result, Tensor) else result[0]).device
    if capturing(device) or _raised(device, wait=False):
        return False
    chain.postpone(result)
    return True


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


def _alarm(device: torch.device) -> DeviceFlag:
    with _lock:
        return _alarms.setdefault(device, DeviceFlag())


def _raised(device: torch.device, *, wait: bool) -> bool:
    if not _alarm(device).noted(wait=wait):
        return False
    message = (
        f"operations that were judged together returned non-finite values on {device} in an earlier call; "
        "each is looked at by itself from now on, until nsa_routing.reset()"
    )
    tell(logging.WARNING, message, "alarm", str(device))
    return True
