"""One line of the log about a layer's step, as often as asked."""

import logging
from collections.abc import Callable, Mapping

from nsa_routing import RateLimit
from torch import Tensor

from nsa.later_copy import LaterCopy
from nsa.layer_statistics import BRANCHES

LOGGER = logging.getLogger("nsa")
KINDS = ("decode", "prefill")


class Sampler:
    """Logs a layer's line at INFO: the first step of each kind, and then as its rate limits say.

    A line is of one step. Its numbers come from the device some steps later, when their copy has landed; one copy at a
    time is on its way. A step without queries has no line, and the next one of its kind takes its turn.

    Args:
        state: what to copy.
        describe: `(kind, numbers) -> line`, None if there is nothing to say.
        limits: of each of KINDS.
    """

    def __init__(
        self,
        state: Tensor,
        describe: Callable[[str, list[float]], str | None],
        limits: Mapping[str, RateLimit],
    ) -> None:
        self._copy = LaterCopy(state)
        self._describe, self._limits = describe, limits
        self._due: set[str] = set()
        self._awaited: str | None = None

    def tick(self, kind: str, counted: bool = True) -> None:
        """A step of this kind was queued, and `state` is of it if it is `counted`: else a line waits for one that is.

        Waits for nothing; not to be called while a graph is captured.
        """
        if not LOGGER.isEnabledFor(logging.INFO):
            return
        if self._limits[kind].due():
            self._due.add(kind)
        if kind in self._due and self._awaited is None and counted:
            self._copy.start()
            self._due.remove(kind)
            self._awaited = kind
        if self._awaited is not None and self._copy.landed():
            awaited, self._awaited = self._awaited, None
            line = self._describe(awaited, self._copy.values())
            if line is None:
                self._due.add(awaited)
            else:
                LOGGER.info(line)


def line(kind: str, layer: int, length: float, numbers: Mapping[str, float], route: str, failures: int = 0) -> str:
    """The line of a step, from the `summary` of it; a dash for what is not defined.

    Args:
        length: S, tokens of the longest sequence.
        route: see `route_of`.
        failures: of backends, in this process; shown if there are any, as values that are not finite are.

    Example:
        >>> numbers = {"reads.cmp": 12.0, "reads.slc": 200.5, "budget": 1400.0, "gate_mean.win": 1.0, "nonfinite": 3}
        >>> line("decode", 0, 200.0, numbers, "sdpa")
        'nsa decode layer=0 S=200 reads cmp=12 slc=200.5 win=- (budget 1400) gate cmp=- slc=- win=1.00±- route=sdpa nonfinite=3'
    """  # noqa: E501  # the line is one line
    reads = " ".join(f"{branch}={_count(numbers.get(f'reads.{branch}'))}" for branch in BRANCHES)
    gates = " ".join(
        f"{branch}={_share(numbers[f'gate_mean.{branch}'])}±{_share(numbers.get(f'gate_std.{branch}'))}"
        if f"gate_mean.{branch}" in numbers
        else f"{branch}=-"
        for branch in BRANCHES
    )
    said = f"nsa {kind} layer={layer} S={length:.0f} reads {reads} (budget {_count(numbers.get('budget'))}) "
    said += f"gate {gates} route={route}"
    if numbers.get("nonfinite"):
        said += f" nonfinite={numbers['nonfinite']}"
    return said + (f" failures={failures}" if failures else "")


def route_of(routes: Mapping[str, str]) -> str:
    """The backend of all operations, or each operation with its own.

    Example:
        >>> route_of({"combine": "sdpa", "select_blocks": "sdpa"}), route_of({"combine": "sdpa", "select_blocks": "x"})
        ('sdpa', 'combine:sdpa,select_blocks:x')
    """
    if len(set(routes.values())) == 1:
        return next(iter(routes.values()))
    return ",".join(f"{op}:{backend}" for op, backend in sorted(routes.items())) or "-"


def _count(value: float | None) -> str:
    """A number of keys, with a decimal if it is a mean."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def _share(value: float | None) -> str:
    """Two decimals, without the zero before them."""
    return "-" if value is None else f"{value:.2f}".removeprefix("0")
