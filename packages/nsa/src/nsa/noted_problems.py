"""Which problems the operations asked a route for: noted for whoever wants to say where they went."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from nsa_routing import Problem

# Of each thread its own: layers of different threads do not note for one another.
_notes: ContextVar[dict[str, Problem] | None] = ContextVar("notes", default=None)


def noted(problem: Problem) -> Problem:
    """`problem`, noted by its operation if someone is noting. Code that is traced by torch.compile notes nothing."""
    notes = None if torch.compiler.is_compiling() else _notes.get()
    if notes is not None:
        notes[problem.op] = problem
    return problem


@contextmanager
def noting(notes: dict[str, Problem] | None) -> Iterator[None]:
    """Within, the last problem of each operation goes into `notes`; None notes nothing.

    Example:
        >>> from nsa import ops
        >>> notes = {}
        >>> with noting(notes):
        ...     out = ops.combine(torch.ones(2, 1, 3), *[torch.ones(2, 1, 4)] * 3)
        >>> notes["combine"].total_q
        2
    """
    token = _notes.set(notes)
    try:
        yield
    finally:
        _notes.reset(token)
