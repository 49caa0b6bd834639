"""The CSV files: which columns they have, what a row means, reading and writing.

One schema serves all suites. It begins with the columns that decode and prefill tables of this kind always had, so that
whoever reads those reads these; a column about which a row has nothing to say is blank. `SCHEMA` is the version: it
goes up when a column changes its meaning or leaves, not when one is added at the end.
"""

import csv
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

SCHEMA = 1

# How the legacy columns are called; the others are named like their fields.
PREFIX = (
    "S",
    "ms_total",
    "ms_cmp",
    "ms_sel",
    "ms_win",
    "reads_actual",
    "reads_expected",
    "reads_actual_decode",
    "reads_expected_decode",
)
IDENTITY = (  # of a measurement: what was run, under which clock
    *("suite", "workload", "clock", "S", "batch", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "dtype"),
    "parameters",
)
PROVENANCE = ("device", "python", "torch", "triton", "flash_attn", "cudnn", "packages", "commit", "flags")
OK = "ok"


@dataclass(frozen=True)
class Row:
    """One measurement. None is a blank cell.

    Fields:
        S: context length in tokens.
        ms_total: of one call (a decode step, a prefill, an operation), median, in milliseconds; None where `status` is
            not "ok".
        ms_cmp, ms_sel, ms_win: of it the branches, from their own kernels: compressed (with it the choice of blocks
            where `ms_choice` is blank, and in a decode step what stores the new tokens), selected, window. They need
            not sum up to `ms_total`: kernels overlap.
        reads_actual, reads_expected: keys read, counted from real block indices, and the budget
            num_cmp(S) + topk * block_size + min(window_size, S), summed over queries, kv heads and sequences, over the
            prefill and all decode steps of the row.
        reads_actual_decode, reads_expected_decode: the same over the timed decode steps alone.
        ms_slc_win: selected blocks and window where they run fused; then `ms_sel` and `ms_win` are blank.
        ms_choice, ms_compress, ms_combine: choice of blocks, pooling of k and v, sum by gates, where they have kernels
            of their own.
        p25_ms, p75_ms: quartiles of `ms_total`.
        repeats: how many samples.
        calls: how many different calls a sample has (decode steps at growing lengths).
        status: "ok", or "refused: ...", "wrong: ...", "failed: ...": then there is no time.
        check: what the comparison with the oracle said.
        suite, workload, clock: what was run. clock: "graph" (CUDA graph replay), "events" (CUDA events, L2 written over
            before each call) or "host" (wall time of a call from Python, the device waited for).
        batch, num_heads, num_kv_heads, head_dim, v_head_dim, dtype: as the workload has them. A blank v_head_dim is
            head_dim.
        parameters: its other parameters, `name=value` joined by spaces, in the order of their names.
        backend, why: what ran, and why: it was requested, or planned.
        profile, preset: of the plan.
        flops, bytes: of one call: what it has to compute, and to move at least, each tensor once.
        ceiling_flops, ceiling_bandwidth: a second, of this machine, measured in the same run.
        floor_ms: max(flops / ceiling_flops, bytes / ceiling_bandwidth), in milliseconds.
        device, python, torch, triton, flash_attn, cudnn, packages, commit: what it ran on; packages: of this family.
        flags: `NSA_*` variables that were set, `NAME=value` joined by spaces, in the order of their names.
        date: ISO.
        schema: version of the columns.
    """

    S: int
    ms_total: float | None = None
    ms_cmp: float | None = None
    ms_sel: float | None = None
    ms_win: float | None = None
    reads_actual: int | None = None
    reads_expected: int | None = None
    reads_actual_decode: int | None = None
    reads_expected_decode: int | None = None
    ms_slc_win: float | None = None
    ms_choice: float | None = None
    ms_compress: float | None = None
    ms_combine: float | None = None
    p25_ms: float | None = None
    p75_ms: float | None = None
    repeats: int | None = None
    calls: int | None = None
    status: str = OK
    check: str = ""
    suite: str = ""
    workload: str = ""
    clock: str = ""
    batch: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    dtype: str = ""
    parameters: str = ""
    backend: str = ""
    why: str = ""
    profile: str = ""
    preset: str = ""
    flops: float | None = None
    bytes: float | None = None
    ceiling_flops: float | None = None
    ceiling_bandwidth: float | None = None
    floor_ms: float | None = None
    device: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    flash_attn: str = ""
    cudnn: str = ""
    packages: str = ""
    commit: str = ""
    flags: str = ""
    date: str = ""
    schema: int = SCHEMA

    @property
    def identity(self) -> tuple[Any, ...]:
        """What was run: the same in two files if the same was measured."""
        return tuple(getattr(self, name) for name in IDENTITY)

    @property
    def provenance(self) -> tuple[str, ...]:
        """On what it was run."""
        return tuple(getattr(self, name) for name in PROVENANCE)


COLUMNS = tuple(field.name for field in fields(Row))
assert COLUMNS[: len(PREFIX)] == PREFIX


class SchemaError(ValueError):
    """A file that is no such table."""


def read(path: Path) -> list[Row]:
    """The rows of a file, in its order. Columns that were added later may be missing, none may be unknown.

    Raises:
        SchemaError: the file does not begin with the columns of `PREFIX`, has unknown ones, another schema version, or
            a cell that is not of its column's type, or a number that is negative or not finite.
        OSError: there is no such file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            names = tuple(reader.fieldnames or ())
            unknown = [name for name in names if name not in COLUMNS]
            if names[: len(PREFIX)] != PREFIX or unknown:
                raise SchemaError(f"{path}: expected columns {','.join(PREFIX)},..., got {','.join(names) or 'none'}")
            return [_row(path, reader.line_num, cells) for cells in reader]
        except csv.Error as error:
            raise SchemaError(f"{path}, line {reader.line_num}: expected CSV, got: {error}") from None


def check_writable(path: Path) -> None:
    """A file can be written beside `path`, and moved there.

    Raises:
        OSError: it cannot.
    """
    descriptor, name = tempfile.mkstemp(prefix=".nsa-bench-", suffix=".csv", dir=path.parent)
    os.close(descriptor)
    Path(name).unlink()


def write(path: Path, rows: Iterable[Row]) -> None:
    """All of the file or nothing: it is written beside its place, then moved there."""
    descriptor, name = tempfile.mkstemp(prefix=".nsa-bench-", suffix=".csv", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({column: _cell(getattr(row, column)) for column in COLUMNS} for row in rows)
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def parameters_text(parameters: Mapping[str, object]) -> str:
    """Parameters that have no column of their own, as the column `parameters` has them.

    Example:
        >>> parameters_text({"S": 64, "topk": 8, "backend": "sdpa"})
        'backend=sdpa topk=8'
    """
    return " ".join(f"{name}={value}" for name, value in sorted(parameters.items()) if name not in IDENTITY)


_TYPES = {field.name: (get_args(field.type) or (field.type,))[0] for field in fields(Row)}


def _row(path: Path, line: int, cells: Mapping[str, str | None]) -> Row:
    values = {}
    for name, text in cells.items():
        kind = _TYPES.get(name)
        if text is None or kind is None:
            raise SchemaError(f"{path}, line {line}: expected as many cells as columns")
        if text == "" and kind is not str:
            continue
        try:
            value = values[name] = kind(text)
        except ValueError:
            raise SchemaError(f"{path}, line {line}, {name}: expected {kind.__name__}, got {text!r}") from None
        if kind is not str and not 0 <= value < math.inf:
            raise SchemaError(f"{path}, line {line}, {name}: expected a finite number of at least 0, got {text!r}")
    if values.get("schema") != SCHEMA or not values.get("S"):
        raise SchemaError(f"{path}, line {line}: expected S and schema {SCHEMA}, got {values.get('schema')}")
    return Row(**values)


def _cell(value: object) -> object:
    """Six digits: more than any clock has."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
