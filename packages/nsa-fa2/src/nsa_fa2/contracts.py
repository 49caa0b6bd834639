"""Why a kernel cannot run an operation, in words: told before it is called, never by an exception from inside it."""

from typing import Any

import torch

from nsa_fa2.kernel import Limits

ATTENTION = ("compressed_attention", "selected_attention", "window_attention")


def unmet(op: str, problem: Any, limits: Limits) -> str | None:
    """What of a problem a kernel's limits do not allow, or None. The machine is another matter.

    Args:
        op: the operation.
        problem: with `device`, `dtype`, `head_dim`, `v_head_dim`, `needs_grad`, `deterministic`, `paged`, `uniform` and
            the reserved `softcap`, `sinks`, `fp8_scales`, as `nsa_routing.Problem` has them; what it lacks is false.

    Example:
        >>> from types import SimpleNamespace
        >>> layer = {"device": "cuda", "dtype": torch.float16, "head_dim": 100, "v_head_dim": 128}
        >>> unmet("window_attention", SimpleNamespace(**layer), Limits())
        'needs head_dim and v_head_dim that are multiples of 8, got 100 and 128'
    """
    if op not in ATTENTION:
        return f"has no operation {op}"

    def asks(feature: str) -> bool:
        return bool(getattr(problem, feature, False))

    for feature in ("softcap", "sinks", "fp8_scales"):
        if asks(feature):
            return f"does not implement {feature}"
    if problem.device not in limits.devices:
        return f"needs {' or '.join(limits.devices)}, got {problem.device}".replace("cuda", "CUDA")
    if problem.dtype not in limits.dtypes:
        return f"takes {' and '.join(map(_name, limits.dtypes))}, not {_name(problem.dtype)}"
    dims = problem.head_dim, problem.v_head_dim
    if any(dim == 0 or dim % limits.head_dim_multiple for dim in dims):
        multiple = limits.head_dim_multiple
        return f"needs head_dim and v_head_dim that are multiples of {multiple}, got {dims[0]} and {dims[1]}"
    if max(dims) > limits.max_head_dim:
        return f"needs head_dim and v_head_dim up to {limits.max_head_dim}, got {dims[0]} and {dims[1]}"
    if op == "window_attention" and not limits.windows:
        return "has no sliding window"
    if not limits.ragged:
        if op == "selected_attention":
            return "has no ragged batches, which gathered keys are"
        if asks("paged"):
            return "does not take paged keys and values"
        if not asks("uniform"):
            return "needs sequences of one length, with as many queries as keys"
    if asks("needs_grad"):
        if asks("paged"):
            return "records no gradients through paged keys and values"
        if asks("deterministic") and op == "selected_attention":
            return "adds up the gradients of gathered keys in no fixed order"
        if asks("deterministic") and not limits.deterministic_gradients:
            return "has no deterministic gradients"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
