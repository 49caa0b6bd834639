"""Does the documentation say what the code says?"""

import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterable

import pytest
import typer
from nsa.layer_statistics import SUMS, summary
from nsa_bench import cli, plotting, runner, trend_kinds
from nsa_bench.schema import COLUMNS
from nsa_bench.suite import CLOCKS, DEVICES, parse, shipped
from nsa_bench.trends import parse_trend
from nsa_bench.workload import load_workloads
from nsa_routing.profile import Threshold
from pages import PAGES, ROOT

TABLES = ROOT / ".github" / "scripts" / "routing_tables.py"


def test_the_tables_of_the_routing_page_are_those_of_the_code() -> None:
    done = subprocess.run([sys.executable, TABLES, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("versions", [None, "torch 2.11.0, cuDNN 9.19.0"])
def test_the_table_of_thresholds_says_where_a_number_comes_from(versions: str | None) -> None:
    source = runpy.run_path(str(TABLES))["source"]
    measured = {"date": "2026-11-22", "gpu": "H100", "csv": "sm90.csv", "versions": versions}
    expected = ["2026-11-22, H100", *filter(None, [versions]), "sm90.csv"]
    assert source(Threshold.model_validate({"measured": measured})) == ", ".join(expected)


def test_the_table_of_numbers_has_every_number() -> None:
    """Of a layer, as `summary` names them once everything happened, and of the process."""
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))
    named = set(re.findall(r"`([a-z_]+)[.`<]", rows))
    found = {name.partition(".")[0] for name in summary([1.0] * len(SUMS), 1)}
    assert found | {"module", "route", "compiled", "failures", "closed"} <= named


def table(section: str) -> list[list[str]]:
    """Cells of the tables of a section of docs/benchmarks.md, without headings."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| `")]


def named(section: str) -> list[str]:
    """What the first cells of these tables name, in their order."""
    return [name for cells in table(section) for name in re.findall(r"`([^`]+)`", cells[0])]


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("Suites", shipped()),
        ("Trends", trend_kinds.KINDS),
        ("Plots", plotting.KINDS),
        ("How a number comes about", CLOCKS),
    ],
)
def test_the_tables_of_the_benchmarks_page_name_all_that_there_is(section: str, names: Iterable[str]) -> None:
    assert sorted(named(section)) == sorted(names)


def test_the_benchmarks_page_has_every_column_in_its_place() -> None:
    assert named("The file") == list(COLUMNS)


def test_the_benchmarks_page_has_every_command() -> None:
    said = {words.split()[1] for words in named("What nsa-bench is")}
    assert said == typer.main.get_command(cli.app).commands.keys()  # type: ignore[attr-defined]


def test_the_benchmarks_page_has_every_key_of_a_trend() -> None:
    said = {cells[0].strip("`"): set(re.findall(r"`([^`]+)`", cells[1])) for cells in table("Trends")}
    assert said == {name: {*kind.keys} for name, kind in trend_kinds.KINDS.items()}


def test_the_benchmarks_page_has_every_workload() -> None:
    """By name, or with those of its backend."""
    said, (found, _) = named("Workloads"), load_workloads()
    assert [name for name in found if name not in said and f"{name.partition('.')[0]}.*" not in said] == []


def test_the_suite_of_the_benchmarks_page_is_one() -> None:
    """It is read, its trends too, and there is something to measure."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    documents = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert documents
    for document in documents:
        suite = parse("page", tomllib.loads(document))
        assert {parse_trend(trend).kind for trend in suite.trends} == trend_kinds.KINDS.keys()
        for device in DEVICES:
            assert runner.points_of(suite, load_workloads()[0], device)
            assert runner.points_of(suite, load_workloads()[0], device, quick=True)


DOCSTRINGS = {path.relative_to(ROOT / "packages").as_posix(): path for path in ROOT.glob("packages/*/src/**/*.py")}
FENCED = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("module", [name for name, path in DOCSTRINGS.items() if "```" in path.read_text()])
def test_fenced_blocks_of_docstrings_are_suites_or_figures(module: str) -> None:
    """The site shows them. What Python can run stands behind `>>>` there, as a doctest."""
    blocks = FENCED.findall(DOCSTRINGS[module].read_text(encoding="utf-8"))
    assert blocks
    for language, text in blocks:
        assert language in ("toml", ""), f"{language}: nothing runs it in a docstring"
        if language == "toml":
            document = tomllib.loads(text)
            trends = parse("docstring", document).trends if "variant" in document else document.get("trend", [])
            assert all(parse_trend(trend).kind for trend in trends)
        else:
            assert not re.search(r"^ *(\$|>>>|import|from) ", text, re.MULTILINE)


# What is public without being in the `__all__` of its package: modules, and names of modules.
PUBLIC = {
    "nsa": {"prometheus", "reads"},
    "nsa_varlen": {"decode_testing", "testing"},
    "nsa_routing": {
        *("backends", "tuning"),
        *("profile.Denial", "profile.Lengths", "profile.Measurement", "profile.Threshold"),
    },
    "nsa_kernels_triton": set(),
    "nsa_fa2": {"testing"},
    "nsa_bench": {"runner", "schema", "suite", "summary", "trends", "workload"},
}


def test_every_package_has_a_page_of_reference() -> None:
    packages = {folder.name.replace("-", "_") for folder in (ROOT / "packages").iterdir()}
    assert PUBLIC.keys() == packages == {page.stem for page in (ROOT / "docs" / "reference").iterdir()}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_has_every_public_name_and_no_other(package: str) -> None:
    page = (ROOT / "docs" / "reference" / f"{package}.md").read_text(encoding="utf-8")
    names = {*importlib.import_module(package).__all__, *PUBLIC[package]}
    assert sorted(re.findall(r"^::: (.*)$", page, re.MULTILINE)) == sorted(f"{package}.{name}" for name in names)


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGES[page].read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (PAGES[page].parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_fill_in(page: str) -> None:
    assert re.findall(r"@@|TODO|TBD", PAGES[page].read_text(encoding="utf-8")) == []
