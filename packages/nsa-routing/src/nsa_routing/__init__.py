"""Which backend runs which operation of Native Sparse Attention, and why."""

from nsa_routing.__about__ import __version__
from nsa_routing.breaker import closed, failure_counts
from nsa_routing.dispatching import dispatch, plan_for, poll, reset
from nsa_routing.environment import Environment, probe
from nsa_routing.planning import Accepted, Plan, Rejected, explain, plan
from nsa_routing.policy import FLAGS, Policy
from nsa_routing.problem import OPS, Problem
from nsa_routing.profile import Profile, load_profile
from nsa_routing.rate_limit import RateLimit
from nsa_routing.together import judged_together, outcome

__all__ = [
    "FLAGS",
    "OPS",
    "Accepted",
    "Environment",
    "Plan",
    "Policy",
    "Problem",
    "Profile",
    "RateLimit",
    "Rejected",
    "__version__",
    "closed",
    "dispatch",
    "explain",
    "failure_counts",
    "judged_together",
    "load_profile",
    "outcome",
    "plan",
    "plan_for",
    "poll",
    "probe",
    "reset",
]
