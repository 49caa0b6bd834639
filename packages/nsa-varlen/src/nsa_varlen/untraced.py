"""Operations that torch.compile leaves alone."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """A function that compiled code calls as it stands, with one graph break and nothing below it compiled.

    The operations plan their tiles from host numbers: traced, each of those plans is a guard and each read a graph
    break of its own. torch.compiler.disable says so, but imports triton: it is asked only once Dynamo is there.
    """
    disabled: Callable[P, R] | None = None

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run
