"""Are names and signatures those that the design froze? A failure here is a change that users will notice."""

import inspect
from dataclasses import fields
from importlib.metadata import version

import nsa_routing
import pytest
from nsa_routing import Accepted, Environment, Plan, Policy, Problem, Profile, Rejected


def signature(function: object) -> str:
    """Parameters without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def test_names() -> None:
    assert sorted(nsa_routing.__all__) == [
        "Accepted",
        "Environment",
        "OPS",
        "Plan",
        "Policy",
        "Problem",
        "Profile",
        "Rejected",
        "__version__",
        "dispatch",
        "explain",
        "load_profile",
        "plan",
        "plan_for",
        "probe",
    ]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dispatch", "(op, problem, *, backend=None)"),
        ("explain", "(plan)"),
        ("load_profile", "(name_or_path)"),
        ("plan", "(environment, profile, problem, policy, closed=frozenset())"),
        ("plan_for", "(problem, policy=None)"),
        ("probe", "()"),
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
        (Rejected, ["backend", "reason"]),
        (Plan, ["problem", "candidates", "requested"]),
        (Policy, ["backends"]),
        (Environment, ["device", "sm", "torch", "triton", "flash_attn", "backends"]),
        (
            Problem,
            [
                *("op", "device", "dtype", "head_dim", "v_head_dim", "group_size"),
                *("needs_grad", "deterministic", "paged", "softcap", "sinks", "fp8_scales"),
            ],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_fields(made: type, names: list[str]) -> None:
    assert [field.name for field in fields(made)] == names


def test_fields_of_a_profile() -> None:
    assert list(Profile.model_fields) == ["name", "order"]


def test_the_version_is_that_of_the_metadata() -> None:
    assert nsa_routing.__version__ == version("nsa-routing")
