"""Clocks, and variants that take turns under them.

- "graph": the calls of a sample in one CUDA graph, timed by events around its replay. They go from one set of data to
  the next, and the sets together are several times as large as the L2 cache: every call finds its data cold.
- "events": CUDA events around each call. Before it other memory is written over, which empties the L2 cache and keeps
  the GPU busy while the call is being launched, as other work does in a model.
- "host": wall time from Python, the device waited for at the end; on a GPU sets of data as for "graph".
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

Call = Callable[[], Any]
Sample = Callable[[], float]  # milliseconds of one call, averaged over those of a sample
Name = TypeVar("Name", bound=Hashable)

COLD = 3  # times the L2 cache that calls go through before they come back to the same data
LARGEST_L2 = 128 << 20  # bytes, a B200's: where torch does not tell the device's own
FLUSHED = 2 << 30  # bytes: writing them takes a GPU about as long as Python takes for the launches of a call
MOST_SETS = 64
LEAST_REPEATS = 3
MOST_SECONDS = 20.0  # that one variant is sampled for, unless LEAST_REPEATS take longer


class Timing(NamedTuple):
    """Of samples: median and quartiles in milliseconds, and how many there were."""

    median: float
    p25: float
    p75: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """
        Example:
            >>> Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
            Timing(median=3.0, p25=2.0, p75=4.0, repeats=5)
        """
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


def sets_of_data(clock: str, device: str, bytes_of_a_call: float) -> int:
    """How many states there have to be so that every call finds its data cold.

    Args:
        bytes_of_a_call: what it moves at least.
    """
    if device != "cuda" or clock == "events":
        return 1
    return min(MOST_SETS, max(2, -(-COLD * l2_bytes() // max(1, int(bytes_of_a_call)))))


def l2_bytes() -> int:
    """Of the current CUDA device."""
    import torch

    return int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", LARGEST_L2))


def sample(clock: str, device: str, calls: Sequence[Call]) -> tuple[Sample, list[Any]]:
    """(what makes all calls once and says what one took, the results of the calls as they are timed).

    Raises:
        Whatever a call raises, and what cannot be captured.
    """
    if clock == "graph":
        return _graph(calls)
    results = [call() for call in calls]
    return (_events(calls) if clock == "events" else _host(device, calls)), results


def take_turns(samples: Mapping[Name, Sample], repeats: int, warm_up: int = 2) -> dict[Name, Timing]:
    """Each variant `repeats` times, after a warm-up that does not count, in turns: another goes first in every round.

    A drift of the clock rate is shared by all. Variants that would take more than MOST_SECONDS get fewer samples, not
    fewer than LEAST_REPEATS.
    """
    names = list(samples)
    found: dict[Name, list[float]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for turn in range(-warm_up, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            enough = len(found[name]) >= LEAST_REPEATS or (turn < 0 and seconds[name] > 0)
            if enough and seconds[name] > MOST_SECONDS:
                continue
            begin = time.perf_counter()
            taken = samples[name]()
            seconds[name] += time.perf_counter() - begin
            if turn >= 0:
                found[name].append(taken)
    return {name: Timing.of(taken) for name, taken in found.items()}


def _graph(calls: Sequence[Call]) -> tuple[Sample, list[Any]]:
    import torch

    for call in calls:  # what is compiled, tuned or kept at a first call must be there
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / len(calls)

    return timed, results


def _events(calls: Sequence[Call]) -> Sample:
    import torch

    flush = _flush()

    def timed() -> float:
        taken = 0.0
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            taken += float(start.elapsed_time(end))
        return taken / len(calls)

    return timed


@cache
def _flush() -> Any:
    import torch

    return torch.empty(max(FLUSHED, 2 * l2_bytes()), dtype=torch.uint8, device="cuda")


def _host(device: str, calls: Sequence[Call]) -> Sample:
    def wait() -> None:
        if device == "cuda":
            import torch

            torch.cuda.synchronize()

    def timed() -> float:
        wait()
        begin = time.perf_counter()
        for call in calls:
            call()
        wait()
        return 1e3 * (time.perf_counter() - begin) / len(calls)

    return timed
