"""What every launch has in common."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with its first tensor's CUDA device as the current one: Triton launches on that."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x = next(x for x in args if isinstance(x, Tensor))
        if x.device.type != "cuda":
            return function(*args, **kwargs)
        with torch.cuda.device(x.device):
            return function(*args, **kwargs)

    return run


def rows(x: Tensor) -> Tensor:
    """`x` [T, H, D] with each head's row contiguous in memory: itself, or a copy where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a few for the interpreter, where persistent programs then take turns too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
