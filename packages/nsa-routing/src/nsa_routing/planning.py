"""The decision: which backend runs one operation, with a reason for every one that does not."""

from dataclasses import dataclass

from nsa_routing.backends import Backend, load_backend
from nsa_routing.compatibility import wrong_triton
from nsa_routing.environment import Environment
from nsa_routing.policy import FA2_BACKENDS, PRESETS, Policy
from nsa_routing.problem import LENGTHS, Problem, describe, device_name
from nsa_routing.profile import LAST_RESORT, Profile, Threshold

BROKEN = "is broken"  # how the reason begins where a backend raises instead of answering
Closed = frozenset[tuple[str, str, str]]


@dataclass(frozen=True)
class Accepted:
    """The backend can run the problem."""

    backend: str


@dataclass(frozen=True)
class Rejected:
    """The backend cannot run the problem, or may not, because of `reason`.

    `fatal`: what stands in its way is a mistake that must be mended, not a reason to take the next one.
    """

    backend: str
    reason: str
    fatal: bool = False


@dataclass(frozen=True)
class Plan:
    """Every candidate for one problem, in the order of preference.

    Fields:
        problem: what is planned.
        candidates: Accepted or Rejected, best first.
        requested: the backend that the caller or the policy named, or None for an automatic route.
        profile, preset: what was planned by.

    Example:
        >>> import torch
        >>> problem = Problem("combine", "cpu", torch.float32, 64, 64, 4)
        >>> made = Plan(problem, (Rejected("triton", "needs CUDA"), Accepted("sdpa")))
        >>> made.backend, made.accepted
        ('sdpa', ('sdpa',))
    """

    problem: Problem
    candidates: tuple[Accepted | Rejected, ...]
    requested: str | None = None
    profile: str = ""
    preset: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The accepted backends before any fatal rejection, best first: a failing route falls back along them."""
        names: list[str] = []
        for candidate in self.candidates:
            if isinstance(candidate, Accepted):
                names.append(candidate.backend)
            elif candidate.fatal:
                break
        return tuple(names)

    @property
    def backend(self) -> str | None:
        """The backend that runs the problem; None if all are rejected, or a fatal rejection comes first."""
        return next(iter(self.accepted), None)


def plan(
    environment: Environment,
    profile: Profile,
    problem: Problem,
    policy: Policy,
    closed: Closed = frozenset(),
) -> Plan:
    """Rank the backends for one problem. Pure and total: equal arguments give equal plans, and none raises.

    A backend that the policy requests is the only candidate: denials and the backend's own refusal still hold, presets
    and thresholds do not. Otherwise the profile's order is gone through, after those that it prefers for such lengths.

    Args:
        closed: (backend, op, device) routes that must not be taken.

    Example:
        >>> import torch
        >>> from nsa_routing.profile import load_profile
        >>> machine = Environment("cpu", None, "2.13.0", None, None, backends=())
        >>> problem = Problem("combine", "cpu", torch.float32, 64, 64, 4)
        >>> plan(machine, load_profile("cpu"), problem, Policy()).candidates[-1]
        Rejected(backend='sdpa', reason='not installed (installed: none)', fatal=False)
    """
    requested = policy.backend_for(problem.op)
    names = (requested,) if requested is not None else _order(profile, problem)
    judged = tuple(_judge(name, environment, profile, problem, policy, closed, requested is None) for name in names)
    return Plan(problem, judged, requested, profile.name, policy.preset)


def _order(profile: Profile, problem: Problem) -> tuple[str, ...]:
    preferred = profile.prefer.get(problem.op, {})
    return tuple(
        sorted(
            profile.order[problem.op],
            key=lambda name: name not in preferred or _outside(preferred[name], problem) is not None,
        )
    )


def _judge(
    name: str,
    environment: Environment,
    profile: Profile,
    problem: Problem,
    policy: Policy,
    closed: Closed,
    automatic: bool,
) -> Accepted | Rejected:
    if name not in environment.backends:
        return Rejected(name, f"not installed (installed: {', '.join(environment.backends) or 'none'})")
    denial = profile.denials.get(problem.op, {}).get(name)
    if denial and not policy.lifts(denial.lifted_by):
        lifted = f"; {denial.lifted_by}=1 allows it" if denial.lifted_by else ""
        return Rejected(name, f"denied by ADR {denial.adr}: {denial.reason}{lifted}")
    if policy.fa2 == "0" and name in FA2_BACKENDS:
        return Rejected(name, "NSA_FA2=0")
    try:
        backend = load_backend(name)
        reason = backend.refuse(problem.op, problem, environment)
    # A plan is total: whatever a backend raises while it is imported or asked, the others can still run.
    except Exception as error:  # noqa: BLE001
        return Rejected(name, f"{BROKEN}: {type(error).__name__}: {error}")
    if reason is None and not callable(getattr(backend, problem.op, None)):
        reason = f"has no operation {problem.op}"
    if reason is None and automatic:
        reason = _held_back(name, profile, problem, policy)
    if reason is not None:
        return Rejected(name, reason)
    if (name, problem.op, device_name(problem)) in closed:
        reason = f"closed on {device_name(problem)} after a failure, until nsa_routing.reset()"
        return Rejected(name, reason, fatal=policy.fallback == "raise")
    wrong = _wrong_triton(backend, environment)
    return Rejected(name, wrong, fatal=True) if wrong else Accepted(name)


def _wrong_triton(backend: Backend, environment: Environment) -> str | None:
    if not getattr(backend, "uses_triton", False):
        return None
    return wrong_triton(environment.torch, environment.triton, environment.triton_pin)


def _held_back(name: str, profile: Profile, problem: Problem, policy: Policy) -> str | None:
    """Why an automatic route does not take a backend that could run the problem."""
    if name == LAST_RESORT:
        return None
    mode = profile.presets.get(policy.preset, {}).get(name)
    if mode is None:
        other = [preset for preset in PRESETS if name in profile.presets.get(preset, {})]
        hint = f"NSA_PRESET={other[0]} does" if other else "NSA_BACKEND can name it"
        return f"preset {policy.preset} does not take it; {hint}"
    trusted = name in FA2_BACKENDS and policy.fa2 == "1"
    if mode == "opt-in" and not trusted:
        return "opt-in: NSA_FA2=1 takes it where its threshold allows"
    threshold = profile.thresholds.get(problem.op, {}).get(name)
    if threshold is None:
        return None if mode == "always" else f"profile {profile.name} has no threshold for it"
    if mode == "measured" and threshold.not_measured is not None and not trusted:
        hint = "; NSA_FA2=1 trusts it" if name in FA2_BACKENDS else ""
        return f"its threshold is not measured ({threshold.not_measured}){hint}"
    return _outside(threshold, problem)


def _outside(threshold: Threshold, problem: Problem) -> str | None:
    for name in LENGTHS:
        length, least, most = (getattr(x, name) for x in (problem, threshold.at_least, threshold.at_most))
        if least is not None and length < least:
            return f"pays from {name} {least}, got {length}"
        if most is not None and length > most:
            return f"pays up to {name} {most}, got {length}"
    return None


def explain(plan: Plan) -> str:
    """The plan as a table that a person can read: one line per candidate.

    Example:
        >>> import torch
        >>> problem = Problem("combine", "cpu", torch.float32, 64, 64, 4)
        >>> print(explain(Plan(problem, (Rejected("triton", "needs CUDA"), Accepted("sdpa")))))
        combine on cpu, torch.float32, head_dim 64/64, group size 4
          triton  rejected: needs CUDA
          sdpa    chosen
    """
    width = max((len(candidate.backend) for candidate in plan.candidates), default=0)
    lines = [describe(plan.problem)]
    lines += (f"  {candidate.backend:<{width}}  {verdict(plan, candidate)}" for candidate in plan.candidates)
    return "\n".join(lines)


def verdict(plan: Plan, candidate: Accepted | Rejected) -> str:
    """What became of one candidate of a plan: "chosen", "accepted", or "rejected: " and why."""
    if isinstance(candidate, Rejected):
        return f"{'stops here' if candidate.fatal else 'rejected'}: {candidate.reason}"
    return "chosen" if candidate.backend == plan.backend else "accepted"
