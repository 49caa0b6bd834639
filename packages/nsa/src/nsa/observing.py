"""The switch: `nsa.observe` attaches an observer to the layers of a model, `close` takes it away."""

import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from nsa_routing import Policy, closed, failure_counts
from torch import nn

from nsa import profiler_ranges
from nsa.layer import NSAAttention
from nsa.layer_observer import LayerObserver
from nsa.layer_statistics import summary
from nsa.sizes import check_size


class Observer:
    """Watches layers until `close`, or the end of its `with` block; from `observe`.

    Fields:
        layers: a `LayerObserver` for each, in the order of `model.named_modules()`.
        closed: whether it is over.
    """

    def __init__(self, layers: dict[NSAAttention, LayerObserver], *, ranges: bool) -> None:
        self.layers = tuple(layers.values())
        self.closed = False
        self._of, self._ranges = layers, ranges
        for layer, observer in layers.items():
            layer.observer = observer
        if ranges:
            profiler_ranges.switch_on()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the layers as they were. A second call does nothing; the numbers can still be read."""
        if self.closed:
            return
        self.closed = True
        for layer, observer in self._of.items():
            observer.closed = True
            layer.observer = None
        self._of = {}
        if self._ranges:
            profiler_ranges.switch_off()

    def reset(self) -> None:
        """Count from nothing, and log the next step of each layer as a first one."""
        for layer in self.layers:
            layer.reset()

    def snapshot(self) -> dict[str, float | int | str]:
        """All numbers so far, flat, for any library of metrics. Waits for the devices: not for the hot path.

        Keys are `layer.<number>.<name>`, and `<name>.<branch>` or `route.<op>` within; see `layer_statistics.summary`
        for the names. Every number is finite: what is not defined, as a mean of no queries, is not there. `failures`
        and `closed`, with a key for each `<op>.<backend>.<device>` beside the total, are the process's, as
        `nsa_routing.failure_counts()` and `nsa_routing.closed()` have them.

        Example:
            >>> from nsa import NSAConfig
            >>> layer = NSAAttention(NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16))
            >>> with observe(layer) as observer:
            ...     out = layer(torch.randn(1, 100, 64))
            >>> numbers = observer.snapshot()
            >>> numbers["layer.0.queries"], numbers["layer.0.reads.slc"], numbers["layer.0.route.combine"]
            (100, 50.5, 'sdpa')
        """
        found: dict[str, float | int | str] = {}
        for layer, row in zip(self.layers, self._totals(), strict=True):
            numbers: dict[str, float | int | str] = {"module": layer.path, **summary(row, layer.num_kv_heads)}
            numbers |= {f"route.{op}": backend for op, backend in layer.routes().items()}
            if layer.compiled:
                numbers["compiled"] = 1
            found |= {f"layer.{layer.number}.{name}": value for name, value in numbers.items()}
        failures = {route: sum(kinds.values()) for route, kinds in failure_counts().items()}
        ended = closed()
        found |= {"failures": sum(failures.values()), "closed": len(ended)}
        for (backend, op, device), times in failures.items():
            found[f"failures.{op}.{backend}.{device}"] = times
        for backend, op, device in ended:
            found[f"closed.{op}.{backend}.{device}"] = 1
        return found

    def _totals(self) -> list[list[float]]:
        """Each layer's sums over all steps, with one wait for each device."""
        by_device: dict[torch.device, list[LayerObserver]] = {}
        for layer in self.layers:
            by_device.setdefault(layer.statistics.state.device, []).append(layer)
        found: dict[LayerObserver, list[float]] = {}
        for layers in by_device.values():
            rows = torch.stack([layer.statistics.state[1] for layer in layers]).tolist()
            found |= zip(layers, rows, strict=True)
        return [found[layer] for layer in self.layers]


def observe(
    model: nn.Module,
    *,
    every: int = 1,
    parity_every: int = 0,
    parity_rows: int = 64,
    ranges: bool = False,
    log_every: int | None = None,
    log_seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Observer:
    """Observe every `NSAAttention` in `model`; off until called. docs/observability.md says what the numbers mean.

    Layers are numbered from 0 in the order of `model.named_modules()`. A line of the logger `nsa`, at INFO, tells of
    each layer's first decode step and first prefill, and again as `NSA_LOG_EVERY` says:

    ```
    nsa decode layer=3 S=65536 reads cmp=4095 slc=1024 win=512 (budget 5631) gate cmp=.31±.08 slc=.52±.11 ...
    ```

    Args:
        every: of each so many decode steps, and prefills, of a layer the first two are counted, the second being the
            first one's neighbour; 1 counts all. What is left on in production is sampled: 64, say.
        parity_every: compare with backend `sdpa` in a layer's first step and each so many later; 0 never does. Steps
            in a CUDA graph are not compared.
        parity_rows: at the last so many queries of each sequence, at most.
        ranges: show the operations to torch.profiler and NVTX as `nsa::<name>`, in the whole process.
        log_every, log_seconds: see `nsa_routing.RateLimit`; None is that part of `NSA_LOG_EVERY`.
        clock: seconds.

    Raises:
        TypeError, ValueError: arguments that do not fit, a model without such layers or with one that is observed
            already, or an environment variable that is wrong.

    Example:
        >>> from nsa import NSAConfig
        >>> layer = NSAAttention(NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16))
        >>> observer = observe(layer, parity_every=1)
        >>> out = layer(torch.randn(1, 100, 64))
        >>> observer.snapshot()["layer.0.parity_mae"]
        0.0
        >>> observer.close()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_size("every", every)
    check_size("parity_every", parity_every, 0)
    check_size("parity_rows", parity_rows)
    if type(ranges) is not bool:
        raise TypeError(f"ranges: expected a bool, got {ranges!r} of type {type(ranges).__name__}")
    if not callable(clock):
        raise TypeError(f"clock: expected a function, got {type(clock).__name__}")
    policy = Policy.from_env()
    policy = policy if log_every is None else replace(policy, log_every=log_every)
    policy = policy if log_seconds is None else replace(policy, log_seconds=log_seconds)
    found = {module: path for path, module in model.named_modules() if isinstance(module, NSAAttention)}
    if not found:
        raise ValueError(f"model: expected one with an NSAAttention, got {type(model).__name__} without")
    observed = [path for layer, path in found.items() if layer.observer is not None]
    if observed:
        raise ValueError(f"model: expected layers that nobody observes, got {observed}; close their observer first")
    group = object()
    layers = {
        layer: LayerObserver(
            *(number, path, layer),
            every=every,
            parity_every=parity_every,
            parity_rows=parity_rows,
            policy=policy,
            clock=clock,
            group=group,
        )
        for number, (layer, path) in enumerate(found.items())
    }
    return Observer(layers, ranges=ranges)
