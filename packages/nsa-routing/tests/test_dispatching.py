"""Does an operation run where the plan says, and does a request get obeyed or an answer?"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from nsa_routing import OPS, Policy, Problem, dispatch, dispatching, explain, plan_for


@pytest.fixture
def order(ordered: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these backends the profile's order for every op."""

    def use(*names: str) -> None:
        monkeypatch.setattr(dispatching, "load_profile", lambda name: ordered(*names))

    return use


@pytest.mark.parametrize("op", OPS)
def test_the_plan_is_followed(op: str, install: Callable, order: Callable, problem: Problem) -> None:
    install("sdpa", fast={"combine": "cannot combine"})
    order("fast", "sdpa")
    run = dispatch(op, replace(problem, op=op))
    assert run(1, 2) == ("sdpa" if op == "combine" else "fast", op, (1, 2))


def test_the_shipped_base_profile_is_the_default(install: Callable, problem: Problem) -> None:
    install("sdpa", "other")
    assert dispatch("window_attention", problem)() == ("sdpa", "window_attention", ())
    assert plan_for(problem).backend == "sdpa"


def test_a_named_backend_is_obeyed(install: Callable, order: Callable, problem: Problem) -> None:
    install("sdpa", "other")
    order("sdpa")
    assert dispatch("window_attention", problem, backend="other")()[0] == "other"
    assert dispatch("window_attention", problem, backend="sdpa")()[0] == "sdpa"
    assert dispatch("window_attention", problem)()[0] == "sdpa"


def test_a_named_backend_that_refuses_raises_with_the_table(
    install: Callable, order: Callable, problem: Problem
) -> None:
    install("sdpa", fast={"window_attention": "needs a GPU"})
    order("fast", "sdpa")
    with pytest.raises(RuntimeError) as caught:
        dispatch("window_attention", problem, backend="fast")
    assert str(caught.value).splitlines() == [
        "no backend accepts the problem (requested: fast)",
        "window_attention on cpu, torch.float32, head_dim 64/32, group size 4",
        "  fast  rejected: needs a GPU",
    ]


def test_no_candidate_raises_with_every_reason(install: Callable, order: Callable, problem: Problem) -> None:
    install(sdpa={"window_attention": "no pages"}, fast={"window_attention": "no GPU"})
    order("fast", "sdpa", "absent")
    with pytest.raises(RuntimeError) as caught:
        dispatch("window_attention", problem)
    assert str(caught.value).splitlines() == [
        "no backend accepts the problem",
        "window_attention on cpu, torch.float32, head_dim 64/32, group size 4",
        "  fast    rejected: no GPU",
        "  sdpa    rejected: no pages",
        "  absent  rejected: not installed (installed: fast, sdpa)",
    ]


def test_a_name_that_is_not_installed(install: Callable, problem: Problem) -> None:
    install("sdpa", "fa2")
    with pytest.raises(ValueError, match=r"^backend: expected one of \['fa2', 'sdpa'\], got 'triton'$"):
        dispatch("window_attention", problem, backend="triton")


def test_the_flag_is_obeyed(
    install: Callable, order: Callable, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa", "other", fast={"window_attention": "needs a GPU"})
    order("sdpa")
    monkeypatch.setenv("NSA_BACKEND", "window_attention=other")
    assert dispatch("window_attention", problem)()[0] == "other"
    assert dispatch("combine", replace(problem, op="combine"))()[0] == "sdpa"
    monkeypatch.setenv("NSA_BACKEND", "fast")
    with pytest.raises(RuntimeError, match=r"requested: fast(.|\n)*fast +rejected: needs a GPU"):
        dispatch("window_attention", problem)
    monkeypatch.setenv("NSA_BACKEND", "absent")
    with pytest.raises(RuntimeError, match=r"requested: absent(.|\n)*absent +rejected: not installed"):
        dispatch("window_attention", problem)
    monkeypatch.delenv("NSA_BACKEND")
    assert dispatch("window_attention", problem)()[0] == "sdpa"


def test_an_argument_outranks_the_flag(install: Callable, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    install("sdpa", "other")
    monkeypatch.setenv("NSA_BACKEND", "other")
    assert dispatch("window_attention", problem, backend="sdpa")()[0] == "sdpa"


def test_a_bad_flag_stops_even_a_named_backend(
    install: Callable, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa")
    monkeypatch.setenv("NSA_PRESTE", "perf")
    for name in (None, "sdpa"):
        with pytest.raises(ValueError, match=r"^NSA_PRESTE: expected one of the variables"):
            dispatch("window_attention", problem, backend=name)


def test_op_and_problem_agree(install: Callable, problem: Problem) -> None:
    install("sdpa")
    with pytest.raises(ValueError, match=r"^op: expected problem.op='window_attention', got 'combine'$"):
        dispatch("combine", problem)


def test_a_plan_is_made_once_for_equal_problems(install: Callable, problem: Problem) -> None:
    made = install("sdpa")
    assert dispatch("window_attention", problem)()[0] == "sdpa"
    dispatch("window_attention", replace(problem))
    assert len(made["sdpa"].asked) == 1
    dispatch("window_attention", replace(problem, needs_grad=True))
    assert [asked[1].needs_grad for asked in made["sdpa"].asked] == [False, True]


def test_plan_for_is_what_dispatch_follows(
    install: Callable, order: Callable, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa", "other", fast={"window_attention": "needs a GPU"})
    order("fast", "other", "sdpa")
    assert plan_for(problem).backend == dispatch("window_attention", problem)()[0] == "other"
    asked = plan_for(problem, Policy((("window_attention", "sdpa"),)))
    assert (asked.backend, asked.requested) == ("sdpa", "sdpa")
    monkeypatch.setenv("NSA_BACKEND", "fast")
    assert explain(plan_for(problem)).endswith("  fast  rejected: needs a GPU")
    assert plan_for(problem, Policy()).backend == "other"
