"""A real document with one fact planted in it: Python's own documentation strings, so every machine has it."""

import bisect
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# Long prose docstrings that have been in the standard library since Python 3.11: about 10,000 tokens in all.
MODULES = (
    "pdb",
    "configparser",
    "statistics",
    "json",
    "pickle",
    "csv",
    "re",
    "random",
    "socket",
    "urllib.request",
    "collections",
    "itertools",
)
FACT = "The access code of the observatory in Coimbra is 7351."
QUESTION = "What is the access code of the observatory in Coimbra?"
ANSWER = "7351"
GAP = "\n\n"


@dataclass(frozen=True)
class Document:
    """`text[needle:needle + len(fact)]` is the planted fact."""

    text: str
    needle: int


def paragraphs(modules: Iterable[str] = MODULES) -> list[str]:
    """The paragraphs of the modules' docstrings, in order.

    Raises ValueError for a module without a docstring (`python -OO` strips them all).
    """
    found: list[str] = []
    for name in modules:
        text = inspect.getdoc(importlib.import_module(name))
        if not text:
            raise ValueError(f"module {name!r} has no docstring; is Python running with -OO?")
        found += [p.strip("\n") for p in text.split(GAP) if p.strip()]
    return found


def plant(parts: Sequence[str], fact: str, depth: float, budget: int, count: Callable[[str], int]) -> Document:
    """As many leading `parts` as fit into `budget` tokens together with `fact`, which becomes a paragraph of its own.

    `depth` in [0, 1] is where the fact goes, as a share of the document's characters; it lands on the nearest gap
    between paragraphs. `count(text)` returns the number of tokens of a text.

    >>> plant(["one", "two", "six"], "FACT", 0.6, 100, len).text.split()
    ['one', 'two', 'FACT', 'six']

    Raises ValueError when depth is outside [0, 1] or when not even one part fits.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")

    def document(length: int) -> Document:
        gaps = [0]
        for part in parts[:length]:
            gaps.append(gaps[-1] + len(part) + len(GAP))
        at = min(range(len(gaps)), key=lambda i: abs(gaps[i] - depth * gaps[-1]))
        return Document(GAP.join([*parts[:at], fact, *parts[at:length]]), gaps[at])

    fitting = bisect.bisect_right(range(len(parts) + 1), budget, key=lambda length: count(document(length).text)) - 1
    if fitting < 1:
        raise ValueError(f"no paragraph fits into {budget} tokens beside the fact")
    return document(fitting)
