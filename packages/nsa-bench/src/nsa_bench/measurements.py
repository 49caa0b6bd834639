"""Which rows belong together, against which dense anchor a row is held, and how sure a median is.

- A *measurement* is what was run: the same in two files if the same was measured.
- A *series* is measurements of one run that differ in the context length S alone.
- A *point* is where variants took turns: one run, suite, clock, S, batch, heads, dims, dtype. Two rows at a point can
  be compared if the parameters that both have are equal, too; those that only one has (`topk`; an anchor has none) make
  it the variant it is, and so does `backend`, wherever it stands.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

from nsa_bench.schema import IDENTITY, OK, Row

ANCHOR = "dense."  # so begin the names of workloads that others are held against
PLACE = ("suite", "clock", "S", "batch", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "dtype")
# Three standard errors: of a thousand comparisons in which nothing changed, one or two seem to be slower. Quartiles of
# few samples scatter: with 11 of each it is 2 (four medians) to 3 (two), with 3 it is 2 to 9, with 5, the most, 4 to
# 12.
SIGMAS = 3.0
MEDIAN_OF_MEAN = 1.2533  # standard error of a median over that of a mean, sqrt(pi / 2)


def parameters(row: Row) -> dict[str, str]:
    """What the cell `parameters` holds, by name.

    Example:
        >>> parameters(Row(64, parameters="layer=nsa topk=8"))
        {'layer': 'nsa', 'topk': '8'}
    """
    found: dict[str, str] = {}
    name = ""
    for piece in row.parameters.split(" "):
        if "=" in piece:
            name, _, found[name] = piece.partition("=")
        elif name:
            found[name] += f" {piece}"  # a value of several words
    return found


def asked_backend(row: Row) -> str:
    """The backend that was asked for, "auto" too, where `parameters` says so; else the one that ran."""
    return parameters(row).get("backend", row.backend)


def measurement(row: Row) -> tuple[Any, ...]:
    """What was run. The backend that ran is part of it only if nothing says which one was asked for."""
    return (*row.identity, asked_backend(row))


def series(row: Row) -> tuple[Any, ...]:
    """Equal for rows of one run that differ in S alone."""
    where = IDENTITY.index("S")
    key = measurement(row)
    return (*key[:where], *key[where + 1 :], *row.provenance)


def numbered(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """Rows by measurement and number: of one that a file holds twice, where nothing tells what was asked for."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for row in rows:
        key = measurement(row)
        found[(*key, seen[key])] = row
        seen[key] += 1
    return found


def is_anchor(row: Row) -> bool:
    """Dense attention over the same tokens, which others are held against."""
    return row.workload.startswith(ANCHOR)


def is_timed(row: Row) -> bool:
    """It has a time."""
    return row.status == OK and row.ms_total is not None and 0 < row.ms_total < math.inf


def on_cpu(row: Row) -> bool:
    """Measured on a CPU: rows name devices, not kinds, but only those of a GPU name a cuDNN."""
    return not row.cudnn


def spread(row: Row) -> float | None:
    """Interquartile range of the samples over their median; None where quartiles are not known, or no quartiles."""
    if not is_timed(row) or row.p25_ms is None or row.p75_ms is None:
        return None
    assert row.ms_total is not None
    return (row.p75_ms - row.p25_ms) / row.ms_total if 0 <= row.p25_ms <= row.p75_ms < math.inf else None


@cache
def expected_iqr(samples: int) -> float:
    """Mean interquartile range of so many samples of a normal distribution of standard deviation 1.

    That of many is 1.349; of few the quartiles lie closer, 0.87 apart of three. The mean of the i-th smallest of n is
    the quantile of (i - 3/8) / (n + 1/4) (G. Blom, 1958; of three within 3 %, of five within 1 %), and quartiles are
    interpolated as `timing` does it, the lower at (n - 1) / 4 from the smallest.

    Example:
        >>> [round(expected_iqr(samples), 2) for samples in (3, 11, 1001)]
        [0.87, 1.19, 1.35]
    """
    below, between = divmod((samples - 1) / 4, 1)
    low, high = (NormalDist().inv_cdf((below + rank - 3 / 8) / (samples + 1 / 4)) for rank in (1, 2))
    return -2 * (low + between * (high - low))  # the distribution is symmetric


def error(row: Row) -> float | None:
    """Relative standard error of `ms_total`; None where quartiles or the number of samples are not known.

    sigma = IQR / expected_iqr(repeats) and se = 1.2533 * sigma / sqrt(repeats), for samples that are about normal.
    Relative errors are those of logarithms, so those of a ratio add in quadrature. It is the noise within a run: that
    machines and runs differ is not in it.

    Example:
        >>> round(error(Row(64, ms_total=2.0, p25_ms=1.9, p75_ms=2.1, repeats=100)), 4)
        0.0094
    """
    relative = spread(row)
    if relative is None or row.repeats is None or row.repeats < 2:
        return None
    return MEDIAN_OF_MEAN * relative / expected_iqr(row.repeats) / math.sqrt(row.repeats)


def point(row: Row) -> tuple[Any, ...]:
    """Where it was measured: equal for variants that took turns."""
    return (*(getattr(row, name) for name in PLACE), *row.provenance)


def comparable(one: Row, other: Row) -> bool:
    """They stand at one point, and the parameters that both have are equal."""
    if point(one) != point(other):
        return False
    mine = parameters(one)
    return all(mine.get(name, value) == value for name, value in parameters(other).items() if name != "backend")


def fastest(row: Row, others: Iterable[Row]) -> Row | None:
    """Of others that have a time and can be compared with a row, the fastest."""
    there = [other for other in others if is_timed(other) and comparable(row, other)]
    return min(there, key=lambda other: other.ms_total or math.inf, default=None)


def anchors_for(workload: str, rows: Iterable[Row]) -> list[Row]:
    """The anchors that a workload is held against: its namesakes; without any, all.

    Example:
        >>> names = ["dense.decode", "dense.decode.flash-attn", "dense.prefill"]
        >>> [row.workload for row in anchors_for("nsa.decode", [Row(64, workload=name) for name in names])]
        ['dense.decode', 'dense.decode.flash-attn']
        >>> [row.workload for row in anchors_for(names[1], [Row(64, workload=name) for name in names])]
        ['dense.decode', 'dense.decode.flash-attn']
    """
    anchors = [row for row in rows if is_anchor(row)]
    namesake = ANCHOR + workload.split(".")[1] if "." in workload else workload
    return [row for row in anchors if f"{row.workload}.".startswith(f"{namesake}.")] or anchors


def by_series(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows in series, each ordered by S; series in the order of their first rows.

    What a file holds twice under one name makes two series.
    """
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for key, row in numbered(rows).items():
        found[(*series(row), key[-1])].append(row)
    return [sorted(each, key=lambda row: row.S) for each in found.values()]


def own_parameters(rows: Sequence[Row]) -> list[str]:
    """For each row its parameters that are not the same in all rows of its workload, the backend aside.

    Example:
        >>> own_parameters([Row(64, parameters=f"backend=sdpa layer=nsa topk={n}") for n in (8, 16)])
        ['topk=8', 'topk=16']
    """
    names: dict[str, set[str]] = defaultdict(set)
    values: dict[tuple[str, str], set[str | None]] = defaultdict(set)
    given = [parameters(row) for row in rows]
    for row, own in zip(rows, given, strict=True):
        names[row.workload] |= own.keys() - {"backend"}
    for row, own in zip(rows, given, strict=True):
        for name in names[row.workload]:
            values[row.workload, name].add(own.get(name))
    return [
        " ".join(f"{name}={value}" for name, value in own.items() if len(values.get((row.workload, name), ())) > 1)
        for row, own in zip(rows, given, strict=True)
    ]


def labels(rows: Sequence[Row], *, clock: bool = False) -> list[str]:
    """A name for what each row ran, as short as tells them apart: workload, backend, parameters that differ.

    Args:
        clock: add it where there are several.

    Example:
        >>> asked = [Row(64, workload="nsa.decode", backend="sdpa", parameters=f"topk={n}") for n in (8, 16)]
        >>> labels(asked)
        ['nsa.decode sdpa topk=8', 'nsa.decode sdpa topk=16']
    """
    clocks = {row.clock for row in rows} if clock else set()
    words = [
        " ".join(filter(None, [row.workload, _backend(row), own, row.clock if len(clocks) > 1 else ""]))
        for row, own in zip(rows, own_parameters(rows), strict=True)
    ]
    # Two rows of one measurement: only who decided, or the order, tells them apart.
    numbers = [number for *_, number in numbered(rows)]
    return [
        f"{word} ({row.why or f'no. {number + 1}'})" if number else word
        for word, row, number in zip(words, rows, numbers, strict=True)
    ]


def _backend(row: Row) -> str:
    asked = asked_backend(row)
    if row.workload.endswith(f".{asked}"):  # "dense.decode.flash-attn" says it already
        return ""
    return f"{asked}→{row.backend}" if row.backend and asked != row.backend else asked


def device_words(rows: Iterable[Row]) -> str:
    """What rows were measured on, in one line: device, versions, commit, date."""
    rows = list(rows)

    def of(name: str, prefix: str = "") -> str:
        found = sorted({getattr(row, name) for row in rows} - {""})
        return prefix + ", ".join(found) if found else ""

    dates = sorted({row.date[:10] for row in rows} - {""})
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    commits = sorted({short_commit(row.commit) for row in rows} - {""})
    made = f"commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits" if commits else ""
    parts = [of("device"), of("torch", "torch "), of("triton", "triton "), of("flash_attn", "flash-attn ")]
    parts += [of("cudnn", "cuDNN "), made, days]
    return " · ".join(filter(None, parts))


def short_commit(commit: str, digits: int = 10) -> str:
    """A commit's first digits, and "+" where there were changes that it does not have.

    Example:
        >>> short_commit("9705f96abcde+", 7)
        '9705f96+'
    """
    return commit.removesuffix("+")[:digits] + "+" * commit.endswith("+")


def short_length(tokens: float) -> str:
    """A context length as people say it.

    Example:
        >>> [short_length(S) for S in (512, 8192, 131072, 1048576, 3000)]
        ['512', '8k', '128k', '1M', '3000']
    """
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit:.0f}{letter}"
    return f"{tokens:.0f}"
