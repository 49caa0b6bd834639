"""An extension of griffe: the sections of docstrings as they are written here, in griffe's own words.

`Fields:` are attributes, `Example:` is one of its examples. A line may name several things that share a description: of
arguments each gets it, for griffe looks for each in the signature. Fields are looked for here, and those of one type
stay together.
"""

import re
from typing import Any

from griffe import Extension, Object, logger

SECTION = r"^{}:\n((?:(?: .*)?\n)*)"
ITEM = re.compile(r"^    (\w+(?:, \w+)*)(: .*\n(?:(?: {8}.*)?\n)*)", re.MULTILINE)
NO_BREAK = "\N{NO-BREAK SPACE}"  # a name ends at a space, to griffe, but not at this one


class Sections(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Name sections as griffe does, and look for the fields of a dataclass."""
        if obj.docstring is None:
            return

        def fields(section: re.Match[str]) -> str:
            return f"Attributes:\n{ITEM.sub(lambda item: _fields(obj, item), section[1])}"

        def arguments(section: re.Match[str]) -> str:
            return f"Args:\n{ITEM.sub(_each_by_itself, section[1])}"

        text = obj.docstring.value + "\n"
        text = re.sub(SECTION.format("Args"), arguments, text, flags=re.MULTILINE)
        text = re.sub(SECTION.format("Fields"), fields, text, flags=re.MULTILINE)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        obj.docstring.value = text.rstrip("\n")


def _fields(obj: Object, item: re.Match[str]) -> str:
    names = item[1].split(", ")
    for name in names if "dataclass" in obj.labels else ():
        if name not in obj.all_members:
            logger.warning(f"{obj.path}: {name} is no field of it")
    types = {str(getattr(obj.members.get(name), "annotation", None)) for name in names}
    if len(names) == 1 or len(types) > 1 or types == {"None"}:
        return _each_by_itself(item)
    return f"    {f',{NO_BREAK}'.join(names)} ({types.pop()}){item[2]}"


def _each_by_itself(item: re.Match[str]) -> str:
    return "".join(f"    {name}{item[2]}" for name in item[1].split(", "))
