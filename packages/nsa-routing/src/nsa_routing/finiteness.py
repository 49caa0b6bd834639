"""Are results finite? A log-sum-exp of -inf is: it says that a query sees no key."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_verdicts: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("verdicts", default=None)


@contextmanager
def each_once() -> Iterator[None]:
    """Within, a tensor is looked at once, however many operations take or return it. Nobody may write to one meanwhile.

    The tensors stay alive until the end.

    Example:
        >>> q = torch.ones(2, 3)
        >>> with each_once():
        ...     first, second = all_finite((q,)), all_finite((q,))
        >>> first is second
        True
    """
    known = _verdicts.get()
    token = _verdicts.set({} if known is None else known)
    try:
        yield
    finally:
        _verdicts.reset(token)


def all_finite(tensors: Iterable[Tensor]) -> Tensor | None:
    """Whether every element of every floating tensor is finite, as a bool tensor on their device; None for no tensor.

    One pass over memory per tensor, no temporary of its size, no synchronisation.
    """
    verdict: Tensor | None = None
    for x in tensors:
        if x.is_floating_point() and x.numel():
            finite = _finite(x)
            verdict = finite if verdict is None else verdict & finite
    return verdict


def _finite(x: Tensor) -> Tensor:
    known = None if torch.compiler.is_compiling() else _verdicts.get()
    if known is not None and id(x) in known:
        return known[id(x)][1]
    # The largest magnitude is NaN or inf if any element is; NaN compares false. One kernel each, which isfinite is not.
    finite: Tensor = torch.linalg.vector_norm(x.detach(), torch.inf) < torch.inf
    if known is not None:
        known[id(x)] = x, finite
    return finite


def result_finite(result: Any) -> Tensor | None:
    """`all_finite` of what operations return: a tensor, or (out, lse, ...), where an lse may also be -inf.

    What holds whole numbers, as the block indices beside the out of `decode_attention`, is not looked at.
    """
    out, *others = (result,) if isinstance(result, Tensor) else result
    lses = [x for x in others if x.is_floating_point()]
    verdict = all_finite((out,))
    if verdict is None or not lses:
        return verdict
    # NaN survives amax and maximum, and compares false.
    return verdict & (reduce(torch.maximum, (lse.detach().amax() for lse in lses)) < torch.inf)


def largest_of(result: Any) -> list[Tensor]:
    """Numbers [] that are below infinity, and not NaN, just if `result_finite`: one kernel for each, and no verdict.

    Of out the largest magnitude, of each lse the largest value; none where there is nothing to judge.

    Example:
        >>> largest_of((torch.tensor([[[1.0, -2.0]]]), torch.tensor([[-torch.inf]])))
        [tensor(2.), tensor(-inf)]
    """
    out, *others = (result,) if isinstance(result, Tensor) else result
    if not out.is_floating_point() or not out.numel():
        return []
    lses = [x.detach().amax() for x in others if x.is_floating_point()]
    return [torch.linalg.vector_norm(out.detach(), torch.inf), *lses]


def inputs_finite(args: Iterable[Any]) -> Tensor | None:
    """`all_finite` of the tensors among the arguments, and of those that an argument's `tensors()` gives.

    Pages are left out: what no sequence owns may hold anything.
    """
    return all_finite(x for arg in args for x in _tensors(arg))


def _tensors(arg: Any) -> Iterable[Tensor]:
    if isinstance(arg, Tensor):
        return (arg,)
    given: Iterable[Tensor] = arg.tensors() if callable(getattr(arg, "tensors", None)) else ()
    return given
