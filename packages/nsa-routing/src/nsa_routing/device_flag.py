"""Flags that are raised on a device and read on the host some time later, without waiting."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured there: nothing may wait, and memory that is taken is the graph's.

    Example:
        >>> capturing(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DeviceNumber:
    """A number that operations on a device change, from 0 on, and that the host reads some time later.

    `flag` is on the device; `mirror` is a copy in pinned memory that arrives some time later and costs nothing to read.
    """

    dtype: ClassVar[torch.dtype]
    flag: Tensor | None = None
    mirror: Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Make the flag, outside any graph capture: memory taken inside one is the graph's."""
        if self.flag is not None or capturing(device):
            return
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be updated outside it
            self.flag = torch.zeros((), dtype=self.dtype, device=device)
            if device.type == "cuda":
                self.mirror = torch.zeros((), dtype=self.dtype, pin_memory=True)

    def noted(self, *, wait: bool) -> bool:
        """Whether the flag is up; `wait` synchronises with the device, else the news may be late."""
        if self.flag is None:
            return False
        if wait and self.mirror is not None:
            self.mirror.copy_(self.flag)  # so that those who do not wait know it too
        return self._is_up(self.flag if self.mirror is None else self.mirror)

    def lower(self) -> None:
        """As if nothing had been noted. The tensors stay: graphs hold them."""
        if self.flag is not None:
            self.flag.zero_()
            if self.mirror is not None:
                self.mirror.copy_(self.flag)

    def _is_up(self, flag: Tensor) -> bool:
        raise NotImplementedError


class DeviceFlag(DeviceNumber):
    """Up from the first bad verdict on, until it is lowered."""

    dtype = torch.bool

    def note(self, bad: Tensor) -> None:
        """Remember on the device that a result was bad; no synchronisation, and it may be captured in a graph."""
        if self.flag is None and not torch.compiler.is_compiling():
            self.prepare(bad.device)  # the route was planned inside a capture
        if self.flag is not None:
            self.flag.logical_or_(bad)
            if self.mirror is not None and not torch.compiler.is_compiling():
                self.mirror.copy_(self.flag, non_blocking=True)

    def _is_up(self, flag: Tensor) -> bool:
        return bool(flag)


class Alarm(DeviceNumber):
    """Up from the first number on that is NaN or infinity: one kernel for each number, and seldom a copy.

    `flag` is the largest number so far: a maximum keeps NaN.
    """

    dtype = torch.float64  # what a result of any dtype holds is finite in it
    SENT_EVERY = 16  # calls outside of captures; a copy costs the host and the device more than the look
    _calls = 0

    def look(self, numbers: Iterable[Tensor]) -> None:
        """Take numbers [] on its device in; -inf is none. No synchronisation, and it may be captured in a graph."""
        for number in numbers:
            if self.flag is None:
                self.prepare(number.device)
            if self.flag is None:  # a capture, and nobody called before it
                return
            torch.maximum(self.flag, number, out=self.flag)
        if self.flag is None or self.mirror is None or capturing(self.flag.device):
            return
        if self._calls % self.SENT_EVERY == 0:
            self.mirror.copy_(self.flag, non_blocking=True)
        self._calls += 1

    def _is_up(self, flag: Tensor) -> bool:
        return not flag.item() < float("inf")
