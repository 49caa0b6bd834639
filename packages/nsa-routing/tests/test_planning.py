"""Is a plan a pure function that ranks every candidate and gives a reason for each rejection?"""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from nsa_routing import OPS, Accepted, Plan, Policy, Problem, Rejected, backends, explain, plan

AUTOMATIC = Policy()
REQUESTED = Policy((("window_attention", "fast"),))


@pytest.fixture
def planned(environment: Callable, ordered: Callable, problem: Problem) -> Callable[..., Plan]:
    """The plan for `problem` with backends fast and sdpa installed, the profile and the rest as said."""

    def make(policy: Policy = AUTOMATIC, *, closed: frozenset = frozenset(), facts: dict | None = None, **changes: Any):
        machine = environment("fast", "sdpa", **facts or {})
        return plan(machine, ordered("fast", **changes), problem, policy, closed)

    return make


def test_the_first_that_accepts_is_chosen(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("sdpa", "other", fast={"window_attention": "needs a GPU"})
    chosen = plan(environment("fast", "other", "sdpa"), ordered("fast", "other"), problem, Policy(preset="perf"))
    candidates = (Rejected("fast", "needs a GPU"), Accepted("other"), Accepted("sdpa"))
    assert chosen == Plan(problem, candidates, None, "made", "perf")
    assert chosen.backend == "other"
    assert chosen.accepted == ("other", "sdpa")


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_its_own_order(
    op: str, install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("a", "b", "sdpa")
    profile = ordered("a", "b", order={name: ["b" if name == op else "a", "sdpa"] for name in OPS})
    for asked in OPS:
        chosen = plan(environment("a", "b", "sdpa"), profile, replace(problem, op=asked), Policy())
        assert chosen.backend == ("b" if asked == op else "a")


def test_backends_are_told_everything(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    made, machine = install("sdpa"), environment("sdpa", device="cuda", sm=90, triton="3.7.1")
    plan(machine, ordered(), problem, Policy())
    assert made["sdpa"].asked == [("window_attention", problem, machine)]


def test_nothing_around_a_plan_counts(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa", "other")
    arguments = environment("sdpa", "other"), ordered("other"), problem, Policy()
    before = plan(*arguments)
    assert before.backend == "other"
    monkeypatch.setenv("NSA_BACKEND", "sdpa")
    monkeypatch.setenv("NSA_NO_SUCH_FLAG", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a plan looked at the machine"))
    assert plan(*arguments) == before


# --- each reason, for automatic routes and for requests ---------------------------------------------------------------


def test_what_is_not_installed_is_rejected_unloaded(
    offer: Callable, fake_point: type, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    point = fake_point("fast", object())
    offer(point)
    for policy in (Policy(), REQUESTED):
        chosen = plan(environment("sdpa"), ordered("fast"), problem, policy)
        assert chosen.candidates[0] == Rejected("fast", "not installed (installed: sdpa)")
    nothing = plan(environment(), ordered("fast"), problem, Policy())
    assert nothing.candidates[0] == Rejected("fast", "not installed (installed: none)")
    assert nothing.backend is None
    assert point.loads == 0


DENIAL = {"adr": "0042", "reason": "it burns"}


@pytest.mark.parametrize("policy", [Policy(), Policy(triton_sel_force=True), REQUESTED], ids=repr)
def test_a_denial_holds_for_requests_too(policy: Policy, install: Callable, planned: Callable) -> None:
    made = install("fast", "sdpa")
    chosen = planned(policy, denials={"window_attention": {"fast": DENIAL}})
    assert chosen.candidates[0] == Rejected("fast", "denied by ADR 0042: it burns")
    assert made["fast"].asked == []
    assert planned(policy, denials={"combine": {"fast": DENIAL}}).backend == "fast"


def test_a_denial_names_the_flag_that_lifts_it(install: Callable, planned: Callable) -> None:
    install("fast", "sdpa")
    denials = {"window_attention": {"fast": DENIAL | {"lifted_by": "NSA_TRITON_SEL_FORCE"}}}
    for policy in (Policy(), REQUESTED):
        reason = "denied by ADR 0042: it burns; NSA_TRITON_SEL_FORCE=1 allows it"
        assert planned(policy, denials=denials).candidates[0] == Rejected("fast", reason)
        assert planned(replace(policy, triton_sel_force=True), denials=denials).backend == "fast"


def test_a_lifted_denial_does_not_lift_the_preset(install: Callable, planned: Callable) -> None:
    install("fast", "sdpa")
    denials = {"window_attention": {"fast": DENIAL | {"lifted_by": "NSA_TRITON_SEL_FORCE"}}}
    forced = Policy(triton_sel_force=True)
    chosen = planned(forced, denials=denials, presets={"perf": {"fast": "always"}})
    assert chosen.candidates[0] == Rejected("fast", "preset safe does not take it; NSA_PRESET=perf does")


@pytest.mark.parametrize("name", ["fa2", "fa2-torch"])
def test_fa2_can_be_switched_off(
    name: str, install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install(name, "cudnn", "sdpa")
    machine, off = environment(name, "cudnn", "sdpa"), Policy(fa2="0")
    chosen = plan(machine, ordered(name, "cudnn"), problem, off)
    assert chosen.candidates == (Rejected(name, "NSA_FA2=0"), Accepted("cudnn"), Accepted("sdpa"))
    requested = plan(machine, ordered(name), problem, replace(off, backends=(("window_attention", name),)))
    assert requested.candidates == (Rejected(name, "NSA_FA2=0"),)


@pytest.mark.parametrize("error", [ImportError("libcuda.so.1: not found"), OSError("no such file")])
def test_what_does_not_load_is_rejected(
    error: Exception, offer: Callable, fake_point: type, fake_backend: type, planned: Callable
) -> None:
    class Broken(fake_point):
        def load(self) -> object:
            raise error

    offer(Broken("fast", None), fake_point("sdpa", fake_backend("sdpa")))
    rejected = Rejected("fast", f"is broken: {type(error).__name__}: {error}")
    assert planned().candidates == (rejected, Accepted("sdpa"))
    assert planned(REQUESTED).candidates == (rejected,)


def test_what_is_no_backend_is_rejected(offer: Callable, fake_point: type, planned: Callable) -> None:
    offer(fake_point("fast", object(), "made:BACKEND"))
    reason = planned().candidates[0].reason
    assert reason.startswith("is broken: TypeError: backend fast: expected an object with name='fast' and refuse()")


def test_a_bug_in_a_backend_is_a_reason(
    offer: Callable, fake_point: type, fake_backend: type, planned: Callable
) -> None:
    class Broken(fake_backend):
        def refuse(self, *_: object) -> str | None:
            raise ZeroDivisionError("a bug")

    offer(fake_point("fast", Broken("fast")), fake_point("sdpa", fake_backend("sdpa")))
    assert planned().candidates == (Rejected("fast", "is broken: ZeroDivisionError: a bug"), Accepted("sdpa"))


def test_a_backend_that_refuses_is_believed(install: Callable, planned: Callable) -> None:
    install("sdpa", fast={"window_attention": "needs a GPU", "combine": "cannot"})
    assert planned().candidates == (Rejected("fast", "needs a GPU"), Accepted("sdpa"))
    assert planned(REQUESTED).candidates == (Rejected("fast", "needs a GPU"),)


def test_a_backend_without_the_operation(install: Callable, fake_backend: type, planned: Callable) -> None:
    install("sdpa", fake_backend("fast", lacks=("window_attention",)))
    assert planned().candidates == (Rejected("fast", "has no operation window_attention"), Accepted("sdpa"))
    assert planned(REQUESTED).candidates == (Rejected("fast", "has no operation window_attention"),)


@pytest.mark.parametrize(
    "presets, reason",
    [
        ({"perf": {"fast": "always"}}, "preset safe does not take it; NSA_PRESET=perf does"),
        ({}, "preset safe does not take it; NSA_BACKEND can name it"),
    ],
)
def test_a_preset_that_does_not_take_it(
    presets: dict, reason: str, install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("fast", "sdpa")
    machine, profile = environment("fast", "sdpa"), ordered("fast", presets=presets)
    assert plan(machine, profile, problem, Policy()).candidates == (Rejected("fast", reason), Accepted("sdpa"))
    assert plan(machine, profile, problem, Policy(preset="perf")).backend == ("fast" if presets else "sdpa")
    assert plan(machine, profile, problem, REQUESTED).candidates == (Accepted("fast"),)


def test_closed_routes_are_not_taken(install: Callable, planned: Callable) -> None:
    install("fast", "sdpa")
    closed = frozenset({("fast", "window_attention", "cpu")})
    reason = "closed on cpu after a failure, until nsa_routing.reset()"
    assert planned(closed=closed).candidates == (Rejected("fast", reason), Accepted("sdpa"))
    assert planned(REQUESTED, closed=closed).candidates == (Rejected("fast", reason),)
    for other in (
        ("fast", "combine", "cpu"),
        ("fast", "window_attention", "cuda:0"),
        ("sdpa", "window_attention", "cpu"),
    ):
        assert planned(closed=frozenset({other})).backend == "fast"


def test_each_device_has_its_own_routes(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("fast", "sdpa")
    machine, closed = environment("fast", "sdpa", device="cuda"), frozenset({("fast", "window_attention", "cuda:1")})
    for index, backend in ((0, "fast"), (1, "sdpa")):
        asked = replace(problem, device="cuda", device_index=index)
        assert plan(machine, ordered("fast"), asked, Policy(), closed).backend == backend


# --- the wrong Triton -------------------------------------------------------------------------------------------------

WRONG = {"torch": "2.11.0+cu130", "triton": "3.7.1"}
MESSAGE = "torch 2.11.0+cu130 needs triton 3.6, got triton 3.7.1"


@pytest.fixture
def triton_installed(install: Callable, fake_backend: type) -> None:
    install("sdpa", fake_backend("fast", uses_triton=True))


@pytest.mark.usefixtures("triton_installed")
@pytest.mark.parametrize("policy", [Policy(), REQUESTED], ids=["automatic", "requested"])
def test_a_wrong_triton_stops_a_route_that_would_reach_it(policy: Policy, planned: Callable) -> None:
    chosen = planned(policy, facts=WRONG)
    assert chosen.candidates[0] == Rejected("fast", MESSAGE, fatal=True)
    assert chosen.backend is None, "sdpa does not hide the mistake"
    assert explain(chosen).splitlines()[1] == f"  fast  stops here: {MESSAGE}"
    for right in ({"torch": "2.13.0", "triton": "3.7.1"}, WRONG | {"triton_pin": "3.7.0"}, WRONG | {"triton": None}):
        assert planned(policy, facts=right).backend == "fast"


@pytest.mark.usefixtures("triton_installed")
@pytest.mark.parametrize(
    "policy, changes",
    [
        (Policy(), {"presets": {"perf": {"fast": "always"}}}),
        (Policy(), {"presets": {"safe": {"fast": "measured"}}}),
        (Policy(), {"denials": {"window_attention": {"fast": DENIAL}}}),
        (Policy((("window_attention", "sdpa"),)), {}),
    ],
    ids=["preset", "threshold", "denied", "another requested"],
)
def test_a_wrong_triton_that_is_never_reached_stops_nothing(policy: Policy, changes: dict, planned: Callable) -> None:
    chosen = planned(policy, facts=WRONG, **changes)
    assert chosen.backend == "sdpa"
    assert not any(candidate.fatal for candidate in chosen.candidates if isinstance(candidate, Rejected))


@pytest.mark.usefixtures("triton_installed")
def test_a_wrong_triton_on_a_closed_route_stops_nothing(planned: Callable) -> None:
    assert planned(facts=WRONG, closed=frozenset({("fast", "window_attention", "cpu")})).backend == "sdpa"


def test_a_wrong_triton_behind_a_better_backend_ends_its_fallbacks(
    install: Callable, fake_backend: type, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("sdpa", "better", fake_backend("fast", uses_triton=True))
    chosen = plan(environment("better", "fast", "sdpa", **WRONG), ordered("better", "fast"), problem, Policy())
    assert chosen.candidates[1] == Rejected("fast", MESSAGE, fatal=True)
    assert chosen.backend == "better"
    assert chosen.accepted == ("better",), "a failing route does not go around the wrong pair either"


def test_what_does_not_use_triton_does_not_care(install: Callable, planned: Callable) -> None:
    install("fast", "sdpa")
    assert planned(facts=WRONG).backend == "fast"


# --- the order of reasons ---------------------------------------------------------------------------------------------


def test_the_reason_given_is_the_first_that_holds(
    offer: Callable, fake_point: type, fake_backend: type, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    """Everything is wrong with fa2; as each obstacle goes, the next one is named."""
    backend = fake_backend("fa2", {"window_attention": "needs a GPU"}, uses_triton=True, lacks=("window_attention",))
    threshold = {"at_least": {"total_q": 8}, "not_measured": "no GPU at hand"}
    state: dict[str, Any] = {
        "installed": ("sdpa",),
        "held": object(),
        "policy": Policy(fa2="0"),
        "denials": {"window_attention": {"fa2": DENIAL | {"lifted_by": "NSA_TRITON_SEL_FORCE"}}},
        "presets": {"perf": {"fa2": "opt-in"}},
        "thresholds": {"combine": {"fa2": threshold}},
        "total_q": 7,
        "closed": frozenset({("fa2", "window_attention", "cpu")}),
        "facts": WRONG,
    }
    steps: list[tuple[dict[str, Any], str | None]] = [
        ({}, "not installed (installed: sdpa)"),
        ({"installed": ("fa2", "sdpa")}, "denied by ADR 0042: it burns; NSA_TRITON_SEL_FORCE=1 allows it"),
        ({"policy": Policy(fa2="0", triton_sel_force=True)}, "NSA_FA2=0"),
        ({"policy": Policy(triton_sel_force=True)}, "is broken: TypeError: "),
        ({"held": backend}, "needs a GPU"),
        ({"refuses": {}}, "has no operation window_attention"),
        ({"lacks": ()}, "preset safe does not take it; NSA_PRESET=perf does"),
        (
            {"policy": Policy(triton_sel_force=True, preset="perf")},
            "opt-in: NSA_FA2=1 takes it where its threshold allows",
        ),
        ({"policy": Policy(triton_sel_force=True, preset="perf", fa2="1")}, "profile made has no threshold for it"),
        ({"thresholds": {"window_attention": {"fa2": threshold}}}, "pays from total_q 8, got 7"),
        ({"total_q": 8}, "closed on cpu after a failure, until nsa_routing.reset()"),
        ({"closed": frozenset()}, MESSAGE),
        ({"facts": {}}, None),
    ]
    for change, reason in steps:
        for key in ("refuses", "lacks"):
            if key in change:
                setattr(backend, key, change[key])
        state |= change
        offer(fake_point("sdpa", fake_backend("sdpa")), fake_point("fa2", state["held"]))
        backends.load_backend.cache_clear()
        profile = ordered("fa2", **{key: state[key] for key in ("denials", "presets", "thresholds")})
        machine, asked = environment(*state["installed"], **state["facts"]), replace(problem, total_q=state["total_q"])
        first, last = plan(machine, profile, asked, state["policy"], state["closed"]).candidates
        assert last == Accepted("sdpa")
        if reason is None:
            assert first == Accepted("fa2")
        else:
            assert first.reason.startswith(reason), change
            assert first.fatal == (reason == MESSAGE)


def test_a_request_is_the_only_candidate(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("sdpa", "other", fast={"window_attention": "needs a GPU"})
    machine, profile = environment("fast", "other", "sdpa"), ordered("other")
    for name, verdict in (("other", Accepted("other")), ("fast", Rejected("fast", "needs a GPU"))):
        policy = Policy((("window_attention", name),))
        assert plan(machine, profile, problem, policy) == Plan(problem, (verdict,), name, "made", "safe")
    elsewhere = plan(machine, profile, problem, Policy((("combine", "sdpa"),)))
    assert (elsewhere.backend, elsewhere.requested) == ("other", None)


def test_a_request_need_not_be_in_the_order(
    install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("sdpa", "fast")
    assert plan(environment("fast", "sdpa"), ordered(), problem, REQUESTED).backend == "fast"


# --- what a plan looks like -------------------------------------------------------------------------------------------


def test_plans_are_frozen(problem: Problem) -> None:
    for made, name in ((Plan(problem, ()), "candidates"), (Accepted("a"), "backend"), (Rejected("a", "b"), "reason")):
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, None)


def test_explain_is_a_table(problem: Problem) -> None:
    candidates = (Rejected("triton", "needs CUDA"), Accepted("fa2"), Rejected("x", "bad", fatal=True), Accepted("sdpa"))
    assert explain(Plan(problem, candidates)).splitlines() == [
        "window_attention on cpu, torch.float32, head_dim 64/32, group size 4",
        "  triton  rejected: needs CUDA",
        "  fa2     chosen",
        "  x       stops here: bad",
        "  sdpa    accepted",
    ]
    assert explain(Plan(problem, ())) == "window_attention on cpu, torch.float32, head_dim 64/32, group size 4"
