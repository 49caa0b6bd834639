"""A flag that is raised on a device and read on the host some time later, without waiting."""

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured there: nothing may wait, and memory that is taken is the graph's.

    Example:
        >>> capturing(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DeviceFlag:
    """Up from the first bad verdict on, until it is lowered.

    `flag` is on the device; `mirror` is a copy in pinned memory that arrives some time later and costs nothing to read.
    """

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

    def lower(self) -> None:
        """As if nothing had been noted. The tensors stay: graphs hold them."""
        if self.flag is not None:
            self.flag.zero_()
            if self.mirror is not None:
                self.mirror.copy_(self.flag)
