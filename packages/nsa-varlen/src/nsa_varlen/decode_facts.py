"""What the checks of a decode step go by, as one tuple of shapes, dtypes and devices: equal ones need no second look.

A step of a model calls `decode_attention` once a layer with arguments that differ in their values alone. What was found
right is remembered by facts, never by tensors: none is kept alive.
"""

from contextvars import ContextVar
from typing import Any

from torch import Tensor

from nsa_varlen.new_tokens import CompletedBlocks, NewTokens, PooledTokens
from nsa_varlen.paged import PagedKV

MOST_ACCEPTED = 256  # facts remembered; past that the memory starts anew

Arguments = tuple[
    Any, ...
]  # q, q_cmp, the streams' k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, counts, blocks, new


class Accepted:
    """Arguments whose facts were found right.

    Fields:
        notes: what others derived from the same facts, under keys of their own.
    """

    __slots__ = ("notes",)

    def __init__(self) -> None:
        self.notes: dict[Any, Any] = {}


_accepted: dict[tuple[Any, ...], Accepted] = {}
_checked: ContextVar[tuple[Arguments, Accepted] | None] = ContextVar("checked", default=None)


class Checked:
    """Within, these very arguments are known to be right, values too: for an operation and the backend that runs it."""

    __slots__ = ("_found", "_token")

    def __init__(self, arguments: Arguments, accepted: Accepted) -> None:
        self._found = arguments, accepted

    def __enter__(self) -> None:
        self._token = _checked.set(self._found)

    def __exit__(self, *_: object) -> None:
        _checked.reset(self._token)


def already_checked(arguments: Arguments) -> Accepted | None:
    """What `Checked` has for the same objects."""
    found = _checked.get()
    if found is None or len(found[0]) != len(arguments):
        return None
    for x, y in zip(found[0], arguments, strict=True):
        if x is not y:
            return None
    return found[1]


def accepted_before(facts: tuple[Any, ...] | None) -> Accepted | None:
    """What was found right of equal facts, if it was."""
    return None if facts is None else _accepted.get(facts)


def accept(facts: tuple[Any, ...] | None) -> Accepted:
    """These are right."""
    accepted = Accepted()
    if facts is not None:
        if len(_accepted) >= MOST_ACCEPTED:
            _accepted.clear()
        _accepted[facts] = accepted
    return accepted


def decode_facts(arguments: Arguments) -> tuple[Any, ...] | None:
    """All that the checks of a decode step look at but values; None for what is not even of the types expected."""
    q, q_cmp, *pages, gates, counts, blocks, new = arguments
    try:
        hash(blocks)
        facts = [blocks, *_of(q), *_of(q_cmp), *_of(gates), *_of(counts)]
        for kv in pages:
            if type(kv) is not PagedKV:
                return None
            # Its table and lengths fit its pages: a PagedKV that does not is none.
            facts += (*_of(kv.pages), kv.block_table.shape, kv.k_scale is None, kv.v_scale is None)
        if new is None:
            return tuple(facts)
        if type(new) is not NewTokens:
            return None
        cmp = new.cmp
        rows = [new.k_slc, new.v_slc, new.k_win, new.v_win, cmp.k, cmp.v]
        if type(cmp) is PooledTokens:
            rows += (cmp.k_tail, cmp.v_tail)
            for x in (cmp.k_weights, cmp.v_weights, cmp.rotation):
                facts += (None,) if x is None else _of(x)
        elif type(cmp) is not CompletedBlocks:
            return None
        for x in rows:
            facts += _of(x)
    except (AttributeError, TypeError):
        return None
    return (*facts, type(cmp))


def _of(x: Tensor) -> tuple[Any, ...]:
    return type(x), x.shape, x.dtype, x.device
