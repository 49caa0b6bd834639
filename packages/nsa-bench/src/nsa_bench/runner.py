"""From a suite to rows: every point set up, checked against the oracle, then timed, all its variants taking turns."""

import datetime
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from nsa_bench import ceilings
from nsa_bench.schema import IDENTITY, OK, Row, parameters_text
from nsa_bench.suite import Suite, Variant
from nsa_bench.timing import Sample, Timing, sample, sets_of_data, take_turns
from nsa_bench.workload import FACTS, PARTS, Value, Workload

Columns = Mapping[str, Any]
Key = TypeVar("Key", int, tuple[int, str])  # a measurement's place, or a part of it
Made = TypeVar("Made")


class RunError(ValueError):
    """A suite that asks for what there is not."""


class WrongError(Exception):
    """Results that are not the oracle's."""


@dataclass(frozen=True)
class Measurement:
    """A workload under a clock at a point; `parameters` are all of its own."""

    suite: str
    variant: Variant
    workload: Workload
    parameters: Mapping[str, Value]

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it before anything ran."""
        named = {name: value for name, value in self.parameters.items() if name in IDENTITY}
        return named | {
            "suite": self.suite,
            "workload": self.workload.name,
            "clock": self.variant.clock,
            "parameters": parameters_text(self.parameters),
            "calls": self.workload.calls,
        }

    def __str__(self) -> str:
        own = self.workload.parameters
        words = [f"{name}={value}" for name, value in self.parameters.items() if name == "S" or value != own[name]]
        return f"{self.workload.name} [{self.variant.clock}] {' '.join(words)}"


@dataclass
class Outcome:
    """What a run came to.

    Fields:
        rows: of the points that were measured or known before.
        left: points that the budget did not reach.
    """

    rows: list[Row] = field(default_factory=list)
    left: int = 0

    @property
    def bad(self) -> list[Row]:
        """Rows of results that are wrong, and of what failed."""
        return [row for row in self.rows if row.status.startswith(("wrong", "failed"))]


def points_of(
    suite: Suite, workloads: Mapping[str, Workload], device: str, *, quick: bool = False
) -> list[list[Measurement]]:
    """What is measured side by side, point by point.

    A workload that is not installed is left out; so is a clock that the device does not have.

    Raises:
        RunError: no point, no workload, a parameter that no workload or this one does not take, or one measurement
            twice.
    """
    places = (suite.quick if quick else suite.points)[device]
    if not places:
        raise RunError(f"suite {suite.name}: expected points for {device}, got none")
    there = [v for v in suite.variants if device in v.devices and (device == "cuda" or v.clock == "host")]
    variants = [variant for variant in there if variant.workload in workloads]
    if not there:
        raise RunError(f"suite {suite.name}: expected variants for {device}, got none")
    if not variants:
        wanted = sorted({variant.workload for variant in there})
        raise RunError(f"suite {suite.name}: expected one of the workloads {wanted} on {device}, got (installed) none")
    known = {name for variant in variants for name in workloads[variant.workload].parameters}
    for point in places:
        unknown = sorted(point.keys() - known)
        if unknown:
            raise RunError(f"suite {suite.name}: expected parameters {sorted(known)}, got {unknown}")
    points = [[_measurement(suite, v, workloads[v.workload], point) for v in variants] for point in places]
    seen = set()
    for measurement in (measurement for point in points for measurement in point):
        identity = _row(measurement, {}).identity
        if identity in seen:  # of two rows of one name, a file would keep the later
            raise RunError(f"suite {suite.name}: expected each measurement once, got {measurement} twice")
        seen.add(identity)
    return points


def run(
    points: Sequence[Sequence[Measurement]],
    device: str,
    provenance: Mapping[str, str],
    *,
    known: Sequence[Row] = (),
    repeats: int = 11,
    budget: float | None = None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    tell: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Measure each point that `known` rows do not hold already.

    Args:
        known: rows of an earlier run on the same machine and code; a point is taken from them if they hold every
            measurement of it with a time or a refusal.
        budget: seconds; a point is not begun when the longest one so far would not fit in what is left. The first one
            always is.
        keep: called with all rows after each point.
        tell: called with a line for each measurement.

    Raises:
        RuntimeError: torch is not installed.
    """
    import torch

    begin, longest = clock(), 0.0
    outcome = Outcome()
    of_before = {row.identity: row for row in known if not row.status.startswith(("wrong", "failed"))}
    for number, point in enumerate(points):
        identities = [_row(measurement, {}).identity for measurement in point]
        if all(identity in of_before for identity in identities):
            outcome.rows += [of_before[identity] for identity in identities]
            for measurement in point:
                tell(f"{measurement}: known")
            continue
        started = clock()
        if budget is not None and longest and started - begin + longest > budget:
            outcome.left = sum(
                any(_row(measurement, {}).identity not in of_before for measurement in rest) for rest in points[number:]
            )
            break
        with torch.no_grad():
            outcome.rows += _Point(point, device, provenance, repeats, tell).rows()
        keep(outcome.rows)
        longest = max(longest, clock() - started)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return outcome


class _Point:
    """The measurements of one point: states, checks, samples, and the rows they make."""

    def __init__(
        self,
        measurements: Sequence[Measurement],
        device: str,
        provenance: Mapping[str, str],
        repeats: int,
        tell: Callable[[str], None],
    ) -> None:
        self.measurements = measurements
        self.device = device
        self.common = dict(provenance) | {"date": datetime.date.today().isoformat()}
        self.repeats = repeats
        self.tell = tell
        self.states: dict[tuple[Any, ...], list[Any]] = {}
        self.columns: list[dict[str, Any]] = [{} for _ in measurements]

    def rows(self) -> list[Row]:
        samples = {place: ready for place, m in enumerate(self.measurements) if (ready := self._ready(place, m))}
        for place, timing in self._times(samples).items():
            self.columns[place] |= {
                "ms_total": timing.median,
                "p25_ms": timing.p25,
                "p75_ms": timing.p75,
                "repeats": timing.repeats,
            }
        samples.clear()
        # One measurement after the other: what its parts have in memory need not be there for the next one's.
        for place in [place for place, columns in enumerate(self.columns) if "ms_total" in columns]:
            parts = self._tried(place, partial(self._parts, self.measurements[place])) or {}
            timings = self._times({(place, name): part for name, part in parts.items()})
            self.columns[place] |= {f"ms_{name}": timing.median for (_, name), timing in timings.items()}
        made = [_row(*both, self.common) for both in zip(self.measurements, self.columns, strict=True)]
        for measurement, row in zip(self.measurements, made, strict=True):
            self.tell(f"{measurement}: " + (f"{row.ms_total:.4g} ms" if row.ms_total is not None else row.status))
        return made

    def _ready(self, place: int, measurement: Measurement) -> Sample | None:
        """What samples the whole, after the check; None where there is nothing to time."""
        return self._tried(place, partial(self._checked, measurement, self.columns[place]))

    def _tried(self, place: int, run: Callable[[], Made]) -> Made | None:
        """What `run` makes. A workload is somebody else's code, on trial: its failure is a result, told in its row."""
        try:
            return run()
        except WrongError as error:
            self.columns[place]["status"] = f"wrong: {_line(error)}"
        except Exception as error:  # noqa: BLE001
            self.columns[place]["status"] = f"failed: {type(error).__name__}: {_line(error)}"
        return None

    def _checked(self, measurement: Measurement, columns: dict[str, Any]) -> Sample | None:
        workload, clock = measurement.workload, measurement.variant.clock
        refusal = workload.refuse(self.device, **measurement.parameters)
        if refusal is not None:
            columns["status"] = f"refused: {_line(refusal)}"
            return None
        columns |= self._floor(measurement)
        states = self._states(measurement)
        columns |= _facts(workload, states[0])
        columns["check"] = _judged(workload, states[0], [workload.call(states[0], i) for i in range(workload.calls)])
        # From one set of data to the next, then the next call of each.
        calls = [partial(workload.call, state, i) for i in range(workload.calls) for state in states]
        timed, results = sample(clock, self.device, calls)
        if clock == "graph":  # what the replay left behind
            columns["check"] = _judged(workload, states[0], results[:: len(states)])
        return timed

    def _states(self, measurement: Measurement) -> list[Any]:
        """As many as the clock needs. Clocks and variants of the same workload and parameters share them."""
        workload, parameters = measurement.workload, measurement.parameters
        _, size = workload.cost(**parameters)
        states = self.states.setdefault((workload.name, *sorted(parameters.items())), [])
        sets = sets_of_data(measurement.variant.clock, self.device, size)
        while len(states) < sets:
            states.append(workload.setup(self.device, len(states), **parameters))
        return states[:sets]

    def _parts(self, measurement: Measurement) -> dict[str, Sample]:
        """What samples the parts. From Python on a GPU it would be the launches that are timed."""
        workload, clock = measurement.workload, measurement.variant.clock
        if clock == "host" and self.device == "cuda":
            return {}
        own = [workload.parts(state) for state in self._states(measurement)]
        unknown = own[0].keys() - set(PARTS)
        if unknown:
            raise ValueError(f"parts of {workload.name}: expected {list(PARTS)}, got {sorted(unknown)}")
        steps = {name: [partial(part[name], i) for i in range(workload.calls) for part in own] for name in own[0]}
        return {name: sample(clock, self.device, calls)[0] for name, calls in steps.items()}

    def _floor(self, measurement: Measurement) -> dict[str, float]:
        """What the call costs at least, on this machine."""
        flops, size = measurement.workload.cost(**measurement.parameters)
        if not (0 <= flops < math.inf and 0 <= size < math.inf):
            raise ValueError(f"cost: expected finite numbers of at least 0, got {flops} and {size}")
        dtype = str(measurement.parameters.get("dtype", "float32"))
        reached = ceilings.flops_per_second(self.device, dtype), ceilings.bytes_per_second(self.device)
        floor = 1e3 * max(flops / reached[0], size / reached[1])
        found = {"flops": float(flops), "bytes": float(size), "floor_ms": floor}
        return found | {"ceiling_flops": reached[0], "ceiling_bandwidth": reached[1]}

    def _times(self, samples: Mapping[Key, Sample]) -> dict[Key, Timing]:
        """Of what can be sampled: what fails under the clock is left out, and its row says so."""
        left = dict(samples)

        def guarded(key: Key) -> float:
            place: int = key[0] if isinstance(key, tuple) else key
            if key not in left:
                return 0.0
            try:
                return float(samples[key]())
            except Exception as error:  # noqa: BLE001  # as above
                del left[key]
                self.columns[place]["status"] = f"failed: {type(error).__name__}: {_line(error)}"
                return 0.0

        times = take_turns({key: partial(guarded, key) for key in samples}, self.repeats) if samples else {}
        return {key: timing for key, timing in times.items() if key in left}


def _measurement(suite: Suite, variant: Variant, workload: Workload, point: Mapping[str, Value]) -> Measurement:
    own = workload.parameters
    asked = {name: value for name, value in point.items() if name in own} | dict(variant.parameters)
    for name, value in asked.items():
        if name not in own:
            raise RunError(f"suite {suite.name}: expected parameters {sorted(own)} of {workload.name}, got {name!r}")
        if type(value) is not type(own[name]):
            kind = type(own[name]).__name__
            raise RunError(f"suite {suite.name}: expected {kind} for {name} of {workload.name}, got {value!r}")
    return Measurement(suite.name, variant, workload, dict(own) | asked)


def _row(measurement: Measurement, columns: Columns, common: Columns | None = None) -> Row:
    """A row from what is known of it. A status that is not "ok" leaves no time behind."""
    values = measurement.columns | dict(columns) | dict(common or {})
    if values.get("status", OK) != OK:
        values = {name: value for name, value in values.items() if "ms" not in name.split("_")}
    return Row(**values)


def _judged(workload: Workload, state: Any, results: Sequence[Any]) -> str:
    """What the check says. Its AssertionError is a verdict; one from anywhere else is a failure like others.

    Raises:
        WrongError: the results are.
    """
    try:
        return workload.check(state, results)
    except AssertionError as error:
        raise WrongError(str(error)) from error


def _facts(workload: Workload, state: Any) -> dict[str, Any]:
    """Of what a workload tells, what rows have columns for. What a file could not give back is its failure."""
    found = {name: value for name, value in workload.facts(state).items() if name in FACTS}
    for name, value in found.items():
        if name.startswith("reads") and (type(value) is not int or value < 0):
            raise ValueError(f"facts: expected an int of at least 0 for {name}, got {value!r}")
    return found


def _line(error: object) -> str:
    """On one line, not endless."""
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else f"{words[:297]}..."
