"""Are names and signatures those that the design froze? A failure here is a change that users will notice."""

import inspect
from dataclasses import fields
from importlib.metadata import version

import nsa_routing
import pytest
from nsa_routing import Accepted, Environment, Plan, Policy, Problem, Profile, Rejected
from nsa_routing.profile import Denial, Lengths, Measurement, Threshold


def signature(function: object) -> str:
    """Parameters without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def test_names() -> None:
    assert sorted(nsa_routing.__all__) == [
        "Accepted",
        "Environment",
        "FLAGS",
        "OPS",
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
    assert all(hasattr(nsa_routing, name) for name in nsa_routing.__all__)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("RateLimit", "(every=0, seconds=0.0, clock=<built-in function monotonic>)"),
        ("closed", "()"),
        ("dispatch", "(op, problem, *, backend=None)"),
        ("explain", "(plan)"),
        ("judged_together", "()"),
        ("load_profile", "(name_or_path)"),
        ("outcome", "(x)"),
        ("plan", "(environment, profile, problem, policy, closed=frozenset())"),
        ("plan_for", "(problem, policy=None)"),
        ("poll", "()"),
        ("probe", "(device=None, index=0)"),
        ("reset", "()"),
    ],
)
def test_signatures(name: str, expected: str) -> None:
    assert signature(getattr(nsa_routing, name)) == expected


def test_policy_reads_the_environment() -> None:
    assert signature(Policy.from_env) == "(environ=None)"


@pytest.mark.parametrize(
    "made, names",
    [
        (Accepted, ["backend"]),
        (Rejected, ["backend", "reason", "fatal"]),
        (Plan, ["problem", "candidates", "requested", "profile", "preset"]),
        (
            Policy,
            [
                *("backends", "preset", "profile", "triton_sel_force", "fa2", "fallback", "check_finite"),
                *("deterministic", "log", "log_every", "log_seconds"),
            ],
        ),
        (
            Environment,
            [
                *("device", "sm", "torch", "triton", "flash_attn", "backends"),
                *("name", "memory", "cuda", "driver", "triton_pin", "cudnn", "unknown"),
            ],
        ),
        (
            Problem,
            [
                *("op", "device", "dtype", "head_dim", "v_head_dim", "group_size"),
                *("needs_grad", "deterministic", "paged", "softcap", "sinks", "fp8_scales", "device_index"),
                *("kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks", "window_size"),
                *("uniform", "total_q", "max_seqlen_q", "max_seqlen_k"),
            ],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_fields(made: type, names: list[str]) -> None:
    assert [field.name for field in fields(made)] == names


@pytest.mark.parametrize(
    "model, names",
    [
        (Profile, ["name", "source", "order", "presets", "thresholds", "prefer", "denials", "pins"]),
        (Threshold, ["at_least", "at_most", "measured", "not_measured"]),
        (Measurement, ["date", "gpu", "csv", "versions"]),
        (Denial, ["adr", "reason", "lifted_by"]),
        (Lengths, ["total_q", "max_seqlen_q", "max_seqlen_k"]),
    ],
)
def test_keys_of_a_profile(model: type, names: list[str]) -> None:
    assert list(model.model_fields) == names


def test_the_version_is_that_of_the_metadata() -> None:
    assert nsa_routing.__version__ == version("nsa-routing")
