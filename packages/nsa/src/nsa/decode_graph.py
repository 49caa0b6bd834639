"""A decode step of a whole model, captured once and replayed at every length."""

from collections.abc import Callable, Sequence

import torch
from nsa_varlen.transfer import to_device
from torch import Tensor

from nsa.cache import NSACache
from nsa.layer_observer import Recorded, counted, making_a_graph

WARM_UPS = 3  # before the capture: what is compiled, tuned or kept at a first call must be there


class DecodeGraph:
    """A CUDA graph of `step`, with the bookkeeping around each replay.

    A replay reserves pages, runs the graph and tells the caches' hosts. It crosses the boundaries of blocks and pages
    without another capture, and asks the device for nothing. Sequences may join and leave between replays: those whose
    count is 0 are left as they are.

    Layers that are observed when it is made (`nsa.observe`) go on counting in its replays.

    Args:
        step: `(x, counts) -> out`: the model's step, which calls `NSAAttention.decode` with each layer's cache and
            these counts, int32 [B].
        caches: of all layers.
        x: an input of the shape that all will have, [B, N, ...].

    Raises:
        TypeError: caches that are no sequence of NSACache, x that is no tensor.
        ValueError: no caches, or x that is not on their CUDA device or not of their batch.

    Example:
        >>> def greedy(layer, cache, token):
        ...     graph = DecodeGraph(lambda x, counts: layer.decode(x, cache, counts), [cache], token)
        ...     for _ in range(100):
        ...         token = graph.replay(token).clone()
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], caches: Sequence[NSACache], x: Tensor) -> None:
        if not isinstance(caches, Sequence):
            raise TypeError(f"caches: expected a sequence of NSACaches, got {type(caches).__name__}")
        if not caches:
            raise ValueError("caches: expected at least one, got none")
        for cache in caches:
            if not isinstance(cache, NSACache):
                raise TypeError(f"caches: expected NSACaches, got {type(cache).__name__}")
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        batch, device = caches[0].batch_size, caches[0].device
        if device.type != "cuda" or x.device != device:
            raise ValueError(f"x: expected a CUDA device, that of the caches, got {x.device} and {device}")
        if x.ndim < 2 or any(cache.batch_size != x.shape[0] for cache in caches):
            raise ValueError(f"x: expected [{batch}, N, ...] of the caches' batch, got {list(x.shape)}")
        self.caches = list(caches)
        self.x, self.counts = x.clone(), torch.zeros(batch, dtype=torch.int32, device=device)
        with torch.no_grad(), making_a_graph() as recorded:
            # With counts of 0: nothing is appended.
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step(self.x, self.counts)
                    for cache in self.caches:
                        cache.advance(0)
            torch.cuda.current_stream(device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = step(self.x, self.counts)
        self._counting = ObservedReplays(recorded) if recorded else None

    def replay(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The step for x [B, N, ...]: of sequence b the first counts[b] rows are tokens (None: all N).

        The result is the graph's own tensor: the next replay writes over it.

        Raises:
            TypeError, ValueError: arguments that do not fit.
            CacheFull: a pool has not enough pages. Nothing ran.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.shape != self.x.shape or x.dtype != self.x.dtype:
            raise ValueError(f"x: expected {self.x.dtype} {list(self.x.shape)}, got {x.dtype} {list(x.shape)}")
        lengths = [x.shape[1]] * x.shape[0] if counts is None else list(counts)
        if any(type(count) is int and count > x.shape[1] for count in lengths):
            raise ValueError(f"counts: expected at most {x.shape[1]}, got {lengths}")
        for cache in self.caches:
            cache.reserve(lengths)
        self.x.copy_(x)
        self.counts.copy_(to_device(torch.tensor(lengths, dtype=torch.int32, device="cpu"), self.counts.device))
        self.graph.replay()
        for cache in self.caches:
            cache.advance(lengths)
        if self._counting is not None:
            self._counting.replayed()
        return self.out


class ObservedReplays:
    """Counts what observed layers did in a graph, in some of its replays: by graphs of their own, replayed behind it.

    Each `nsa.observe` has its graph: it counts as often as it asks to, and until it is closed.
    """

    def __init__(self, recorded: Sequence[Recorded]) -> None:
        groups: dict[object, list[Recorded]] = {}
        for each in recorded:
            groups.setdefault(each.observer.group, []).append(each)
        self._parts = [_CountedReplays(group) for group in groups.values()]

    def replayed(self) -> None:
        """The graph with the steps was replayed once more."""
        for part in self._parts:
            part.replayed()


class _CountedReplays:
    """Layers that are observed by one `nsa.observe`.

    The steps' tensors keep their places in the first graph's memory, since what counts them holds them.
    """

    def __init__(self, recorded: Sequence[Recorded]) -> None:
        self._observers = [each.observer for each in recorded]
        self._replays = 0
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            for each in recorded:
                each.count()
        self._recorded = list(recorded)

    def replayed(self) -> None:
        first = self._observers[0]
        if first.closed:
            return
        is_counted = counted(self._replays, first.every)
        self._replays += 1
        if is_counted:
            self._graph.replay()
        for observer in self._observers:
            observer.replayed(is_counted)
