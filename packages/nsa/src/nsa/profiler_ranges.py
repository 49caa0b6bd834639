"""Ranges named after the operations, for torch.profiler and NVTX: off until someone asks for them."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_asked = 0  # how many asked for ranges and did not take it back


def switch_on() -> None:
    """Operations are ranges from now on. Every call takes one `switch_off` to undo."""
    global _asked  # noqa: PLW0603  # one number for the process, as operations are functions
    _asked += 1


def switch_off() -> None:
    """Take one `switch_on` back."""
    global _asked  # noqa: PLW0603
    _asked -= 1


def ranged(operation: Callable[P, R]) -> Callable[P, R]:
    """The operation, as a range `nsa::<its name>` while ranges are on.

    A range of `torch.profiler.record_function`, and of NVTX where CUDA is in use. Code that is traced by torch.compile
    has none, and the replay of a CUDA graph runs no Python that could begin one.
    """
    name = f"nsa::{operation.__name__}"

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _asked or torch.compiler.is_compiling():
            return operation(*args, **kwargs)
        with torch.profiler.record_function(name):
            if not torch.cuda.is_initialized():
                return operation(*args, **kwargs)
            torch.cuda.nvtx.range_push(name)
            try:
                return operation(*args, **kwargs)
            finally:
                torch.cuda.nvtx.range_pop()

    return run
