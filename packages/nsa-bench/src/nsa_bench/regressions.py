"""Comparison with a baseline: has anything become slower than it was, beyond the noise of both files?

Machines and days differ, so ratios are compared, not times. A measurement's ratio is

- to the fastest dense anchor at its point, of those anchors that have a time in both files: one that only one of the
  two has would move the ratio on its own;
- where there is no such anchor, to `floor_ms`, which comes from ceilings that were measured in the same run; only if
  both files name the same device, since time above the floor (a launch, say) does not scale with a device. Ceilings
  come without quartiles, so FLOOR_NOISE is granted.

With ratios r = t / t_reference and e the relative standard errors of the up to four medians,

    change    = log(r_now / r_was)
    regressed = change > SIGMAS * sqrt(sum e^2)  and  change > log(1 + LEAST)

A measurement that cannot be compared is named with its reason; one that the baseline has a time of and the new file has
not is a failure. Anchors are what others are held against: only their absence is reported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nsa_bench.measurements import (
    SIGMAS,
    anchors_for,
    error,
    fastest,
    is_anchor,
    is_timed,
    labels,
    numbered,
    short_length,
)
from nsa_bench.schema import Row

# Quartiles know the noise within a run. From run to run medians move by one or two percent more: other pages of memory,
# other clocks of the chip.
LEAST = 0.02
FLOOR_NOISE = 0.10

NO_ANCHOR = "no dense anchor at its point has a time in both files"
FAILURES = ("regressed", "missing")


@dataclass(frozen=True)
class Comparison:
    """What became of a measurement.

    Fields:
        subject: the measurement in words.
        outcome: "regressed", "missing" (the baseline has a time, the new file has none), "improved", "same", "not
            comparable", or "new".
        words: why, with the numbers.
        change: now / was of the ratio; None where there are not two.
    """

    subject: str
    outcome: str
    words: str
    change: float | None = None


def compare(rows: Sequence[Row], baseline: Sequence[Row]) -> list[Comparison]:
    """Each measurement of two files; those of the baseline in its order, then the new ones.

    Example:
        >>> dense = Row(64, workload="dense.decode", ms_total=2.0, p25_ms=2.0, p75_ms=2.0, repeats=9)
        >>> was = Row(64, workload="nsa.decode", ms_total=1.0, p25_ms=1.0, p75_ms=1.0, repeats=9)
        >>> now = Row(64, workload="nsa.decode", ms_total=1.2, p25_ms=1.2, p75_ms=1.2, repeats=9)
        >>> [comparison.outcome for comparison in compare([dense, now], [dense, was])]
        ['regressed']
    """
    here, there = numbered(rows), numbered(baseline)
    shared = [key for key, row in there.items() if is_anchor(row) and _sure(row) and key in here and _sure(here[key])]
    anchors = [here[key] for key in shared], [there[key] for key in shared]
    found = []
    for (key, was), subject in zip(there.items(), _subjects(baseline), strict=True):
        if not is_timed(was):
            continue  # nothing to lose; if there is a time now, it is new
        now = here.get(key)
        if now is None or not is_timed(now):
            reason = "no such row" if now is None else " ".join(now.status.split())
            found.append(Comparison(subject, "missing", reason))
        elif not is_anchor(was):
            found.append(_compared(subject, now, was, *anchors))
    for (key, now), subject in zip(here.items(), _subjects(rows), strict=True):
        if is_timed(now) and (key not in there or not is_timed(there[key])):
            found.append(Comparison(subject, "new", "no time in the baseline"))
    return found


def _compared(subject: str, now: Row, was: Row, here: Sequence[Row], there: Sequence[Row]) -> Comparison:
    if not (_sure(now) and _sure(was)):
        return Comparison(subject, "not comparable", "no quartiles, so no noise is known")
    dense = fastest(now, anchors_for(now.workload, here)), fastest(was, anchors_for(was.workload, there))
    least, four = LEAST, [now, was]
    if dense[0] and dense[1]:
        ratios = _ratio(now, dense[0].ms_total), _ratio(was, dense[1].ms_total)
        reference = "dense attention"
        four += [dense[0], dense[1]]
    elif not (now.floor_ms and was.floor_ms):
        return Comparison(subject, "not comparable", f"{NO_ANCHOR}, and there is no floor")
    elif now.device != was.device:
        devices = f"{was.device or 'no name'} and {now.device or 'no name'}"
        return Comparison(subject, "not comparable", f"{NO_ANCHOR}, and the devices differ: {devices}")
    else:
        ratios = _ratio(now, now.floor_ms), _ratio(was, was.floor_ms)
        reference, least = "the floor", FLOOR_NOISE
    change = ratios[0] / ratios[1]
    noise = max(SIGMAS * math.hypot(*(error(row) or 0 for row in four)), math.log1p(least))
    words = f"{ratios[1]:.3g} → {ratios[0]:.3g} of {reference}, {change - 1:+.1%}; noise {math.expm1(noise):.1%}"
    outcome = "regressed" if math.log(change) > noise else "improved" if math.log(change) < -noise else "same"
    return Comparison(subject, outcome, words, change)


def _subjects(rows: Sequence[Row]) -> list[str]:
    """Rows in words, with suite and shape where there are several."""
    names = ("suite", "batch", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "dtype")
    differ = [name for name in names if len({getattr(row, name) for row in rows}) > 1]
    return [
        ", ".join([label, f"S {short_length(row.S)}", *(f"{name} {getattr(row, name)}" for name in differ)])
        for label, row in zip(labels(rows, clock=True), rows, strict=True)
    ]


def _sure(row: Row) -> bool:
    return is_timed(row) and error(row) is not None


def _ratio(row: Row, reference: Any) -> float:
    assert row.ms_total
    return row.ms_total / float(reference)
