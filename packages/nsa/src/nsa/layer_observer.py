"""What watches one layer while it attends."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from nsa_routing import Policy, Problem, RateLimit, failure_counts, plan_for
from nsa_routing.device_flag import capturing
from torch import Tensor

from nsa import ops
from nsa.attention import NSAAux, nsa_attention
from nsa.layer_statistics import SUMS, LayerStatistics, summary
from nsa.noted_problems import noting
from nsa.parity import decode_difference, prefill_difference
from nsa.sampling import KINDS, LOGGER, Sampler, line, route_of
from nsa.selection_overlap import ChosenBlocks, overlap, overlap_of_single

if TYPE_CHECKING:
    from nsa.cache import NSACache
    from nsa.decode_step import DecodeStep
    from nsa.layer import NSAAttention

OVERLAP_ROWS = 256  # of a prefill, at most so many of its last queries are compared with their neighbours
LENGTH = SUMS.index("length")


class LayerObserver:
    """Calls the attention for one layer and counts what came of it; `nsa.observe` makes one for each layer.

    What it computes, it computes on detached tensors, without gradient and without waiting for a device. The
    recomputation of a checkpoint is not counted again, and compiled code is not counted at all: tracing it logs a
    warning, and `compiled` says so.

    Fields:
        number, path: of the layer among those observed, and of its module.
        num_kv_heads: of the layer.
        statistics: the sums.
        every: of so many steps of a kind the first two are counted: see `counted`.
        group: what the layers of one `nsa.observe` have in common: they count alike, and are closed together.
        compiled: whether torch.compile has traced the layer since it is observed.
        closed: whether the observation is over.
    """

    def __init__(
        self,
        number: int,
        path: str,
        layer: "NSAAttention",
        *,
        every: int = 1,
        parity_every: int = 0,
        parity_rows: int = 64,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        group: object = None,
    ) -> None:
        self.number, self.path = number, path
        self.group = self if group is None else group
        self.compiled = self.closed = False
        self.num_kv_heads = layer.config.num_kv_heads
        self.every = every
        self._parity_every, self._parity_rows = parity_every, parity_rows
        self._policy, self._clock = Policy() if policy is None else policy, clock
        self._key = str(next(_keys))
        _observers[self._key] = self
        self.statistics = LayerStatistics(layer.q_proj.weight.device)
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # the copy of an observed layer is a layer that nobody observes

    def _begin(self) -> None:
        self._seen = dict.fromkeys(KINDS, 0)
        self._steps = 0  # those that parity may be sampled in
        self._problems: dict[str, dict[str, Problem]] = {}
        self._sampler = self._new_sampler()

    def _new_sampler(self) -> Sampler:
        limits = {kind: RateLimit(self._policy.log_every, self._policy.log_seconds, self._clock) for kind in KINDS}
        return Sampler(self.statistics.state, self._describe, limits)

    def reset(self) -> None:
        """Start anew: sums, routes, and the log's first line. Graphs that accumulate here go on."""
        self.statistics.reset()
        self._begin()

    def noted(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A prefill's `attend`, whose operations' problems are noted, compression included."""
        if torch.compiler.is_compiling():
            return attend

        def run(*args: Any) -> Tensor:
            with noting(self._noted("prefill", {})):
                return attend(*args)

        return run

    def attention(
        self, cache: "NSACache | None", *given: Any, q_cmp: Tensor, return_aux: bool
    ) -> tuple[Tensor, NSAAux]:
        """`nsa_attention(*given, q_cmp=q_cmp, return_aux=True)` of the layer's forward, counted."""
        assert return_aux
        out, aux = nsa_attention(*given, q_cmp=q_cmp, return_aux=True)
        if torch.compiler.is_compiling():
            _left_out(self._key)
        elif not _recomputing() and given[-2].total_q:
            self._count_prefill(cache, *given, q_cmp=q_cmp, out=out, block_indices=aux.block_indices)
        return out, aux

    def decode_attention(
        self, cache: "NSACache", step: "DecodeStep", *given: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """`ops.decode_attention(*given, **options)` of the layer's decode step, counted."""
        if torch.compiler.is_compiling():
            _left_out(self._key)
            return ops.decode_attention(*given, **options)
        with noting(self._noted("decode", {})):
            out, block_indices = ops.decode_attention(*given, **options)
        self._count_decode(cache, step, *given, q_cmp=options["q_cmp"], out=out, block_indices=block_indices)
        return out, block_indices

    @torch.no_grad()
    def _count_prefill(
        self, cache: "NSACache | None", *given: Any, q_cmp: Tensor, out: Tensor, block_indices: Tensor
    ) -> None:
        q, *kv, gates, layout, blocks = given

        def count() -> None:
            position, sequence = layout.positions(), layout.sequence_of_queries()
            chosen = None if cache is None else self._chosen_of(cache)
            shared = overlap(block_indices, position, sequence, chosen, OVERLAP_ROWS)
            if chosen is not None:
                offsets = layout.cu_seqlens_q.long()
                chosen.keep(block_indices, position, offsets[1:] - 1, offsets.diff() > 0)
            self.statistics.add(gates, out, block_indices, position, shared, blocks)

        def compare() -> None:
            rows = self._parity_rows
            difference = prefill_difference(
                q, kv, gates, layout, blocks, q_cmp=q_cmp, block_indices=block_indices, out=out, rows=rows
            )
            self.statistics.add_parity(difference, torch.ones((), dtype=torch.bool, device=q.device))

        decodes = cache is not None and layout.max_seqlen_q <= cache.most_decoded
        if decodes:
            self._noted("decode", self._problems["prefill"])
        self._stepped("decode" if decodes else "prefill", q.device, count, compare)

    @torch.no_grad()
    def _count_decode(
        self, cache: "NSACache", step: "DecodeStep", *given: Any, q_cmp: Tensor, out: Tensor, block_indices: Tensor
    ) -> None:
        q, *_, gates, counts, blocks = given
        width = q.shape[1]

        def count() -> None:
            position, sequence = step.rows()
            indices = block_indices.flatten(0, 1)
            chosen = self._chosen_of(cache)
            if width == 1:
                shared = overlap_of_single(indices, position, chosen)
            else:
                shared = overlap(indices, position, sequence, chosen, len(position))
                first = torch.arange(0, len(position), width, device=position.device)
                chosen.keep(indices, position, first + counts - 1, counts > 0)
            self.statistics.add(gates.flatten(0, 1), out.flatten(0, 1), indices, position, shared, blocks)

        def compare() -> None:
            position, _ = step.rows()
            difference = decode_difference(step, q, gates, blocks, q_cmp=q_cmp, out=out)
            self.statistics.add_parity(difference, (position >= 0)[:, None, None])

        self._stepped("decode", q.device, count, compare)

    def _stepped(self, kind: str, device: torch.device, count: Callable[[], None], compare: Callable[[], None]) -> None:
        """A step ran, or is being captured: then whoever replays it counts, if it is a `DecodeGraph`."""
        self._be_on(device)
        graph = _graph.get()
        if graph is not None and capturing(device):
            graph.append(Recorded(self, count))
        elif graph is not None or capturing(device):
            count()  # a warm-up, in which nobody asks; or part of a graph that was captured by hand
        else:
            is_counted = counted(self._seen[kind], self.every)
            self._seen[kind] += 1
            if is_counted:
                count()
            if self._parity_every and self._steps % self._parity_every == 0:
                compare()
            self._steps += 1
            self._sampler.tick(kind, is_counted)

    def replayed(self, is_counted: bool) -> None:
        """A graph that holds a decode step of this layer was replayed, and that step counted or not."""
        if not self.closed:
            self._sampler.tick("decode", is_counted)

    def routes(self) -> dict[str, str]:
        """By operation that ran since the beginning, the backend that its last problem would go to now."""
        found: dict[str, Problem] = {}
        for notes in list(self._problems.values()):  # copies: a step in another thread may be noting
            found |= notes.copy()
        return _routes(found)

    def _noted(self, kind: str, notes: dict[str, Problem]) -> dict[str, Problem]:
        """The notes of a kind's step, the last of all kinds' from now on."""
        self._problems.pop(kind, None)
        self._problems[kind] = notes
        return notes

    def _describe(self, kind: str, values: Any) -> str | None:
        last = values[0]
        numbers = summary(last, self.num_kv_heads)
        if not numbers["queries"]:
            return None
        failures = sum(sum(kinds.values()) for kinds in failure_counts().values())
        route = route_of(_routes(self._problems.get(kind, {}).copy()))
        return line(kind, self.number, last[LENGTH], numbers, route, failures)

    def _be_on(self, device: torch.device) -> None:
        """The sums follow the layer to its device."""
        if self.statistics.state.device != device:
            _check_no_capture(device)
            self.statistics.move(device)
            self._sampler = self._new_sampler()

    def _chosen_of(self, cache: "NSACache") -> ChosenBlocks:
        if cache.chosen is None:
            _check_no_capture(cache.device)
            config = cache.config
            cache.chosen = ChosenBlocks(cache.batch_size, config.num_kv_heads, config.topk, cache.device)
        return cache.chosen


_keys = count()
_observers: WeakValueDictionary[str, LayerObserver] = WeakValueDictionary()


@dataclass(frozen=True)
class Recorded:
    """A layer's step in a graph. `count` counts it on the tensors that the graph's last replay left."""

    observer: LayerObserver
    count: Callable[[], None]


_graph: ContextVar[list[Recorded] | None] = ContextVar("graph", default=None)


def counted(step: int, every: int) -> bool:
    """Whether the step of this number is: the first two of each `every`, so that one has a neighbour before it.

    Example:
        >>> [step for step in range(10) if counted(step, 4)], all(counted(step, 1) for step in range(10))
        ([0, 1, 4, 5, 8, 9], True)
    """
    return step % every < 2


@contextmanager
def making_a_graph() -> Iterator[list[Recorded]]:
    """Warm-ups and the capture of a graph: no step in them is one. What was captured of observed layers is listed."""
    found: list[Recorded] = []
    token = _graph.set(found)
    try:
        yield found
    finally:
        _graph.reset(token)


def _routes(problems: dict[str, Problem]) -> dict[str, str]:
    return {op: plan_for(problem).backend or "none" for op, problem in problems.items()}


def _recomputing() -> bool:
    """Whether this is inside a backward: a checkpoint's recomputation of a forward that was counted."""
    return bool(torch._C._current_graph_task_id() != -1)


def _check_no_capture(device: torch.device) -> None:
    if capturing(device):
        raise RuntimeError("observer: expected a step outside of the graph's capture first, got none with this cache")


def _left_out(key: str) -> bool:
    observer = _observers.get(key)
    if observer is not None and not observer.compiled:
        observer.compiled = True
        LOGGER.warning("nsa layer=%d was compiled by torch.compile: compiled steps are not observed", observer.number)
    return True


# Dynamo calls it while it traces, and compiled code does not: see nsa_routing.dispatching.
setattr(_left_out, "_dynamo_marked_constant", True)  # noqa: B010  # mypy knows no such attribute
