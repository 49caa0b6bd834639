"""Which backend a workload's operations run on, and who decided so: what a row of nsa-bench says of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from nsa_routing import OPS, Plan, Policy, Rejected, plan_for
from nsa_routing.workload import Workload
from nsa_varlen.benchmarks.workload import Value

AUTO = "auto"  # the parameter `backend`: the plan decides


def name_of(backend: Value) -> str | None:
    """As operations take it."""
    return None if backend == AUTO else str(backend)


def plans(ops: Sequence[str], layer: Workload, backend: Value) -> list[Plan]:
    """What `nsa.ops` would run each operation on."""
    policy = Policy.from_env()
    if backend != AUTO:
        policy = replace(policy, backends=tuple((op, str(backend)) for op in OPS))
    return [plan_for(layer.problem(op), policy) for op in ops]


def refusal(ops: Sequence[str], layer: Workload, backend: Value) -> str | None:
    """Why an operation would not run, in words; None if all do.

    Interpreted kernels would: but how long that takes says nothing.
    """
    if layer.device == "cpu" and backend == "triton":
        return "triton: needs a GPU; interpreted kernels are not timed"
    for op, made in zip(ops, plans(ops, layer, backend), strict=True):
        if made.backend is None:
            reasons = [f"{found.backend}: {found.reason}" for found in made.candidates if hasattr(found, "reason")]
            return f"{op}: {'; '.join(reasons)}"
    return None


def facts(ops: Sequence[str], layer: Workload, backend: Value) -> dict[str, Value]:
    """backend, why, profile and preset: the backend of most operations, and op=name for the others.

    `why` is "requested", or "plan" with the reasons against the backends that it would have taken before.
    """
    made = dict(zip(ops, plans(ops, layer, backend), strict=True))
    names = {op: str(chosen.backend) for op, chosen in made.items()}
    ((most, _),) = Counter(names.values()).most_common(1)
    chosen = next(iter(made.values()))
    return {
        "backend": " ".join([most, *(f"{op}={name}" for op, name in names.items() if name != most)]),
        "why": "requested" if chosen.requested is not None else "; ".join(["plan", *_against(made)]),
        "profile": chosen.profile,
        "preset": chosen.preset,
    }


def _against(made: Mapping[str, Plan]) -> list[str]:
    """What stood in the way of better candidates than the chosen ones, each reason once, with its operations."""
    reasons: dict[str, list[str]] = {}
    for op, chosen in made.items():
        for candidate in takewhile(lambda found: isinstance(found, Rejected), chosen.candidates):
            assert isinstance(candidate, Rejected)
            reasons.setdefault(f"not {candidate.backend}: {candidate.reason}", []).append(op)
    return [f"{reason} ({', '.join(ops)})" for reason, ops in reasons.items()]


def layer_of(device: str, queries: int, keys: int, **sizes: Any) -> Workload:
    """The problem that these parameters are, for every operation."""
    batch, heads, kv_heads = (int(sizes[name]) for name in ("batch", "num_heads", "num_kv_heads"))
    dim = int(sizes["head_dim"])
    return Workload(
        device,
        getattr(torch, str(sizes["dtype"])),
        head_dim=dim,
        v_head_dim=dim,
        group_size=heads // kv_heads,
        total_q=batch * queries,
        max_seqlen_q=queries,
        max_seqlen_k=keys,
        needs_grad=sizes.get("direction") == "training",
    )
