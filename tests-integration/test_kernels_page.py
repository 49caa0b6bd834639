"""Does docs/kernels.md quote what the logs of the work say, and name modules that there are?"""

import re
from collections.abc import Iterator

from built_packages import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "kernels.md").read_text(encoding="utf-8")
SOURCES = ("triton-forward", "triton-backward", "triton-decode", "flash-attention", "adr/0004-*")
PACKAGE = ROOT / "packages" / "nsa-kernels-triton" / "src" / "nsa_kernels_triton"
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w.]*\d)")


def numbers(text: str) -> Iterator[str]:
    """Numbers as they are written, without those in code, in links, and in names."""
    prose = re.sub(r"^```.*?^```|`[^`]*`|\]\([^)]*\)|!\[[^]]*\]", " ", text, flags=re.MULTILINE | re.DOTALL)
    for found in NUMBER.findall(prose):
        yield found.replace(",", "")


def unfounded(page: str) -> list[str]:
    """Numbers of a page that are not in a source, exactly or rounded to as many digits; whole ones below 100 aside."""
    texts = [path.read_text(encoding="utf-8") for name in SOURCES for path in DOCS.glob(f"{name}.md")]
    known = {number for text in texts for number in numbers(text)}
    assert len(known) > 300

    def stands(number: str) -> bool:
        digits = len(number.partition(".")[2])
        return any(number in (each, f"{float(each):.{digits}f}") for each in known)

    return [number for number in numbers(page) if ("." in number or float(number) >= 100) and not stands(number)]


# What follows from the formulas that stand beside it.
OWN = ["1024", "128"]  # keys that a query selects, head_dim


def test_its_measurements_are_those_of_the_logs() -> None:
    assert [number for number in unfounded(PAGE) if number not in OWN] == []


def test_a_number_that_no_log_has_is_found() -> None:
    assert unfounded("It takes 15.3 ms, or 15.37, and 118 GB or 119.") == ["15.37", "119"]


def test_the_modules_that_it_names_are_there() -> None:
    table = PAGE[PAGE.index("| idea | kernels | launched by |") :]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ")][2:]
    cells = [pair for row in rows for pair in zip(("kernels", "ops"), row[1:], strict=True)]
    named = [(folder, name) for folder, cell in cells for name in re.findall(r"`([\w*]+\.py)`", cell)]
    assert len(named) > 20
    assert [(folder, name) for folder, name in named if not list((PACKAGE / folder).glob(name))] == []
