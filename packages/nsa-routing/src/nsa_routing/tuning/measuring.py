"""Backends timed against one another: on the same inputs, in one run, after a look at whether they compute the same."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Any]
Stopwatch = Callable[[Callable[[], object]], float]

LARGEST_L2 = 128 << 20  # bytes, a B200's: where a torch does not tell the device's own
WARM_UP = 3  # calls that are not timed: compilation, autotuning, the allocator's first blocks

# How far a row may be from sdpa's, relative to its length. Sound results differ by rounding alone. In half precision
# each softmax weight is off by a few units u = eps / 2, more for large logits, independently of the others, so the row
# is off by as much: 16 u = 8 eps. In fp32 the longest sums count, (head_dim + keys) u: 2^-10 at 16,384 keys. What is
# wrong, a mask or a scale, is off by tens of percent in some row. Accuracy as such is for each backend's own tests.
TOLERANCE = {
    torch.float16: 8 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
    torch.float32: 2.0**-10,
}
# Rows of chosen blocks that may differ from sdpa's. The last block chosen and the first rejected are closer than the
# fp32 error e of a score, about (head_dim + 2) u, with a probability of about 2 e for each of N blocks: under 2 %
# for 1,024 blocks (65,536 tokens).
TIES = 0.02


@dataclass(frozen=True)
class Timing:
    """How long one operation takes on one backend at one length, in milliseconds."""

    median_ms: float
    p25_ms: float
    p75_ms: float
    min_ms: float

    @classmethod
    def of(cls, times: list[float]) -> "Timing":
        """From single measurements, at least two; quartiles are interpolated, and all rounded to the nanosecond.

        Example:
            >>> Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
            Timing(median_ms=3.0, p25_ms=2.0, p75_ms=4.0, min_ms=1.0)
        """
        low, _, high = quantiles(times, n=4, method="inclusive")
        return cls(*(round(x, 6) for x in (median(times), low, high, min(times))))


def stopwatch(device: str) -> Stopwatch:
    """What runs its argument and returns the milliseconds that took: by events on CUDA, else by the host's clock.

    On CUDA each call finds the L2 cache filled with other data, as it would in a model: what the call before left there
    would make short cases look quicker than they are, and the backends unequally so.

    Example:
        >>> stopwatch("cpu")(lambda: None) >= 0
        True
    """
    if device == "cuda":
        return partial(_cuda_ms, _l2_sized().zero_)
    synchronize = getattr(torch, device).synchronize

    def watch(run: Callable[[], object]) -> float:
        synchronize()
        start = perf_counter()
        run()
        synchronize()
        return 1e3 * (perf_counter() - start)

    return watch


def _l2_sized() -> Tensor:
    """Bytes on the current device, twice as many as its L2 holds: once they are written, nothing else is left in it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return torch.empty(2 * getattr(properties, "L2_cache_size", LARGEST_L2), dtype=torch.uint8, device="cuda")


def _cuda_ms(flush: Callable[[], object], run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()  # in the same stream, and before the clock starts
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def on_device(device: str, index: int) -> AbstractContextManager[Any]:
    """Where events are recorded and kernels start."""
    return torch.cuda.device(index) if device == "cuda" else nullcontext()


def compare(
    exact: Run,
    others: Mapping[str, Run],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    repeat: int,
    watch: Stopwatch,
    name: str = "sdpa",
) -> tuple[dict[str, Timing], dict[str, str]]:
    """(timings by backend, `name` for `exact`; what is wrong with the others that have none).

    Each of `others` must return what `exact` does, within TOLERANCE, or is not timed. Where an argument records
    gradients, a call is the operation and its gradients for a fixed random cotangent. The backends take turns, each
    going first in one round after another, so that a drift of the clock rate is shared by all.

    Raises:
        Whatever `exact` raises; what others raise is told.
    """
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    dtype = next(x.dtype for x in args if isinstance(x, Tensor))
    with torch.set_grad_enabled(bool(leaves)):
        cotangent = _normal_like(_flat(exact(*args, **kwargs))["out"]) if leaves else None

        def bound(run: Run) -> Callable[[], dict[str, Any]]:
            def call() -> dict[str, Any]:
                results = _flat(run(*args, **kwargs))
                if cotangent is not None:
                    grads = torch.autograd.grad(results["out"], leaves, cotangent)
                    results |= {f"gradient {number}": grad for number, grad in enumerate(grads)}
                return {name: x.detach() if isinstance(x, Tensor) else x for name, x in results.items()}

            return call

        calls = {name: bound(exact)}
        wrong: dict[str, str] = {}
        expected = calls[name]()
        for other, run in others.items():
            calls[other] = bound(run)
            # A backend on trial may raise anything; the others' measurements are wanted all the same.
            try:
                found = _difference(calls[other](), expected, TOLERANCE[dtype])
            except Exception as error:  # noqa: BLE001
                found = f"raises {_in_words(error)}"
            if found:
                wrong[other] = found
        del expected
        sound = {other: call for other, call in calls.items() if other not in wrong}
        times = _taking_turns(sound, repeat, watch, name, wrong)
    return {other: Timing.of(found) for other, found in times.items() if other not in wrong}, wrong


def _taking_turns(
    given: Mapping[str, Callable[[], object]], repeat: int, watch: Stopwatch, exact: str, wrong: dict[str, str]
) -> dict[str, list[float]]:
    """Milliseconds of each call. What one of them raises goes to `wrong`, unless it is `exact` that raises."""
    calls = dict(given)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-WARM_UP, repeat):
        names = list(calls)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            try:
                taken = watch(calls[name])
            except Exception as error:
                if name == exact:
                    raise
                wrong[name] = f"raises {_in_words(error)}"
                del calls[name]
                continue
            if turn >= 0:
                times[name].append(taken)
    return times


def _flat(result: Any) -> dict[str, Any]:
    """An operation's result by name: (out, lse), or one tensor."""
    return dict(zip(("out", "lse"), result, strict=True)) if isinstance(result, tuple) else {"out": result}


def _normal_like(x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(0)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _in_words(error: Exception) -> str:
    """The exception on one line, not endless."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= 200 else f"{words[:197]}..."


def _difference(got: Mapping[str, Any], expected: Mapping[str, Tensor], tolerance: float) -> str | None:
    """What is wrong with a result, None if nothing is. Synchronises: what a kernel raises late comes up here."""
    if got.keys() != expected.keys():
        return f"returns {list(got)}, sdpa {list(expected)}"
    for name, right in expected.items():
        found = _difference_of_one(got[name], right, tolerance, lse=name == "lse")
        if found:
            return f"{name} {found}"
    return None


def _difference_of_one(got: Any, right: Tensor, tolerance: float, *, lse: bool) -> str | None:
    if not isinstance(got, Tensor) or (got.shape, got.dtype) != (right.shape, right.dtype):
        given = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        return f"is {given}, sdpa's {right.dtype} {list(right.shape)}"
    if right.numel() == 0:
        return None
    if not right.is_floating_point():
        share = float((got != right).any(-1).float().mean())
        return None if share <= TIES else f"differs from sdpa's in {share:.1%} of its rows"
    if lse:  # natural logarithms: what is a relative error elsewhere is an absolute one here
        same = got == right  # -inf - -inf is NaN
        error = torch.where(same, 0.0, (got - right).abs()).max()
        return None if bool(error <= tolerance) else f"is off sdpa's by {float(error):.2g}"
    # The difference of close numbers is exact in their own dtype; squares are summed in fp32.
    error, size = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (got - right, right))
    # A row may be zero but for rounding, as the gradient of a softmax over one key: then others give the scale.
    scale = size.clamp_min(size.square().mean().sqrt()).clamp_min(torch.finfo(torch.float32).tiny)
    worst = (error / scale).max()
    return None if bool(worst <= tolerance) else f"is off sdpa's by {float(worst):.2g} of a row's length"
