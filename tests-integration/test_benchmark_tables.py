"""Are the tables of docs/benchmarks.md and of the README those of the files in bench/results?"""

import re
from collections.abc import Callable, Iterator

import pytest
from nsa_bench.measurements import is_anchor, is_timed, parameters
from nsa_bench.schema import Row, read
from pages import ROOT

RESULTS = ROOT / "bench" / "results"
Cells = list[str]


def rows_of(name: str) -> list[Row]:
    return [row for row in read(RESULTS / f"{name}-h200-2026-11-29.csv") if is_timed(row)]


def ms(rows: list[Row]) -> float:
    """Of the fastest."""
    return min(row.ms_total for row in rows if row.ms_total is not None)


def tables(page: str) -> list[list[Cells]]:
    """Rows of cells of each table, headings first."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^(\|.*\n)\|[ -|]*\n((?:\|.*\n)+)", text, re.MULTILINE)
    lines = [(head + body).splitlines() for head, body in found]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in lines]


def table(page: str, *head: str) -> list[list[Cells]]:
    """The bodies of the tables that have these headings."""
    return [rows for first, *rows in tables(page) if tuple(first) == head]


def at(label: str, rows: list[Row]) -> list[Row]:
    """By the clock "graph" at the point that a first cell names: of 8 decoded sequences, or one, and 64 and 4 heads."""
    tokens = int(re.findall(r"[\d,]*\d", re.sub(r"\d+ sequences? of", "", label))[0].replace(",", ""))
    batch = int(found[1]) if (found := re.search(r"(\d+) sequence", label)) else 8
    heads = found.groups() if (found := re.search(r"(\d+) query and (\d+) kv", label)) else ("64", "4")
    there = [row for row in rows if row.clock == "graph" and tokens == row.S]
    there = [row for row in there if (row.num_heads, row.num_kv_heads) == tuple(map(int, heads))]
    return [row for row in there if row.batch == (batch if row.suite == "bench_decode" else 1)]


def ours(rows: list[Row], backend: str, inputs: str | None = None) -> float:
    wanted = {"backend": backend, **({"inputs": inputs} if inputs else {})}
    return ms([row for row in rows if not is_anchor(row) and wanted.items() <= parameters(row).items()])


def dense(rows: list[Row]) -> float:
    return ms([row for row in rows if is_anchor(row)])


def agree(shown: str, values: list[float]) -> bool:
    """Numbers of a cell are these, rounded to the digits that it has, or to three where those are more."""
    numbers = re.findall(r"[\d.]+", shown.replace(",", "") if len(values) == 1 else shown)
    assert len(numbers) == len(values), shown
    digits = [len(number.replace(".", "").lstrip("0")) for number in numbers]
    return all(float(n) == float(f"{v:.{d}g}") for n, v, d in zip(numbers, values, digits, strict=True))


def decoding(rows: list[Row]) -> Iterator[list[float]]:
    mine, other = ours(rows, "auto"), dense(rows)
    yield from ([mine], [other], [other / mine])


def whole(smooth_by: str) -> Callable[[list[Row]], Iterator[list[float]]]:
    def cells(rows: list[Row]) -> Iterator[list[float]]:
        random, smooth, other = ours(rows, "auto", "random"), ours(rows, smooth_by, "smooth"), dense(rows)
        yield from ([random], [smooth], [other], [other / random, other / smooth])

    return cells


H200 = ("tokens", "NSA, random", "NSA, smooth", "dense", "speed over dense")


@pytest.mark.parametrize(
    ("body", "name", "cells"),
    [
        (table("docs/benchmarks.md", "tokens", "NSA", "dense", "NSA's speed over dense")[0], "decode", decoding),
        (table("docs/benchmarks.md", *H200)[0], "prefill", whole("triton")),
        (table("docs/benchmarks.md", *H200)[1], "train", whole("auto")),
    ],
    ids=["decode", "prefill", "train"],
)
def test_the_tables_of_one_h200(
    body: list[Cells], name: str, cells: Callable[[list[Row]], Iterator[list[float]]]
) -> None:
    rows = rows_of(name)
    assert len(body) > 5
    for label, *shown in body:
        expected = list(cells(at(label, rows)))
        assert len(shown) == len(expected)
        assert [s for s, e in zip(shown, expected, strict=True) if not agree(s, e)] == [], (label, expected)


def test_the_table_of_the_readme() -> None:
    (body,) = table("README.md", "", "NSA", "dense", "NSA's speed over dense")
    files = {"decode step": "decode", "prefill": "prefill", "forward and backward": "train"}
    assert {label.partition(",")[0] for label, *_ in body} == files.keys()
    for label, *shown in body:
        what, _, where = label.partition(", ")
        rows = at(where, rows_of(files[what]))
        mine = ours(rows, "auto", None if what == "decode step" else "random")
        expected = [[mine], [dense(rows)], [dense(rows) / mine]]
        assert [s for s, e in zip(shown, expected, strict=True) if not agree(s, e)] == [], (label, expected)


def test_the_tables_of_others_kernels() -> None:
    rows = rows_of("peers")

    def of(workload: str, clock: str, tokens: str) -> list[float]:
        return [ms([r for r in rows if (r.workload, r.clock, r.S) == (workload, clock, int(tokens.replace(",", "")))])]

    columns = {
        ("ours", "fla-core 0.6.0", "ours, from Python", "fla-core, from Python"): (
            *(("nsa.prefill", "graph"), ("fla.prefill", "graph")),
            *(("nsa.prefill", "events"), ("fla.prefill", "events")),
        ),
        ("ours", "fla-core 0.6.0", "native-sparse-attention-pytorch 0.2.3"): tuple(
            (f"{name}.selected_attention", "events") for name in ("triton", "fla", "nsa-pytorch")
        ),
    }
    for head, measured in columns.items():
        (body,) = table("docs/benchmarks.md", "tokens", *head)
        assert len(body) == 4
        for tokens, *shown in body:
            expected = [of(workload, clock, tokens) for workload, clock in measured]
            assert [s for s, e in zip(shown, expected, strict=True) if not agree(s, e)] == [], (tokens, expected)
