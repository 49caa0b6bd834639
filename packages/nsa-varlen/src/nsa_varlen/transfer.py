"""Copies from the host to a device that nobody waits for."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From the host to a GPU it goes through pinned memory, in stream order: the host does not wait.

    A tensor that is pinned already is copied from where it is. Code that is traced by torch.compile cannot pin.

    Example:
        >>> to_device(torch.arange(3), torch.device("cpu")).tolist()
        [0, 1, 2]
    """
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
