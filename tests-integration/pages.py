"""The pages of the documentation, and the blocks of code in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "SECURITY.md", "bench/README.md", "docs/**/*.md", "packages/*/README.md")
PAGES = {page.relative_to(ROOT).as_posix(): page for place in PLACES for page in sorted(ROOT.glob(place))}


class Block(NamedTuple):
    """A fenced block: where it begins, what it says it is, what is in it."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """In their order. An indented fence is one too; its text loses the indentation."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE)
    return [
        Block(page, text.count("\n", 0, fence.start()) + 1, fence[2], re.sub(f"^{fence[1]}", "", fence[3], flags=re.M))
        for fence in found
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_language(language: str) -> list[Block]:
    """All blocks that say so."""
    return [block for block in BLOCKS if block.language == language]
