"""The decision: which backend runs one operation, with a reason for every one that does not."""

from dataclasses import dataclass, fields

from nsa_routing.backends import load_backend
from nsa_routing.environment import Environment
from nsa_routing.policy import Policy
from nsa_routing.problem import Problem
from nsa_routing.profile import Profile


@dataclass(frozen=True)
class Accepted:
    """The backend can run the problem."""

    backend: str


@dataclass(frozen=True)
class Rejected:
    """The backend cannot run the problem, or may not, because of `reason`."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every candidate for one problem, in the order of preference.

    Fields:
        problem: what is planned.
        candidates: Accepted or Rejected, best first.
        requested: the backend that the caller or the policy named, or None for an automatic route.
    """

    problem: Problem
    candidates: tuple[Accepted | Rejected, ...]
    requested: str | None = None

    @property
    def backend(self) -> str | None:
        """The first accepted backend, or None."""
        return next((c.backend for c in self.candidates if isinstance(c, Accepted)), None)


def plan(
    environment: Environment,
    profile: Profile,
    problem: Problem,
    policy: Policy,
    closed: frozenset[tuple[str, str, str]] = frozenset(),
) -> Plan:
    """Rank the backends for one problem. Pure: the same arguments give the same plan.

    Args:
        closed: (backend, op, device) routes that must not be taken.

    A backend that the policy requests is the only candidate. Otherwise the profile's order is.
    """
    requested = policy.backend_for(problem.op)
    names = [requested] if requested is not None else profile.order[problem.op]
    return Plan(problem, tuple(_judge(name, environment, problem, closed) for name in names), requested)


def _judge(
    name: str, environment: Environment, problem: Problem, closed: frozenset[tuple[str, str, str]]
) -> Accepted | Rejected:
    if name not in environment.backends:
        return Rejected(name, f"not installed (installed: {', '.join(environment.backends) or 'none'})")
    if (name, problem.op, problem.device) in closed:
        return Rejected(name, f"closed on {problem.device} after a failure")
    reason = load_backend(name).refuse(problem.op, problem, environment)
    return Accepted(name) if reason is None else Rejected(name, reason)


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
    problem = plan.problem
    width = max((len(candidate.backend) for candidate in plan.candidates), default=0)
    lines = [
        f"{problem.op} on {problem.device}, {problem.dtype}, head_dim {problem.head_dim}/{problem.v_head_dim}, "
        f"group size {problem.group_size}"
        + "".join(f", {field.name}" for field in fields(problem) if getattr(problem, field.name) is True)
    ]
    for candidate in plan.candidates:
        if isinstance(candidate, Rejected):
            verdict = f"rejected: {candidate.reason}"
        else:
            verdict = "chosen" if candidate.backend == plan.backend else "accepted"
        lines.append(f"  {candidate.backend:<{width}}  {verdict}")
    return "\n".join(lines)
