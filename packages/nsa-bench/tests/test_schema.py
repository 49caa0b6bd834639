"""Is a file what the documentation says, and does reading give back what was written?"""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nsa_bench import schema
from nsa_bench.schema import COLUMNS, IDENTITY, PROVENANCE, Row, SchemaError

LEGACY = "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected,reads_actual_decode,reads_expected_decode"
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8)
NUMBERS = st.floats(1e-6, 1e15).map(lambda x: float(f"{x:.6g}"))
ROWS = st.builds(
    Row,
    S=st.integers(1, 2**40),
    ms_total=st.none() | NUMBERS,
    reads_actual=st.none() | st.integers(0, 2**62),
    flops=st.none() | NUMBERS,
    status=TEXT,
    check=TEXT,
    parameters=TEXT,
    device=TEXT,
)


def test_the_columns_begin_as_they_always_did() -> None:
    assert ",".join(COLUMNS).startswith(f"{LEGACY},ms_slc_win,")
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert {*IDENTITY, *PROVENANCE} < set(COLUMNS)


def test_every_column_is_documented() -> None:
    words = Row.__doc__ or ""
    assert [name for name in COLUMNS if name not in words] == []


@given(rows=st.lists(ROWS, max_size=4))
def test_reading_gives_back_what_was_written(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    schema.write(path, rows)
    assert schema.read(path) == rows


def test_a_file_is_readable_by_whoever_reads_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    schema.write(path, [Row(64, 1.23456789, reads_actual=12345678901, check='said "ok", twice')])
    (cells,) = csv.DictReader(path.read_text().splitlines())
    assert (cells["S"], cells["ms_total"], cells["ms_cmp"]) == ("64", "1.23457", "")
    assert (cells["reads_actual"], cells["check"], cells["schema"]) == ("12345678901", 'said "ok", twice', "1")
    assert path.stat().st_mode & 0o777 == 0o644


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    schema.write(path, [Row(1)])
    before = path.read_bytes()

    def broken() -> object:
        yield Row(2)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        schema.write(path, broken())  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


GOOD = f"{LEGACY},schema\n64,1.5,,,,,,,,1\n"
BAD = {
    "": "expected columns",
    "a,b\n1,2\n": "expected columns",
    GOOD.replace("schema", "scheme"): "expected columns",
    GOOD.replace("S,ms_total", "ms_total,S"): "expected columns",
    GOOD.replace(",1\n", ",2\n"): "schema 1, got 2",
    GOOD.replace("64,", ",", 1): "line 2: expected S",
    GOOD.replace("1.5", "fast"): "line 2, ms_total: expected float, got 'fast'",
    GOOD.replace("1.5", "-1.5"): "line 2, ms_total: expected a finite number of at least 0, got '-1.5'",
    GOOD.replace("1.5", "nan"): "line 2, ms_total: expected a finite number",
    GOOD.replace("1.5", "inf"): "line 2, ms_total: expected a finite number",
    GOOD.replace("64,", "-64,", 1): "line 2, S: expected a finite number",
    GOOD.replace("64,", "0,", 1): "line 2: expected S",
    GOOD.replace("1.5", "1" * 200_000): "expected CSV, got: field larger",
    GOOD.replace("1.5", "1.5,7"): "as many cells",
    GOOD.replace(",,,,1\n", ",1\n"): "as many cells",
}


def test_columns_may_be_missing_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(GOOD)
    assert schema.read(path) == [Row(64, 1.5)]


@pytest.mark.parametrize(("text", "words"), BAD.items())
def test_other_files_are_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(SchemaError, match=words) as caught:
        schema.read(path)
    assert str(path) in str(caught.value)
