"""Does the documentation say what the code says?"""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from nsa.layer_statistics import SUMS, summary
from nsa_routing.profile import Threshold

ROOT = Path(__file__).parents[1]
TABLES = ROOT / ".github" / "scripts" / "routing_tables.py"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])


def test_the_tables_of_the_routing_page_are_those_of_the_code() -> None:
    done = subprocess.run([sys.executable, TABLES, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("versions", [None, "torch 2.11.0, cuDNN 9.19.0"])
def test_the_table_of_thresholds_says_where_a_number_comes_from(versions: str | None) -> None:
    source = runpy.run_path(str(TABLES))["source"]
    measured = {"date": "2026-11-22", "gpu": "H100", "csv": "sm90.csv", "versions": versions}
    expected = ["2026-11-22, H100", *filter(None, [versions]), "sm90.csv"]
    assert source(Threshold.model_validate({"measured": measured})) == ", ".join(expected)


@pytest.mark.parametrize("name", ["decode-and-serving.md", "observability.md"])
def test_the_code_of_a_page_prints_what_it_says(name: str) -> None:
    """Block after block, as one program."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), {})
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(expected) == code.count("print(") > 0
    assert printed.getvalue().splitlines() == expected


def test_the_table_of_numbers_has_every_number() -> None:
    """Of a layer, as `summary` names them once everything happened, and of the process."""
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))
    named = set(re.findall(r"`([a-z_]+)[.`<]", rows))
    found = {name.partition(".")[0] for name in summary([1.0] * len(SUMS), 1)}
    assert found | {"module", "route", "compiled", "failures", "closed"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
