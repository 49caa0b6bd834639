"""What autograd functions have in common: autocast stays out, second derivatives are refused."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")

# Asked here, once: the compiler of torch 2.11 does not trace the question.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "privateuseone")
_KNOWING = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


def in_autocast(kind: str) -> bool:
    """Whether this is an autocast region of a kind of device; of one that knows none, such as "meta", it never is.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     in_autocast("cpu"), in_autocast("meta")
        (True, False)
    """
    return kind in _KNOWING and torch.is_autocast_enabled(kind)


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast off on the device of its first tensor.

    Autocast would turn the fp32 matmuls of half-precision inputs back into half precision.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if not in_autocast(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def first_derivative_only(backward: Callable[..., R]) -> Callable[..., R]:
    """A backward whose own derivative is not implemented: asking for it raises instead of leaving it out.

    Raises:
        RuntimeError: the gradient is to be differentiated again (create_graph=True).
    """
    once: Callable[..., R] = once_differentiable(backward)

    @wraps(backward)
    def run(*args: Any) -> R:
        if torch.is_grad_enabled():
            raise RuntimeError("backward: expected create_graph=False, got True: no second derivative is implemented")
        return once(*args)

    return run
