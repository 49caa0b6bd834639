"""The kinds of trends: each a function of a series, and of all rows where it is held against others, with an answer.

Each gives True, False, or None where there is nothing to say. What noise could explain is no evidence, neither that a
trend holds nor, where the medians themselves are on its side, that it is broken. A median's
relative standard error is derived from its quartiles (`nsa_bench.measurements.error`), errors of a ratio add in
quadrature, and SIGMAS of them are granted. Rows without a time or without quartiles are passed over.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_bench.measurements import (
    SIGMAS,
    anchors_for,
    asked_backend,
    error,
    fastest,
    is_timed,
    parameters,
    short_length,
)
from nsa_bench.schema import Row
from nsa_bench.summary import decode_reads

Answer = tuple[bool | None, str]
GEOMETRY = {"block_size": 64, "topk": 16}  # what rows that do not name them were measured with
# A step reads compressed keys a second time, to choose blocks: with c compressed rows and r others it moves
# (c + c/2 + r) / (c + r) of what its budget says, which over any lengths grows at most 1.5-fold.
TWICE = 0.5


@dataclass(frozen=True)
class Kind:
    """How a trend is asked.

    Fields:
        ask: (series, all rows, **options) -> answer.
        keys: its options and their defaults; `...` has none, None may be left out.
    """

    ask: Callable[..., Answer]
    keys: Mapping[str, Any]


def follows_budget(line: Sequence[Row], rows: Sequence[Row], *, tolerance: float = TWICE) -> Answer:
    """Decode time grows like the budget of a step, not like S.

    With g the growth from the shortest length on, of time t, budget b = reads_expected_decode / calls, and S:
    it is broken where g_t > g_b * (1 + tolerance) at some length beyond noise, and holds where, besides, g_t < g_S at
    the longest beyond noise. Slower growth than the budget's is fine: a launch costs the same at every length. Where
    the budget itself, with its tolerance, grows no slower than S, lengths are too short to tell.
    """
    told = [(row, budget[1]) for row in _sure(line) if (budget := decode_reads(row)) and budget[1]]
    if len(told) < 2 or told[0][0].S == told[-1][0].S:
        return None, f"expected two lengths with a time and decode reads, got {len(told)}"
    (first, least), (last, most) = told[0], told[-1]
    allowed, length = most / least * (1 + tolerance), last.S / first.S
    spoken = f"{short_length(first.S)} to {short_length(last.S)}: time grows {_ratio(last, first):.2f}-fold"
    spoken += f", the budget {most / least:.2f}-fold, S {length:g}-fold"
    if allowed >= length:
        return None, f"{spoken}: too short to tell"
    for row, keys in told[1:]:
        grown = _ratio(row, first)
        if math.log(grown) > math.log(keys / least * (1 + tolerance)) + SIGMAS * _error(row, first):
            at = f"; {grown:.2f}-fold by {short_length(row.S)}, the budget {keys / least:.2f}-fold"
            return False, f"{spoken}{'' if row is last else at}; tolerance {tolerance:g}"
    if math.log(_ratio(last, first)) + SIGMAS * _error(last, first) >= math.log(length):
        return None, f"{spoken}: too noisy to tell it from S"
    return True, spoken


def crossover(line: Sequence[Row], rows: Sequence[Row], *, at_most: float) -> Answer:
    """The smallest length from which it is faster than the fastest dense anchor, there and at every longer one.

    Of lengths that were measured; faster is t_dense / t > 1 beyond noise. Broken where t_dense / t <= 1 at some length
    from `at_most` on; nothing can be said where that is not so, but no length up to `at_most` is won.
    """
    anchors = _sure(anchors_for(line[0].workload, rows))
    pairs = [(row, dense) for row in _sure(line) if (dense := fastest(row, anchors))]
    if not pairs:
        return None, "expected a dense anchor at a length with a time, got none"
    ratios = {row.S: _ratio(dense, row) for row, dense in pairs}
    won = {row.S for row, dense in pairs if math.log(ratios[row.S]) > SIGMAS * _error(dense, row)}
    last, open_until = max(ratios), max(ratios.keys() - won, default=0)
    since = min((S for S in ratios if open_until < S), default=None)
    words = "at no length" if since is None else f"from {short_length(since)} on"
    if open_until:
        words += f", not at {short_length(open_until)} ({ratios[open_until]:.2f}×)"
    words = f"faster {words}; {ratios[last]:.2f}× dense attention's speed at {short_length(last)}"
    if since is not None and since <= at_most:
        return True, words
    if any(at_most <= S and ratio <= 1 for S, ratio in ratios.items()):
        return False, words
    reason = "too noisy to tell" if open_until >= at_most else f"not measured up to {short_length(at_most)}"
    return None, f"{words}: {reason}"


def exponent(
    line: Sequence[Row], rows: Sequence[Row], *, at_most: float, at_least: float | None = None, **given: float | None
) -> Answer:
    """p of t ~ S^p, of lengths from `from` on: the slope of log t over log S by least squares.

    With x = log S, p = sum (x_i - x̄) log t_i / Sxx is linear in the log t_i, so its standard error is
    sqrt(sum ((x_i - x̄) e_i)^2) / Sxx for relative errors e_i of the medians. A curve's deviation from the line is not
    noise, and not in it. Where noise could put p on either side of a bound, there is nothing to say.
    """
    start = given.get("from") or 0
    told = [row for row in _sure(line) if start <= row.S]
    if len({row.S for row in told}) < 2:
        since = f" from {short_length(start)} on" if start else ""
        return None, f"expected two lengths{since} with a time, got {len(told)}"
    x = [math.log(row.S) for row in told]
    mean = sum(x) / len(x)
    total = sum((each - mean) ** 2 for each in x)
    slope = sum((each - mean) * math.log(row.ms_total or 1) for each, row in zip(x, told, strict=True)) / total
    noise = math.hypot(*((each - mean) * (error(row) or 0) for each, row in zip(x, told, strict=True))) / total
    lengths = f"{len(told)} lengths from {short_length(told[0].S)} to {short_length(told[-1].S)}"
    words = f"t ~ S^{slope:.3f} ± {noise:.3f} over {lengths}"
    least, room = -math.inf if at_least is None else at_least, SIGMAS * noise
    if slope - room > at_most or slope + room < least:
        return False, words
    if least <= slope - room and slope + room <= at_most:
        return True, words
    return None, f"{words}: too noisy to tell"


def reads_within_budget(line: Sequence[Row], rows: Sequence[Row]) -> Answer:
    """Keys read stay within the budget, and close to it.

    reads_actual <= reads_expected in each pair that a row has; and for the decode steps of a row whose shortest length
    is past (topk - 1) * block_size, expected - actual <= block_size - 1 for a query and kv head, on average. Sums are
    over queries, kv heads and sequences; a row has batch * calls decode queries. A prefill's queries begin at length 1,
    where a budget counts blocks that are not there: of those only the first is asked.
    """
    asked = 0
    largest: float | None = None
    for row in line:
        at = f"at {short_length(row.S)}"
        for actual, expected, which in (
            (row.reads_actual, row.reads_expected, ""),
            (row.reads_actual_decode, row.reads_expected_decode, " in decode steps"),
        ):
            if actual is None or expected is None:
                continue
            asked += 1
            if actual > expected:
                return False, f"{at}{which} {actual:,} keys read, {expected:,} expected"
        block_size, topk = (_given(row, name) for name in GEOMETRY)
        decode = decode_reads(row)
        if decode and row.S - (row.calls or 0) > (topk - 1) * block_size:
            largest = max(largest or 0.0, decode[1] - decode[0])
            if decode[1] - decode[0] > block_size - 1:
                short = f"{decode[0]:,.1f} keys a query, {decode[1]:,.1f} expected"
                return False, f"{at} {short}: more than {block_size - 1} fewer"
    if not asked:
        return None, "expected rows with reads, got none"
    fewer = "" if largest is None else f"; of a decode step's query at most {largest:.1f} keys fewer"
    return True, f"in {asked} {'sum' if asked == 1 else 'sums'} of reads{fewer}"


def faster(
    line: Sequence[Row],
    rows: Sequence[Row],
    *,
    than: str,
    than_backend: str | None = None,
    by: float = 1.0,
    **given: float,
) -> Answer:
    """At every length from `from` on, t_than / t >= `by`, beyond noise; of several `than`, the fastest counts.

    With `by` 1 it has to be faster: t_than / t > 1. Broken where the ratio of medians is less at some length.
    """
    start = given.get("from", 0)
    others = [row for row in _sure(rows) if row.workload == than]
    others = [row for row in others if than_backend in (None, row.backend, asked_backend(row))]
    pairs = [(row, other) for row in _sure(line) if start <= row.S and (other := fastest(row, others))]
    if not pairs:
        what = " ".join(filter(None, [than, than_backend]))
        return None, f"expected lengths from {short_length(start)} on with a time of both it and {what}, got none"
    beyond = [(_ratio(other, row) / math.exp(SIGMAS * _error(other, row)), row, other) for row, other in pairs]
    least, row, other = min(beyond, key=lambda each: each[0])
    words = f"least {_ratio(other, row):.2f}×, at {short_length(row.S)}; {least:.2f}× beyond noise"

    def enough(ratio: float) -> bool:
        return ratio > 1 if by == 1 else ratio >= by

    if not all(enough(_ratio(other, row)) for row, other in pairs):
        return False, words
    return (True, words) if enough(least) else (None, f"{words}: too noisy to tell")


KINDS: dict[str, Kind] = {
    "follows_budget": Kind(follows_budget, {"tolerance": TWICE}),
    "crossover": Kind(crossover, {"at_most": ...}),
    "exponent": Kind(exponent, {"at_most": ..., "at_least": None, "from": None}),
    "reads_within_budget": Kind(reads_within_budget, {}),
    "faster": Kind(faster, {"than": ..., "than_backend": None, "by": 1.0, "from": 0}),
}
NUMBERS = frozenset({"tolerance", "at_most", "at_least", "by", "from"})


def _sure(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if is_timed(row) and error(row) is not None]


def _given(row: Row, name: str) -> int:
    text = parameters(row).get(name, "")
    return int(text) if text.isdecimal() else GEOMETRY[name]


def _ratio(one: Row, other: Row) -> float:
    assert one.ms_total
    assert other.ms_total
    return one.ms_total / other.ms_total


def _error(one: Row, other: Row) -> float:
    return math.hypot(error(one) or 0, error(other) or 0)
