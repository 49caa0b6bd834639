"""What every launch has in common."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


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


class Prepared:
    """A kernel with its grid and constants, launched without a look by Triton at each argument and constant again.

    Triton compiles a kernel anew for what it is told here: whether a pointer or an integer is a multiple of 16, an
    integer 1 or beyond 32 bits, an argument None. These facts are compared; where they are new, Triton launches.

    Args:
        kernel: whose constants follow all other arguments.
        grid: numbers of programs.
        constants: their values, and the compiler's options.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], constants: Mapping[str, Any]) -> None:
        self.kernel = kernel
        self.grid = grid
        self.constants = constants
        self.last = [constants[name] for name in kernel.arg_names if name in constants]
        self.compiled: dict[Any, Any] = {}

    def __call__(self, *args: Tensor | float | None) -> None:
        """Launch on the current stream of the current device, where the tensors are."""
        facts: list[Any] = []
        for x in args:
            if isinstance(x, Tensor):
                facts.append(x.dtype)
                facts.append(x.data_ptr() % 16)
            elif type(x) is int:
                facts.append(1 if x == 1 else 2 if x % 16 else 0)
                facts.append(-(2**31) <= x < 2**31)
            else:
                facts.append(type(x))
        first = args[0]
        assert isinstance(first, Tensor)
        facts.append(first.device.index)
        key = tuple(facts)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[self.grid](*args, **self.constants)
            if compiled is not None:  # interpreted
                self.compiled[key] = compiled
        else:
            compiled[self.grid](*args, *self.last)


STREAMS = 2
"""Side streams beside a stream; three were no faster."""


@cache
def _beside(device: torch.device, stream: int) -> list[torch.cuda.Stream]:
    """Side streams of a stream: another's may be under capture for a graph, which would take in what they are given."""
    return [torch.cuda.Stream(device) for _ in range(STREAMS)]


def side_streams(device: torch.device, wanted: bool) -> list[torch.cuda.Stream | None]:
    """The streams that chunks of work take turns on; None is the current one, alone unless others are wanted."""
    if not wanted or device.type != "cuda":
        return [None]
    return [*_beside(device, torch.cuda.current_stream(device).cuda_stream)]


def take_turns(streams: list[torch.cuda.Stream | None], work: Iterable[T], run: Callable[[int, T], None]) -> None:
    """Call run(n, item) for each item of work on stream n, in turns: after all that is on the current stream.

    What follows on the current stream comes after all of it, whether `run` raises or not: memory that it used may be
    given away then.
    """
    sides = [stream for stream in streams if stream is not None]
    for stream in sides:
        stream.wait_stream(torch.cuda.current_stream())
    try:
        for number, item in enumerate(work):
            turn = number % len(streams)
            with torch.cuda.stream(streams[turn]):
                run(turn, item)
    finally:
        for stream in sides:
            torch.cuda.current_stream().wait_stream(stream)
