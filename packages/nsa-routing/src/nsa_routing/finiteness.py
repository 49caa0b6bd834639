"""Are results finite? A log-sum-exp of -inf is: it says that a query sees no key."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> Tensor | None:
    """Whether every element of every floating tensor is finite, as a bool tensor on their device; None for no tensor.

    One pass over memory per tensor, no temporary of its size, no synchronisation.
    """
    verdict: Tensor | None = None
    for x in tensors:
        if x.is_floating_point() and x.numel():
            # The largest magnitude is NaN or inf if any element is.
            finite = torch.linalg.vector_norm(x.detach(), torch.inf).isfinite()
            verdict = finite if verdict is None else verdict & finite
    return verdict


def result_finite(result: Any) -> Tensor | None:
    """`all_finite` of what an operation returns: a tensor, or (out, lse), where an lse may also be -inf."""
    if isinstance(result, Tensor):
        return all_finite((result,))
    out, lse = result
    verdict = all_finite((out,))
    if verdict is None:
        return None
    return verdict & (lse.detach().amax() < torch.inf)  # NaN compares false and survives amax


def inputs_finite(args: Iterable[Any]) -> Tensor | None:
    """`all_finite` of the tensors among the arguments. Pages are left out: what no sequence owns may hold anything."""
    return all_finite(x for x in args if isinstance(x, Tensor))
