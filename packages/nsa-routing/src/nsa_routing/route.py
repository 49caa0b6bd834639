"""A backend's operation with what guards it: fallback, the check of its results, its breaker."""

import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_routing.breaker import Breaker
from nsa_routing.device_flag import capturing
from nsa_routing.events import tell
from nsa_routing.failures import OUT_OF_MEMORY, failure_kind
from nsa_routing.finiteness import inputs_finite, result_finite
from nsa_routing.together import by_outcome

Run = Callable[..., Any]
NOT_FINITE = "returned non-finite values for finite inputs"


class GuardedRun:
    """Calls like the operation it guards.

    Args:
        run: the backend's operation.
        breaker: of the route.
        check: how results are looked at: "always", "flag" or "off".
        fallback: what runs instead when `run` fails or its breaker is closed; None for a route that must be obeyed:
            then failures raise.
        exact: the last resort's operation, by which a non-finite result is judged; None where it cannot run.

    Raises:
        RuntimeError: without a fallback, for a non-finite result of finite inputs, and for a closed route.
        Whatever `run` raises that is not its own failure to compile or to find memory.
    """

    def __init__(self, run: Run, breaker: Breaker, check: str, fallback: Run | None, exact: Run | None) -> None:
        self.run = run
        self.breaker = breaker
        self.check = check
        self.fallback = fallback
        self.exact = exact
        self.device = torch.device(breaker.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The operation's result."""
        if self.breaker.closed or (self.check != "off" and self._bad_news(args, kwargs)):
            return self._instead(args, kwargs)
        try:
            result = self.run(*args, **kwargs)
        except Exception as error:
            kind = failure_kind(error)
            if kind is None or self.fallback is None:
                raise
            self._report(kind, args, kwargs, traceback=True)
        else:
            return result if self.check == "off" else self._checked(result, args, kwargs)
        # Outside the handler: the exception and the tensors that its traceback holds are gone by now.
        self.breaker.closed |= kind != OUT_OF_MEMORY  # memory may be free next time, a kernel compiles never
        return self._instead(args, kwargs)

    def _checked(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flagged = self.check == "flag" or torch.compiler.is_compiling() or self._in_capture
        if flagged and by_outcome(result):
            return result
        finite = result_finite(result)
        if finite is None:
            return result
        if flagged:
            inputs = inputs_finite((*args, *kwargs.values()))
            self.breaker.note(~finite if inputs is None else ~finite & inputs)
            return result
        if finite.item():
            return result
        inputs = inputs_finite((*args, *kwargs.values()))
        if inputs is not None and not inputs.item():
            return result
        exact = None if self.exact is None else self.exact(*args, **kwargs)
        verdict = None if exact is None else result_finite(exact)
        if verdict is not None and not verdict.item():
            return result  # the true result does not fit the dtype: nobody's fault
        self.breaker.closed = True
        message = self._report(NOT_FINITE, args, kwargs)
        if self.fallback is None:
            raise RuntimeError(message)
        return self.fallback(*args, **kwargs) if exact is None else exact

    @property
    def _in_capture(self) -> bool:
        return capturing(self.device)

    def _bad_news(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the flag of an earlier call came in, outside of any waiting, capture or compilation."""
        if torch.compiler.is_compiling() or not self.breaker.noted(wait=False):
            return False
        if self._in_capture:
            return False
        self.breaker.closed = True
        self._report(f"{NOT_FINITE} in an earlier call", args, kwargs)
        return True

    def _instead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.fallback is None:
            raise RuntimeError(
                f"{self.breaker.op} on {self.breaker.backend}: the route is closed on {self.breaker.device} after a "
                "failure, until nsa_routing.reset(); nothing takes its place: it was requested, or NSA_FALLBACK=raise"
            )
        return self.fallback(*args, **kwargs)

    def _report(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, traceback: bool = False) -> str:
        route = self.breaker
        route.failures[what] += 1
        then = "raised" if self.fallback is None else "another backend takes over"
        if what != OUT_OF_MEMORY:
            then += f"; the route is closed on {route.device} until nsa_routing.reset()"
        call = describe_call(route.op, args, kwargs)
        message = (
            f"{route.op} on {route.backend}, {route.device}: {what}; {then}. "
            f"To reproduce, set NSA_BACKEND={route.op}={route.backend} NSA_CHECK_FINITE=off and call {call}"
        )
        tell(logging.WARNING, message, route.backend, route.op, route.device, what, traceback=traceback)
        return message


def describe_call(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The call as text, with shapes and dtypes for tensors.

    Example:
        >>> describe_call("combine", (torch.ones(2, 1, 3),), {"scale": 0.5})
        'combine(float32[2, 1, 3], scale=0.5)'
    """
    shown = [_describe(x) for x in args]
    shown += [f"{name}={_describe(x)}" for name, x in kwargs.items() if x is not None]
    return f"{op}({', '.join(shown)})"


def _describe(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if isinstance(getattr(x, "cu_seqlens_q", None), Tensor):  # a layout: its lengths are what matters
        q, k = (offsets.diff().tolist() for offsets in (x.cu_seqlens_q, x.cu_seqlens_k))
        return f"VarlenLayout.from_lengths({q}, {k})"
    if isinstance(getattr(x, "pages", None), Tensor):
        return f"PagedKV({_describe(x.pages)})"
    if is_dataclass(x) and not isinstance(x, type):
        named = ((field.name, getattr(x, field.name)) for field in fields(x))
        return f"{type(x).__name__}({', '.join(f'{name}={_describe(y)}' for name, y in named if y is not None)})"
    return repr(x)
