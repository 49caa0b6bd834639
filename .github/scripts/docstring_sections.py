"""An extension of griffe: the sections of docstrings as they are written here, in griffe's own words.

`Fields:` are attributes, `Example:` is one of griffe's examples. A line of arguments may name several that share a
description: each gets it, for griffe looks for each in the signature. Fields are looked for here.
"""

import re
from typing import Any

from griffe import Extension, Object, logger

SECTION = r"^{}:\n((?:(?: .*)?\n)*)"
SEVERAL = re.compile(r"^    (\w+(?:, \w+)+)(: .*\n(?:(?: {8}.*)?\n)*)", re.MULTILINE)


class Sections(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Look for the fields of a dataclass, then name sections as griffe does."""
        if obj.docstring is None:
            return
        text = obj.docstring.value + "\n"
        for fields in re.findall(SECTION.format("Fields"), text, re.MULTILINE) if "dataclass" in obj.labels else ():
            for names in re.findall(r"^    (\w+(?:, \w+)*):", fields, re.MULTILINE):
                for name in names.split(", "):
                    if name not in obj.all_members:
                        logger.warning(f"{obj.path}: {name} is no field of it")
        text = re.sub(SECTION.format("Args"), _each_by_itself, text, flags=re.MULTILINE)
        text = re.sub(r"^Fields:$", "Attributes:", text, flags=re.MULTILINE)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        obj.docstring.value = text.rstrip("\n")


def _each_by_itself(section: re.Match[str]) -> str:
    lines = SEVERAL.sub(lambda found: "".join(f"    {name}{found[2]}" for name in found[1].split(", ")), section[1])
    return f"Args:\n{lines}"
