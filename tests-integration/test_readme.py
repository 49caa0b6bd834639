"""Does the code of the READMEs run, and print what it says it prints?"""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {"README": README} | {page.parent.name: page for page in sorted(ROOT.glob("packages/*/README.md"))}
EXAMPLES = {
    f"{name}-{number}": code
    for name, page in PAGES.items()
    for number, code in enumerate(CODE.findall(page.read_text(encoding="utf-8")))
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name: str) -> None:
    expected = re.findall(r"^print\(.*\)  # (.*)$", EXAMPLES[name], re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(EXAMPLES[name], name, "exec"), {})
    assert expected
    assert printed.getvalue().splitlines() == expected


def test_there_are_examples_of_the_family_and_of_routing_alone() -> None:
    assert {"README-0", "nsa-routing-0"} <= EXAMPLES.keys()


def test_its_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"@@|TODO|TBD", README.read_text()) == []
