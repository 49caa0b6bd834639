"""From a problem to the callable that runs it: the one way to run an operation."""

import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, partial
from operator import attrgetter, index
from typing import Any, NamedTuple

import torch

from nsa_routing import breaker, events, together
from nsa_routing.backends import load_backend
from nsa_routing.environment import Environment, probe
from nsa_routing.planning import BROKEN, Plan, Rejected, explain, plan
from nsa_routing.policy import Policy
from nsa_routing.problem import LENGTHS, OPS, STATIC, Problem, describe, device_name
from nsa_routing.profile import LAST_RESORT, Profile, load_profile, profile_of
from nsa_routing.route import NOT_FINITE, GuardedRun, Run

DETERMINISTIC_OPS = ("compressed_attention", "selected_attention", "window_attention")  # those that take the keyword
MOST_ROUTES = 4096  # problems remembered; past that the memory starts anew

_static_of = attrgetter(*STATIC)
_lengths_of = attrgetter(*LENGTHS)


class Machine(NamedTuple):
    """A device with the profile that its plans follow, and what to say about the choice of that profile."""

    environment: Environment
    profile: Profile
    note: str | None
    cuts: dict[str, tuple[tuple[int, ...], ...]]  # by op, for each of LENGTHS: where a threshold's verdict changes


class _Router:
    """What a process knows: the operator's policy, its devices, the routes it has planned."""

    def __init__(self) -> None:
        self.policy = Policy.from_env()
        self.machines: dict[tuple[str, int], Machine] = {}
        self.routes: dict[Any, Run] = {}
        events.configure(self.policy)

    def machine(self, device: str, index: int) -> Machine:
        if (device, index) not in self.machines:
            environment = probe(device, index)
            name, note = profile_of(environment.device, environment.sm, self.policy.profile)
            profile = load_profile(name)
            if note and device != "cpu":
                events.tell(logging.WARNING, note, "profile", device, str(index))
            self.machines[device, index] = Machine(environment, profile, note, _cuts(profile))
        return self.machines[device, index]

    def plan(self, problem: Problem, policy: Policy) -> Plan:
        if problem.deterministic is None:
            wanted = policy.deterministic or torch.are_deterministic_algorithms_enabled()
            problem = replace(problem, deterministic=wanted)
        machine = self.machine(problem.device, problem.device_index)
        return plan(machine.environment, machine.profile, problem, policy, breaker.closed())

    def route(self, problem: Problem, backend: str | None) -> Run:
        policy = self.policy
        if backend is not None:
            load_backend(backend)  # a name that is not installed is the caller's mistake: ValueError, not a plan
            policy = replace(policy, backends=tuple((op, backend) for op in OPS))
        chosen = self.plan(problem, policy)
        problem = chosen.problem
        if chosen.backend is None:
            raise RuntimeError(self._refusal(chosen, policy))
        self._tell(chosen, policy)
        run = _guarded(chosen, policy, self._exact(problem))
        return partial(run, deterministic=True) if problem.deterministic and problem.op in DETERMINISTIC_OPS else run

    def _refusal(self, chosen: Plan, policy: Policy) -> str:
        """Why nothing runs: the plan, the one without the request, and what the machine could not tell."""
        asked = f" (requested: {chosen.requested})" if chosen.requested else ""
        lines = [f"no backend accepts the problem{asked}", explain(chosen)]
        if chosen.requested:
            lines += [
                "without the request:",
                *explain(self.plan(chosen.problem, replace(policy, backends=()))).splitlines()[1:],
            ]
        unknown = self.machine(chosen.problem.device, chosen.problem.device_index).environment.unknown
        return "\n".join([*lines, *(f"not found out: {reason}" for reason in unknown)])

    def _exact(self, problem: Problem) -> Run | None:
        """The last resort's operation, None where it cannot run the problem."""
        policy = replace(self.policy, backends=((problem.op, LAST_RESORT),))
        if self.plan(problem, policy).backend is None:
            return None
        run: Run = getattr(load_backend(LAST_RESORT), problem.op)
        return run

    def _tell(self, chosen: Plan, policy: Policy) -> None:
        for candidate in chosen.candidates:
            if isinstance(candidate, Rejected) and candidate.reason.startswith(BROKEN):
                message = f"backend {candidate.backend} {candidate.reason}; others take its place"
                events.tell(logging.WARNING, message, candidate.backend, candidate.reason)
        if events.LOGGER.isEnabledFor(logging.INFO):
            source = f"profile {chosen.profile}, preset {chosen.preset}"
            if chosen.requested:
                source = "requested"
            message = f"{chosen.backend} runs {describe(chosen.problem)} ({source})"
            events.tell(logging.INFO, message, "route", message)
        if policy.preset != "perf" and not chosen.requested:
            fast = self.plan(chosen.problem, replace(policy, preset="perf")).backend
            if fast is not None and fast not in chosen.accepted:  # a route may have closed in between
                events.tell(
                    logging.WARNING,
                    f"backend {fast} is installed and can run {chosen.problem.op} here, but preset {policy.preset} "
                    f"does not take it: NSA_PRESET=perf does (now: {chosen.backend})",
                    *("perf", fast),
                )


@cache
def _the_router() -> _Router:
    return _Router()


def dispatch(op: str, problem: Problem, *, backend: str | None = None) -> Callable[..., Any]:
    """The callable that runs `op`, with the operation's signature (see `nsa.ops`).

    Plans are remembered by problem, lengths only by the thresholds that they lie between. An automatic route falls back
    along its plan on failures to compile and to find memory, and guards its results as `NSA_CHECK_FINITE` says; the
    callable of `sdpa`, the last resort, is bare. `torch.compile` traces through: the choice is made while compiling.

    Args:
        op: the operation; `problem.op` must be the same.
        backend: a name is obeyed or raises; None takes the plan (environment variables, then the profile).

    Raises:
        ValueError: op and problem disagree, no backend of that name is installed, or a flag or profile is wrong.
        RuntimeError: no candidate accepts the problem, or one that would run is not fit to; the message is the whole
            plan.

    Example:
        >>> problem = Problem("combine", "cpu", torch.float32, 64, 64, 4)
        >>> dispatch("combine", problem, backend="no-such-backend")
        Traceback (most recent call last):
        ValueError: backend: expected one of ...
    """
    if op != problem.op:
        raise ValueError(f"op: expected problem.op={problem.op!r}, got {op!r}")
    if torch.compiler.is_compiling():
        return _dispatch_traced(problem, backend)
    router = _the_router()
    machine = router.machines.get((problem.device, problem.device_index))
    machine = machine or router.machine(problem.device, problem.device_index)
    lengths = tuple(map(bisect_right, machine.cuts[op], _lengths_of(problem)))
    deterministic = problem.deterministic is None and torch.are_deterministic_algorithms_enabled()
    key = (_static_of(problem), lengths, backend, deterministic)
    run = router.routes.get(key)
    if run is None:
        if len(router.routes) >= MOST_ROUTES:
            router.routes.clear()
        run = router.routes[key] = router.route(problem, backend)
    return run


def plan_for(problem: Problem, policy: Policy | None = None) -> Plan:
    """The plan that `dispatch` follows on this machine, or would with another policy.

    Raises:
        ValueError: a flag or the profile is wrong.

    Example:
        >>> plan_for(Problem("combine", "cpu", torch.float32, 64, 64, 4)).profile
        'cpu'
    """
    router = _the_router()
    return router.plan(problem, router.policy if policy is None else policy)


def machine_of(device: str | None = None, index: int = 0) -> Machine:
    """The environment and profile that plans for a device go by; None is the device that `probe` finds."""
    return _the_router().machine(device or probe().device, index)


def reset() -> None:
    """Forget what the process knows: flags and profiles are read anew, closed routes open, messages may come again.

    Example:
        >>> reset()
        >>> closed_after = poll()
        >>> len(closed_after)
        0
    """
    _the_router.cache_clear()
    breaker.forget()
    together.forget()
    events.forget()
    load_profile.cache_clear()
    load_backend.cache_clear()
    for name in list(vars(_TRACED)):
        delattr(_TRACED, name)


def poll() -> frozenset[tuple[str, str, str]]:
    """Read the flags that unfinished checks left on devices, close their routes, and return all closed ones.

    Synchronises with each device that has a flag. Ordinary calls read theirs by themselves, a call or more later;
    compiled code and replayed graphs never do: there `poll` is the only way for the news to arrive. An alarm (see
    `judged_together`) is told, and closes nothing yet.

    Example:
        >>> poll()
        frozenset()
    """
    together.read_alarms()
    for found in breaker.all_breakers():
        if not found.closed and found.noted(wait=True):
            found.closed = True
            found.failures[NOT_FINITE] += 1
            events.tell(
                logging.WARNING,
                f"{found.op} on {found.backend}, {found.device}: {NOT_FINITE} in an earlier call; the route is closed "
                f"until nsa_routing.reset(). To reproduce, set NSA_BACKEND={found.op}={found.backend} "
                "NSA_CHECK_FINITE=always",
                *(found.backend, found.op, found.device, "poll"),
            )
    return breaker.closed()


def _guarded(chosen: Plan, policy: Policy, exact: Run | None) -> Run:
    """The plan's backends, each guarded and falling back to the next; the last resort is bare."""
    problem = chosen.problem
    obeyed = chosen.requested is not None or policy.fallback == "raise"
    device = torch.device(device_name(problem))
    run: Run | None = None
    for name in reversed(chosen.accepted[:1] if obeyed else chosen.accepted):
        own: Run = getattr(load_backend(name), problem.op)
        if name == LAST_RESORT:
            run = own
            continue
        route = breaker.breaker(name, problem.op, device_name(problem))
        if policy.check != "off":  # "always" needs the flag too: compiled code and graphs cannot wait for a verdict
            route.prepare(device)
            together.prepare(device)
        run = GuardedRun(own, route, policy.check, run, exact)
    assert run is not None  # a plan with a backend
    return run


def _cuts(profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    found = {}
    for op in OPS:
        thresholds = [*profile.thresholds.get(op, {}).values(), *profile.prefer.get(op, {}).values()]
        by_length = []
        for name in LENGTHS:
            least = {getattr(threshold.at_least, name) for threshold in thresholds} - {None}
            most = {getattr(threshold.at_most, name) for threshold in thresholds} - {None}
            by_length.append(tuple(sorted(least | {bound + 1 for bound in most})))
        found[op] = tuple(by_length)
    return found


class _Traced:
    """Routes by name, for compiled code: Dynamo guards the one attribute that it read."""


_TRACED = _Traced()
_SIZES = tuple(field.name for field in fields(Problem) if field.type in (int, "int") and field.name in STATIC)
_FLAGS = tuple(field.name for field in fields(Problem) if field.type in (bool, "bool"))
_OTHERS = tuple(name for name in STATIC if name not in (*_SIZES, *_FLAGS))


def _dispatch_traced(problem: Problem, backend: str | None) -> Run:
    """`dispatch` while torch.compile traces: lengths may be symbolic, so each cut becomes a guard of its own."""
    at_least = []
    for name, bounds in zip(LENGTHS, _traced_cuts(problem.op, problem.device, problem.device_index), strict=True):
        reached = 0
        for bound in bounds:
            if getattr(problem, name) >= bound:
                reached = bound
        at_least.append(reached)
    sizes = [index(getattr(problem, name)) for name in _SIZES]
    stated = [name for name in _FLAGS if getattr(problem, name)]  # a branch: what compares lengths is symbolic too
    flags = [name in stated for name in _FLAGS]
    others = [getattr(problem, name) for name in _OTHERS]
    run: Run = getattr(_TRACED, _traced_route(backend, *at_least, *sizes, *flags, *others))
    return run


def _traced_cuts(op: str, device: str, device_index: int) -> tuple[tuple[int, ...], ...]:
    return _the_router().machine(device, device_index).cuts[op]


def _traced_route(backend: str | None, *values: Any) -> str:
    names = (*LENGTHS, *_SIZES, *_FLAGS, *_OTHERS)
    problem = Problem(**dict(zip(names, values, strict=True)))
    name = f"route_{len(vars(_TRACED))}"
    setattr(_TRACED, name, _the_router().route(problem, backend))
    return name


# Dynamo calls these while it traces and takes what they return as a constant. The public way to say so,
# torch.compiler.assume_constant_result, imports triton.
setattr(_traced_cuts, "_dynamo_marked_constant", True)  # noqa: B010  # mypy knows no such attribute
setattr(_traced_route, "_dynamo_marked_constant", True)  # noqa: B010
