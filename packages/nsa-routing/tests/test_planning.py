"""Is a plan a pure function that ranks every candidate and gives a reason for each rejection?"""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from nsa_routing import OPS, Accepted, Plan, Policy, Problem, Rejected, explain, plan


def test_the_first_that_accepts_is_chosen(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("sdpa", "other", fast={"window_attention": "needs a GPU"})
    chosen = plan(environment("fast", "other", "sdpa"), ordered("fast", "other", "sdpa"), problem, Policy())
    assert chosen == Plan(problem, (Rejected("fast", "needs a GPU"), Accepted("other"), Accepted("sdpa")), None)
    assert chosen.backend == "other"


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_its_own_order(
    op: str, install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("a", "b")
    profile = ordered("a", "b").model_copy(update={"order": {name: ["b" if name == op else "a"] for name in OPS}})
    for asked in OPS:
        chosen = plan(environment("a", "b"), profile, replace(problem, op=asked), Policy())
        assert chosen.backend == ("b" if asked == op else "a")


def test_backends_are_told_everything(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    made, machine = install("sdpa"), environment("sdpa", device="cuda", sm=90, triton="3.7.1")
    plan(machine, ordered("sdpa"), problem, Policy())
    assert made["sdpa"].asked == [("window_attention", problem, machine)]


def test_same_arguments_same_plan(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("sdpa", fast={"window_attention": "no"})
    arguments = environment("fast", "sdpa"), ordered("fast", "sdpa"), problem, Policy()
    assert plan(*arguments) == plan(*arguments)


def test_nothing_around_a_plan_counts(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa", "other")
    arguments = environment("sdpa", "other"), ordered("other", "sdpa"), problem, Policy()
    before = plan(*arguments)
    monkeypatch.setenv("NSA_BACKEND", "sdpa")
    monkeypatch.setenv("NSA_NO_SUCH_FLAG", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a plan looked at the machine"))
    assert plan(*arguments) == before


def test_what_is_not_installed_is_rejected_unloaded(
    offer: Callable, fake_point: type, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    point = fake_point("fast", object())
    offer(point)
    chosen = plan(environment("sdpa"), ordered("fast"), problem, Policy())
    assert chosen.candidates == (Rejected("fast", "not installed (installed: sdpa)"),)
    assert chosen.backend is None
    assert point.loads == 0
    nothing = plan(environment(), ordered("fast"), problem, Policy())
    assert nothing.candidates == (Rejected("fast", "not installed (installed: none)"),)


def test_a_request_is_the_only_candidate(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("sdpa", "other", fast={"window_attention": "needs a GPU"})
    machine, profile = environment("fast", "other", "sdpa"), ordered("sdpa", "other")
    for name, verdict in (("other", Accepted("other")), ("fast", Rejected("fast", "needs a GPU"))):
        policy = Policy((("window_attention", name),))
        assert plan(machine, profile, problem, policy) == Plan(problem, (verdict,), name)
    elsewhere = plan(machine, profile, problem, Policy((("combine", "other"),)))
    assert (elsewhere.backend, elsewhere.requested) == ("sdpa", None)


def test_closed_routes_are_not_taken(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    made = install("fast", "sdpa")
    arguments = environment("fast", "sdpa"), ordered("fast", "sdpa"), problem, Policy()
    closed = frozenset({("fast", "window_attention", "cpu")})
    chosen = plan(*arguments, closed)
    assert chosen.candidates == (Rejected("fast", "closed on cpu after a failure"), Accepted("sdpa"))
    assert made["fast"].asked == []
    for other in (
        ("fast", "combine", "cpu"),
        ("fast", "window_attention", "cuda"),
        ("sdpa", "window_attention", "cpu"),
    ):
        assert plan(*arguments, frozenset({other})).backend == "fast"


def test_a_request_for_a_closed_route_is_rejected(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("fast", "sdpa")
    policy, closed = Policy((("window_attention", "fast"),)), frozenset({("fast", "window_attention", "cpu")})
    chosen = plan(environment("fast", "sdpa"), ordered("sdpa"), problem, policy, closed)
    assert chosen.candidates == (Rejected("fast", "closed on cpu after a failure"),)


def test_what_a_backend_raises_is_not_swallowed(
    offer: Callable, fake_point: type, fake_backend: type, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    class Broken(fake_backend):
        def refuse(self, *_: object) -> str | None:
            raise ZeroDivisionError("a bug")

    offer(fake_point("fast", Broken("fast")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        plan(environment("fast", "sdpa"), ordered("fast", "sdpa"), problem, Policy())


def test_plans_are_frozen(problem: Problem) -> None:
    for made, name in ((Plan(problem, ()), "candidates"), (Accepted("a"), "backend"), (Rejected("a", "b"), "reason")):
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, None)


def test_explain_is_a_table(problem: Problem) -> None:
    made = Plan(problem, (Rejected("triton", "needs CUDA"), Accepted("fa2"), Accepted("sdpa")))
    assert explain(made).splitlines() == [
        "window_attention on cpu, torch.float32, head_dim 64/32, group size 4",
        "  triton  rejected: needs CUDA",
        "  fa2     chosen",
        "  sdpa    accepted",
    ]


def test_explain_states_what_is_asked_for(problem: Problem) -> None:
    asked = replace(problem, needs_grad=True, deterministic=True, paged=True)
    assert explain(Plan(asked, ())) == (
        "window_attention on cpu, torch.float32, head_dim 64/32, group size 4, needs_grad, deterministic, paged"
    )


@pytest.mark.parametrize("feature", ["softcap", "sinks", "fp8_scales"])
def test_explain_states_reserved_features(feature: str, problem: Problem) -> None:
    """They are what a backend refuses by: the table must show them."""
    assert explain(Plan(replace(problem, **{feature: True}), ())).endswith(f"group size 4, {feature}")
