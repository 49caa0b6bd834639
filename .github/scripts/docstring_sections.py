"""An extension of griffe: the sections of docstrings as they are written here, in griffe's own words.

`Fields:` are attributes, `Example:` is one of griffe's examples, and a line of arguments or fields may name several that
share a description: each gets it.
"""

import re
from typing import Any

from griffe import Extension, Object

HEADINGS = {"Fields:": "Attributes:", "Example:": "Examples:"}
SECTION = re.compile(r"^(Args|Attributes):\n((?:(?: .*)?\n)*)", re.MULTILINE)
SEVERAL = re.compile(r"^    (\w+(?:, \w+)+)(: .*\n(?:(?: {8}.*)?\n)*)", re.MULTILINE)


class Sections(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(rf"^({'|'.join(HEADINGS)})$", lambda found: HEADINGS[found[1]], obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = SECTION.sub(_each_by_itself, text + "\n").rstrip("\n")


def _each_by_itself(section: re.Match[str]) -> str:
    lines = SEVERAL.sub(lambda found: "".join(f"    {name}{found[2]}" for name in found[1].split(", ")), section[2])
    return f"{section[1]}:\n{lines}"
