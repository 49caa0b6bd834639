"""The summary of a file: for each row its time beside the fastest dense anchor, its reads beside the budget, its floor.

```
speed-up = ms_total of the fastest dense anchor at the point / ms_total
floor    = floor_ms / ms_total                     share of what this machine could do at best
budget   = reads_actual / reads_expected           of the timed decode steps where a row has them
```
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nsa_bench.measurements import anchors_for, device_words, fastest, is_timed, labels, spread
from nsa_bench.schema import OK, Row


@dataclass(frozen=True)
class Line:
    """A row, read. None: the row does not say.

    Fields:
        label: workload, backend, parameters that differ.
        row: what it was made from.
        spread: interquartile range over median.
        speedup: against the fastest dense anchor at the point.
        reads: keys that a query reads from one kv head's cache in a decode step, on average; for rows without decode
            steps the sum that the row has.
        budget: share of the budget that reads take up.
        floor: share of the floor in the time.
    """

    label: str
    row: Row
    spread: float | None
    speedup: float | None
    reads: float | None
    budget: float | None
    floor: float | None


def summarise(rows: Sequence[Row]) -> list[Line]:
    """Lines ordered by suite, clock, heads, dims, dtype, batch and S; at one point in the order of the rows.

    Example:
        >>> at = {"S": 64, "status": "ok"}
        >>> rows = [Row(**at, ms_total=3.0, workload="dense.decode"), Row(**at, ms_total=2.0, workload="nsa.decode")]
        >>> [line.speedup for line in summarise(rows)]
        [1.0, 1.5]
    """
    lines = [_line(label, row, rows) for label, row in zip(labels(rows), rows, strict=True)]
    return sorted(lines, key=lambda line: _place(line.row))


def decode_reads(row: Row) -> tuple[float, float] | None:
    """(actual, expected) keys of one query and kv head in a decode step; None for a row without decode steps.

    Sums over queries, kv heads and sequences are divided by their number: batch * calls queries, num_kv_heads heads.
    """
    if row.reads_actual_decode is None or row.reads_expected_decode is None:
        return None
    if not (row.batch and row.calls and row.num_kv_heads):
        return None
    queries = row.batch * row.calls * row.num_kv_heads
    return row.reads_actual_decode / queries, row.reads_expected_decode / queries


def headings(lines: Sequence[Line]) -> list[str]:
    """What holds for all lines: where they were measured, what they have in common, how many have no time."""
    rows = [line.row for line in lines]
    common = {
        name: {str(getattr(row, name)) for row in rows} - {"", "None"}
        for name in ("suite", "profile", "preset", "clock", "dtype", "num_heads", "num_kv_heads", "head_dim")
    }
    said = ", ".join(f"{name} {next(iter(values))}" for name, values in common.items() if len(values) == 1)
    lost = Counter(row.status.partition(":")[0] for row in rows if row.status != OK)
    counts = ", ".join(f"{count} {word}" for word, count in sorted(lost.items()))
    return [text for text in (device_words(rows), said, f"without a time: {counts}" if lost else "") if text]


def cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """The table in words: its columns, and its lines. A column that would say one thing only is among the headings."""
    several = {
        name: len({getattr(line.row, name) for line in lines}) > 1
        for name in ("suite", "clock", "num_heads", "num_kv_heads", "head_dim", "dtype")
    }
    columns = [name for name in ("suite", "clock", "dtype") if several[name]]
    heads = several["num_heads"] or several["num_kv_heads"] or several["head_dim"]
    names = [*columns, "S", "batch", *(["heads"] if heads else []), "variant", "ms", "spread", "speed-up"]
    names += ["reads", "of budget", "of floor", "status"]
    table = []
    for line in lines:
        row = line.row
        shape = f"{_integer(row.num_heads)}/{_integer(row.num_kv_heads)}×{_integer(row.head_dim)}"
        table.append(
            [
                *(getattr(row, name) for name in columns),
                str(row.S),
                _integer(row.batch),
                *([shape] if heads else []),
                line.label,
                f"{row.ms_total:.4g}" if is_timed(row) else "-",
                _percent(line.spread, "±"),
                "-" if line.speedup is None else f"{line.speedup:.2f}×",
                "-" if line.reads is None else f"{line.reads:,.0f}",
                "-" if line.budget is None else f"{line.budget:.1%}",
                _percent(line.floor),
                " ".join(row.status.split()),
            ]
        )
    return names, table


def markdown(columns: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    """A table for a README.

    Example:
        >>> print(markdown(["S", "ms"], [["64", "1.5"]]))
        | S | ms |
        | --- | --- |
        | 64 | 1.5 |
    """
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in line] for line in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(label: str, row: Row, rows: Sequence[Row]) -> Line:
    decode = decode_reads(row)
    reads, expected = decode or (row.reads_actual, row.reads_expected)
    share = None if reads is None or not expected else reads / expected
    if not is_timed(row):
        return Line(label, row, None, None, reads, share, None)
    anchor = fastest(row, anchors_for(row.workload, rows))
    assert row.ms_total is not None
    speedup = None if anchor is None or anchor.ms_total is None else anchor.ms_total / row.ms_total
    floor = None if row.floor_ms is None else row.floor_ms / row.ms_total
    return Line(label, row, spread(row), speedup, reads, share, floor)


def _place(row: Row) -> tuple[object, ...]:
    sizes = (row.num_heads, row.num_kv_heads, row.head_dim, row.v_head_dim)
    return (row.suite, row.clock, *(size or 0 for size in sizes), row.dtype, row.batch or 0, row.S)


def _integer(value: int | None) -> str:
    return "-" if value is None else str(value)


def _percent(share: float | None, sign: str = "") -> str:
    return "-" if share is None else f"{sign}{share:.1%}" if share < 0.1 else f"{sign}{share:.0%}"
