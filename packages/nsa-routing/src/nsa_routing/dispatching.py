"""From a problem to the callable that runs it."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

from nsa_routing.backends import load_backend
from nsa_routing.environment import Environment, probe
from nsa_routing.planning import Plan, explain, plan
from nsa_routing.policy import Policy
from nsa_routing.problem import OPS, Problem
from nsa_routing.profile import load_profile


def dispatch(op: str, problem: Problem, *, backend: str | None = None) -> Callable[..., Any]:
    """The callable that runs `op`, with the operation's signature (see `nsa.ops`).

    Args:
        op: the operation; `problem.op` must be the same.
        backend: a name is obeyed or raises; None takes the plan (environment variables, then the profile).

    Raises:
        ValueError: op and problem disagree, or no backend of that name is installed.
        RuntimeError: no candidate accepts the problem; the message is the whole plan.

    Example:
        >>> import torch
        >>> problem = Problem("combine", "cpu", torch.float32, 64, 64, 4)
        >>> dispatch("combine", problem, backend="no-such-backend")
        Traceback (most recent call last):
        ValueError: backend: expected one of ...
    """
    if op != problem.op:
        raise ValueError(f"op: expected problem.op={problem.op!r}, got {op!r}")
    policy = _policy_of(os.environ.get("NSA_BACKEND"))
    if backend is not None:
        load_backend(backend)  # a name that is not installed is the caller's mistake: ValueError, not a plan
        policy = Policy(backends=tuple((name, backend) for name in OPS))
    return _route(problem, policy)


def plan_for(problem: Problem, policy: Policy | None = None) -> Plan:
    """The plan that `dispatch` follows on this machine."""
    return plan(_this_machine(), load_profile("base"), problem, policy or Policy.from_env())


@cache
def _policy_of(backend: str | None) -> Policy:
    """The process's policy; its one variable is the key, so that a call need not read the whole environment."""
    return Policy.from_env()


@cache
def _this_machine() -> Environment:
    return probe()


@cache
def _route(problem: Problem, policy: Policy) -> Callable[..., Any]:
    chosen = plan_for(problem, policy)
    if chosen.backend is None:
        asked = f" (requested: {chosen.requested})" if chosen.requested else ""
        raise RuntimeError(f"no backend accepts the problem{asked}\n{explain(chosen)}")
    return getattr(load_backend(chosen.backend), problem.op)
