"""Tensors that are computed once and kept, for whoever asks next."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` outside inference mode, without gradients: autograd cannot save a tensor made within.

    Example:
        >>> with torch.inference_mode():
        ...     kept = outside_inference(torch.arange)(3)
        >>> kept.is_inference()
        False
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # Leaving inference mode turns gradients on, inside no_grad too.
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
