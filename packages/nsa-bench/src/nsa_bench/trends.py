"""Trends that times must follow, declared in a suite's `[[trend]]` tables: how to read and ask them.

Keys of every table: `kind`; `workload`, which it is about; and, to look at some rows only, `backend` (asked for or
run), `clock`, `device` ("cpu" or "cuda"). Each kind has keys of its own, see `nsa_bench.trend_kinds`.

```toml
[[trend]]
kind = "follows_budget"       # decode time grows like the budget, not like S
workload = "nsa.decode"
clock = "graph"
tolerance = 0.5               # by which growth may exceed that of the budget

[[trend]]
kind = "crossover"            # from which length on it is faster than dense attention
workload = "nsa.decode"
at_most = 16384

[[trend]]
kind = "exponent"             # p of t ~ S^p
workload = "nsa.prefill"
at_most = 1.3
at_least = 0.5                # optional
from = 8192                   # optional: every length

[[trend]]
kind = "reads_within_budget"
workload = "nsa.decode"

[[trend]]
kind = "faster"
workload = "nsa.decode"
backend = "triton"
than = "nsa.decode"
than_backend = "sdpa"         # optional
by = 2.0                      # optional: 1
from = 32768                  # optional: every length
```
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_bench.measurements import asked_backend, by_series, is_timed, labels, on_cpu
from nsa_bench.schema import Row
from nsa_bench.suite import CLOCKS, DEVICES
from nsa_bench.trend_kinds import KINDS, NUMBERS

COMMON = ("kind", "workload", "backend", "clock", "device")


class TrendError(ValueError):
    """A `[[trend]]` table that is not sound."""


@dataclass(frozen=True)
class Trend:
    """A table, read.

    Fields:
        kind: of KINDS.
        workload, backend, clock, device: whose rows it is asked of; "" is any.
        options: the kind's own keys, with its defaults.
    """

    kind: str
    workload: str
    backend: str
    clock: str
    device: str
    options: Mapping[str, Any]

    def admits(self, row: Row) -> bool:
        """It is asked of this row."""
        return (
            row.workload == self.workload
            and self.backend in ("", row.backend, asked_backend(row))
            and self.clock in ("", row.clock)
            and self.device in ("", "cpu" if on_cpu(row) else "cuda")
        )

    def __str__(self) -> str:
        given = {key: value for key, value in self.options.items() if value is not None}
        options = [f"{key} {value:g}" if key in NUMBERS else f"{key} {value}" for key, value in given.items()]
        return ", ".join([self.kind, *options])


@dataclass(frozen=True)
class Verdict:
    """What a trend says of one series.

    Fields:
        subject: the series in words.
        holds: None where there is nothing to say.
        words: why, with the numbers.
    """

    trend: Trend
    subject: str
    holds: bool | None
    words: str


def parse_trend(table: Mapping[str, Any]) -> Trend:
    """A trend from its table.

    Raises:
        TrendError: what is wrong with it.

    Example:
        >>> print(parse_trend({"kind": "crossover", "workload": "nsa.decode", "at_most": 16384}))
        crossover, at_most 16384
    """
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise TrendError(f"trend: expected a kind of {', '.join(KINDS)}, got {kind!r}")
    own = KINDS[kind].keys
    unknown = table.keys() - set(COMMON) - own.keys()
    if unknown:
        known = ", ".join([*COMMON, *own])
        raise TrendError(f"trend {kind}: expected keys of {known}, got {', '.join(sorted(unknown))}")
    for key in ("workload", "backend", "clock", "device", "than", "than_backend"):
        if key in table and (not isinstance(table[key], str) or not table[key]):
            raise TrendError(f"trend {kind}: expected a word for {key}, got {table[key]!r}")
    if "workload" not in table:
        raise TrendError(f"trend {kind}: expected workload, got {', '.join(table)}")
    for key, values in (("clock", CLOCKS), ("device", DEVICES)):
        if key in table and table[key] not in values:
            raise TrendError(f"trend {kind}: expected {key} of {', '.join(values)}, got {table[key]!r}")
    for key in table.keys() & NUMBERS:
        if type(table[key]) not in (int, float) or not 0 <= table[key] < math.inf:
            raise TrendError(f"trend {kind}: expected a number of at least 0 for {key}, got {table[key]!r}")
    options = {key: table.get(key, default) for key, default in own.items()}
    missing = [key for key, value in options.items() if value is ...]
    if missing:
        raise TrendError(f"trend {kind}: expected {', '.join(missing)}, got {', '.join(table)}")
    filters = {key: table.get(key, "") for key in ("workload", "backend", "clock", "device")}
    return Trend(kind, **filters, options=options)


def ask(trend: Trend, rows: Sequence[Row]) -> list[Verdict]:
    """The verdicts of a trend, one for each series of one run that it admits.

    Series of which there is nothing to say, most often because they have one length only, are left out where there is
    something to say of others; where there is nothing to say of any, they say why. Without a series there is one
    verdict, which says so.
    """
    admitted = [row for row in rows if trend.admits(row)]
    if not admitted:
        what = " ".join(filter(None, [trend.workload, trend.backend, trend.clock, trend.device]))
        return [Verdict(trend, what, None, "no row of it")]
    names = dict(zip(map(id, admitted), labels(admitted, clock=True), strict=True))
    # Batch and heads are part of a series' name where they tell series apart.
    shape = ("batch", "num_heads", "num_kv_heads", "head_dim", "dtype", "device", "commit")
    differ = [name for name in shape if len({getattr(row, name) for row in admitted}) > 1]
    verdicts = []
    for line in by_series(admitted):
        subject = ", ".join([names[id(line[0])], *(f"{name} {getattr(line[0], name)}" for name in differ)])
        if not any(map(is_timed, line)):
            holds, words = None, f"no time: {' '.join(line[0].status.split())}"
        else:
            holds, words = KINDS[trend.kind].ask(line, rows, **trend.options)
        verdicts.append(Verdict(trend, subject, holds, words))
    return [verdict for verdict in verdicts if verdict.holds is not None] or verdicts
