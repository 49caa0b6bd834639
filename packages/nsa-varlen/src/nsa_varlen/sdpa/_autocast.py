"""Arithmetic in the dtypes that the code chose, whatever region the caller is in."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast off on the device of its first tensor.

    Autocast would turn the fp32 matmuls of half-precision inputs back into half precision.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
