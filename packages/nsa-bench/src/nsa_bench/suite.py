"""Suites: which workloads are measured side by side, at which points, and which trends their times must follow.

A suite is a TOML file. Its name is that of the file; those of `bench/suites` ship with the package.

```toml
about = "One decode step"                     # a line for `nsa-bench list`

[[variant]]                                   # what takes turns at every point; lists multiply
workload = "nsa.decode"
clock = ["graph", "host"]                     # on a CPU "host" alone
device = "cuda"                               # there alone; without it everywhere
backend = ["triton", "sdpa"]                  # a parameter of the workload

[[variant]]
workload = "dense.decode"
clock = "graph"

[[cuda.points]]                               # where; lists multiply
S = [8192, 65536]
batch = [1, 8]

[[cuda.quick]]                                # with --quick, instead
S = 4096

[[cpu.points]]
S = [2048, 4096]

[[trend]]                                     # see `nsa_bench.trends`
kind = "follows_budget"
workload = "nsa.decode"
```

A parameter may stand in a point or in a variant, not in both; what neither names keeps the workload's default. Those of
a point reach the workloads that have them.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from nsa_bench.workload import Value

FOLDER = Path(__file__).parent / "suites"
CLOCKS = ("graph", "events", "host")
DEVICES = ("cpu", "cuda")


class SuiteError(ValueError):
    """A suite that is not there, or not sound."""


@dataclass(frozen=True)
class Variant:
    """A workload under a clock, with the parameters that are its own; `devices` are those that it is measured on."""

    workload: str
    clock: str
    parameters: Mapping[str, Value]
    devices: tuple[str, ...] = DEVICES


@dataclass(frozen=True)
class Suite:
    """A suite's file.

    Fields:
        variants: what takes turns at each point.
        points: by device, the parameters of each point; `quick` likewise.
        trends: as the file has them; see `nsa_bench.trends`.
    """

    name: str
    about: str
    variants: tuple[Variant, ...]
    points: Mapping[str, tuple[Mapping[str, Value], ...]]
    quick: Mapping[str, tuple[Mapping[str, Value], ...]]
    trends: tuple[Mapping[str, Any], ...] = ()


def shipped() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_suite(name: str) -> Suite:
    """The suite of a shipped name, or of a path that ends in `.toml`.

    Raises:
        SuiteError: there is none, or what is wrong with it.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SuiteError(f"suite: expected one of {shipped()} or a .toml file, got {name!r}") from None
    except (ValueError, OSError) as error:  # no TOML, no UTF-8, no name that a file could have
        raise SuiteError(f"{path}: {error}") from None
    return parse(path.stem, document)


def parse(name: str, document: Mapping[str, Any]) -> Suite:
    """The suite that a document describes.

    Raises:
        SuiteError: what is wrong with it.

    Example:
        >>> variant = {"workload": "nsa.prefill", "clock": "events", "backend": ["triton", "sdpa"]}
        >>> suite = parse("mine", {"about": "", "variant": [variant], "cuda": {"points": [{"S": [1024, 2048]}]}})
        >>> len(suite.variants), suite.points["cuda"]
        (2, ({'S': 1024}, {'S': 2048}))
    """
    unknown = document.keys() - {"about", "variant", "trend", *DEVICES}
    if unknown:
        raise SuiteError(f"suite {name}: expected about, variant, trend, {', '.join(DEVICES)}, got {sorted(unknown)}")
    variants = []
    for table in _tables(name, document, "variant"):
        for chosen in _multiplied(name, table):
            workload, clock = chosen.pop("workload", None), chosen.pop("clock", None)
            if not isinstance(workload, str) or clock not in CLOCKS:
                raise SuiteError(f"suite {name}: expected a workload and a clock of {list(CLOCKS)} in {table}")
            device = chosen.pop("device", None)
            if device not in (None, *DEVICES):
                raise SuiteError(f"suite {name}: expected a device of {list(DEVICES)} in {table}")
            variants.append(Variant(workload, str(clock), chosen, DEVICES if device is None else (str(device),)))
    points: dict[str, tuple[Mapping[str, Value], ...]] = {}
    quick: dict[str, tuple[Mapping[str, Value], ...]] = {}
    for device in DEVICES:
        places = document.get(device, {})
        if not isinstance(places, Mapping) or places.keys() - {"points", "quick"}:
            raise SuiteError(f"suite {name}: expected points and quick of {device}, got {places}")
        for kept, key in ((points, "points"), (quick, "quick")):
            kept[device] = tuple(
                point for table in _tables(name, places, key, required=False) for point in _multiplied(name, table)
            )
        quick[device] = quick[device] or points[device][:1]
    if not any(points.values()):
        raise SuiteError(f"suite {name}: expected points of {' or '.join(DEVICES)}, got none")
    own = {parameter for variant in variants for parameter in variant.parameters}
    for point in (point for places in (*points.values(), *quick.values()) for point in places):
        tokens = point.get("S")
        if type(tokens) is not int or tokens < 1 or own & point.keys():
            wanted = f"points with S of at least 1 and without {sorted(own)} of variants"
            raise SuiteError(f"suite {name}: expected {wanted}, got {point}")
    trends = tuple(_tables(name, document, "trend", required=False))
    return Suite(name, str(document.get("about", "")), tuple(variants), points, quick, trends)


def _tables(name: str, document: Mapping[str, Any], key: str, *, required: bool = True) -> list[Mapping[str, Any]]:
    tables = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise SuiteError(f"suite {name}: expected [[{key}]] tables, got {tables!r}")
    if required and not tables:
        raise SuiteError(f"suite {name}: expected at least one [[{key}]], got none")
    return tables


def _multiplied(name: str, table: Mapping[str, Any]) -> list[dict[str, Value]]:
    """One mapping for each combination of what the lists in a table hold."""
    choices = [value if isinstance(value, list) else [value] for value in table.values()]
    for key, values in zip(table, choices, strict=True):
        if not values or any(type(value) not in (int, str) for value in values):
            raise SuiteError(f"suite {name}: expected ints and words for {key}, got {table[key]!r}")
    return [dict(zip(table, chosen, strict=True)) for chosen in product(*choices)]
