"""What measurements say of a backend: from which length it pays, and what of that a profile can take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_routing.backends import load_backend
from nsa_routing.profile import LAST_RESORT, Profile
from nsa_routing.tuning.measuring import Timing

# How many times as fast as sdpa a backend must be. A route that gains less is not worth another dependency in the path:
# one more library whose version, memory and failures somebody has to answer for.
SPEEDUP = 1.2


@dataclass(frozen=True)
class Finding:
    """What came of one backend on one operation.

    Fields:
        outcome: "threshold", written to the profile; "no preset", it pays, but nothing in the profile would take it;
            "never", it does not pay at the longest lengths; "wrong", results or an exception; "refused", not measured.
        at_least: tokens from which it pays; None where it does not.
        words: the same for people, and what to do about it.
    """

    op: str
    backend: str
    outcome: str
    at_least: int | None
    words: str

    def __str__(self) -> str:
        return " ".join(f"{self.op}, {self.backend}: {self.words}".split())


@dataclass(frozen=True)
class Row:
    """One measurement: op, backend, length in tokens, whether gradients were taken, and the times."""

    op: str
    backend: str
    length: int
    grad: bool
    timing: Timing


def wins(timing: Timing, against: Timing, speedup: float = SPEEDUP) -> bool:
    """At least `speedup` times as fast by medians, and beyond the spread: third quartile below the other's first.

    Example:
        >>> wins(Timing(2.0, 1.9, 2.1, 1.8), Timing(3.0, 2.2, 3.1, 1.0))
        True
    """
    return against.median_ms >= speedup * timing.median_ms and timing.p75_ms < against.p25_ms


def crossover(timings: Mapping[int, Timing], against: Mapping[int, Timing], speedup: float = SPEEDUP) -> int | None:
    """The smallest tested length from which a backend wins: there and at every longer length, as `wins` has it.

    Args:
        timings: of the backend, by length; a length that is missing is not won.
        against: of `sdpa`, by length: these are the tested ones.

    Returns:
        None where the longest tested length is not won.

    Example:
        >>> slow, fast = Timing(9.0, 8.0, 10.0, 7.0), Timing(1.0, 1.0, 1.0, 1.0)
        >>> crossover({256: slow, 512: fast, 1024: fast}, {256: fast, 512: slow, 1024: slow})
        512
    """
    found = None
    for length in sorted(against, reverse=True):
        if length not in timings or not wins(timings[length], against[length], speedup):
            break
        found = length
    return found


def judge(
    op: str, name: str, rows: list[Row], wrong: str | None, profile: Profile, preset: str | None, speedup: float
) -> Finding:
    """What the measurements of one backend on one operation say.

    Args:
        rows: of the whole run.
        wrong: what is wrong with the backend's results, if anything.
        profile: the one to extend.
        preset: where what pays may be entered.
        speedup: what it takes to pay, as `wins` has it.
    """
    own, sdpa = (
        {row.length: row.timing for row in rows if (row.op, row.backend) == (op, x)} for x in (name, LAST_RESORT)
    )
    if wrong:
        return Finding(op, name, "wrong", None, f"no threshold: {wrong}{_advice(op, name, profile)}")
    length = crossover(own, sdpa, speedup)
    if length is None:
        won = [str(length) for length in sorted(own) if wins(own[length], sdpa[length], speedup)]
        where = f"at {', '.join(won)} tokens only" if won else "at no length"
        words = f"{where} {speedup:g} times as fast as {LAST_RESORT}, beyond the spread"
        return Finding(op, name, "never", None, f"no threshold: {words}{_advice(op, name, profile)}")
    words = f"pays from {length} tokens"
    if _is_taken(op, name, profile, preset):
        return Finding(op, name, "threshold", length, words)
    hint = "only --preset perf enters what uses Triton" if preset else "--preset enters it in one"
    return Finding(op, name, "no preset", length, f"{words}, but profile {profile.name} does not take it; {hint}")


def _is_taken(op: str, name: str, profile: Profile, preset: str | None) -> bool:
    """Whether a threshold would be consulted: the profile takes the backend, or it may be entered."""
    if name in profile.order[op] and any(name in modes for modes in profile.presets.values()):
        return True
    return preset is not None and _may_enter(name, preset)


def _may_enter(name: str, preset: str) -> bool:
    return preset != "safe" or not getattr(load_backend(name), "uses_triton", False)


def _advice(op: str, name: str, profile: Profile) -> str:
    """What the extended profile says of a backend that does not pay, and how to make it say otherwise."""
    words = ""
    if name in profile.thresholds.get(op, {}):
        kind = "measured" if profile.thresholds[op][name].measured else "unmeasured"
        words += f"; the {kind} threshold of profile {profile.name} holds on: "
        words += f"thresholds: {{{op}: {{{name}: null}}}} removes it"
    always = [preset for preset, modes in profile.presets.items() if modes.get(name) == "always"]
    if always and name in profile.order[op] and name not in profile.denials.get(op, {}):
        words += f"; preset {always[0]} takes it at every length that no threshold excludes: "
        others = ", ".join(other for other in profile.order[op] if other != name)
        words += f"order: {{{op}: [{others}]}}"
        if name in profile.prefer.get(op, {}):  # may only name what the order has
            words += f" and prefer: {{{op}: {{{name}: null}}}}"
        words += " stops that"
    return words


def entries(
    findings: Sequence[Finding], profile: Profile, preset: str | None, measured: dict[str, Any]
) -> dict[str, Any]:
    """The mappings of a profile that extends `profile` by the thresholds found, each with its source `measured`."""
    order: dict[str, list[str]] = {}
    presets: dict[str, dict[str, str]] = {}
    thresholds: dict[str, dict[str, Any]] = {}
    for found in findings:
        if found.outcome != "threshold":
            continue
        op, name = found.op, found.backend
        names = order.get(op, list(profile.order[op]))
        if name not in names:
            order[op] = [*names[:-1], name, LAST_RESORT]
        if preset is not None and name not in profile.presets.get(preset, {}) and _may_enter(name, preset):
            presets.setdefault(preset, {})[name] = "measured"
        bounds = ("total_q",) if op == "combine" else ("max_seqlen_q", "max_seqlen_k")
        thresholds.setdefault(op, {})[name] = {
            "at_least": dict.fromkeys(bounds, found.at_least),
            "measured": dict(measured),
        }
    mappings = {"order": order, "presets": presets, "thresholds": thresholds}
    return {key: value for key, value in mappings.items() if value}
