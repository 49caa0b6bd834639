"""Does an operation run where the plan says, and does a request get obeyed or an answer?"""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa_routing import OPS, Policy, Problem, dispatch, dispatching, explain, plan_for, reset

X = torch.ones(2, 1, 4)


@pytest.fixture
def runs(install: Callable, order: Callable, fake_backend: type) -> dict[str, Any]:
    """Backends other, sdpa, and fast, which cannot combine; their order is fast, other, sdpa."""
    made = install("other", "sdpa", fast={"combine": "cannot combine"})
    order("fast", "other")
    return made


def ran(made: dict[str, Any]) -> list[tuple[str, str]]:
    """(backend, op) of each operation since the last question."""
    calls = [(name, op) for name, backend in made.items() for op, _ in backend.calls]
    for backend in made.values():
        backend.calls.clear()
    return calls


@pytest.mark.parametrize("op", OPS)
def test_the_plan_is_followed(op: str, runs: dict, problem: Problem) -> None:
    dispatch(op, replace(problem, op=op))(X)
    assert ran(runs) == [("other" if op == "combine" else "fast", op)]


def test_without_a_gpu_the_profile_is_that_of_a_cpu(install: Callable, problem: Problem) -> None:
    made = install("sdpa", "triton", "fa2")
    dispatch("window_attention", problem)(X)
    assert ran(made) == [("sdpa", "window_attention")]
    assert (plan_for(problem).backend, plan_for(problem).profile) == ("sdpa", "cpu")


def test_arguments_and_results_pass_unchanged(install: Callable, order: Callable, fake_backend: type, problem: Problem):
    seen = []

    def run(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((args, options))
        return answer

    answer = torch.ones(2, 1, 4), torch.zeros(1, 2)
    install("sdpa", fake_backend("fast", runs={"window_attention": run}))
    order("fast")
    got = dispatch("window_attention", problem)(X, "layout", scale=0.5)
    assert got is answer
    assert seen == [((X, "layout"), {"scale": 0.5})]


def test_a_named_backend_is_obeyed(runs: dict, problem: Problem) -> None:
    for name in ("other", "sdpa", "fast"):
        dispatch("window_attention", problem, backend=name)(X)
        assert ran(runs) == [(name, "window_attention")]


def test_a_named_backend_that_refuses_raises_with_the_table(runs: dict, problem: Problem) -> None:
    with pytest.raises(RuntimeError) as caught:
        dispatch("combine", replace(problem, op="combine"), backend="fast")
    assert str(caught.value).splitlines() == [
        "no backend accepts the problem (requested: fast)",
        "combine on cpu, torch.float32, head_dim 64/32, group size 4",
        "  fast  rejected: cannot combine",
        "without the request:",
        "  fast   rejected: cannot combine",
        "  other  chosen",
        "  sdpa   accepted",
    ]


def test_no_candidate_raises_with_every_reason(install: Callable, order: Callable, problem: Problem) -> None:
    install(sdpa={"window_attention": "no pages"}, fast={"window_attention": "no GPU"})
    order("fast", "absent")
    with pytest.raises(RuntimeError) as caught:
        dispatch("window_attention", problem)
    assert str(caught.value).splitlines() == [
        "no backend accepts the problem",
        "window_attention on cpu, torch.float32, head_dim 64/32, group size 4",
        "  fast    rejected: no GPU",
        "  absent  rejected: not installed (installed: fast, sdpa)",
        "  sdpa    rejected: no pages",
    ]


@pytest.mark.parametrize("backend", [None, "fast"])
def test_a_wrong_triton_raises_where_it_would_run(
    backend: str | None,
    install: Callable,
    order: Callable,
    fake_backend: type,
    environment: Callable,
    problem: Problem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("sdpa", fake_backend("fast", uses_triton=True))
    order("fast")
    machine = environment("fast", "sdpa", torch="2.11.0+cu130", triton="3.7.1")
    monkeypatch.setattr(dispatching, "probe", lambda *_: machine)
    with pytest.raises(RuntimeError, match=r"stops here: torch 2.11.0\+cu130 needs triton 3.6, got triton 3.7.1"):
        dispatch("window_attention", problem, backend=backend)
    assert dispatch("window_attention", problem, backend="sdpa") is not None
    order("fast", presets={"perf": {"fast": "always"}})
    assert plan_for(problem).backend == "sdpa"
    assert dispatch("window_attention", problem) is not None


def test_a_name_that_is_not_installed(install: Callable, problem: Problem) -> None:
    install("sdpa", "fa2")
    with pytest.raises(ValueError, match=r"^backend: expected one of \['fa2', 'sdpa'\], got 'triton'$"):
        dispatch("window_attention", problem, backend="triton")


def test_the_flag_is_obeyed(runs: dict, problem: Problem, flags: Callable) -> None:
    flags(BACKEND="window_attention=other")
    dispatch("window_attention", problem)(X)
    dispatch("select_blocks", replace(problem, op="select_blocks"))(X)
    assert sorted(ran(runs)) == [("fast", "select_blocks"), ("other", "window_attention")]
    flags(BACKEND="fast")
    with pytest.raises(RuntimeError, match=r"requested: fast(.|\n)*fast +rejected: cannot combine"):
        dispatch("combine", replace(problem, op="combine"))
    flags(BACKEND="absent")
    with pytest.raises(RuntimeError, match=r"requested: absent(.|\n)*absent +rejected: not installed"):
        dispatch("window_attention", problem)
    flags(BACKEND=None)
    dispatch("window_attention", problem)(X)
    assert ran(runs) == [("fast", "window_attention")]


def test_an_argument_outranks_the_flag(runs: dict, problem: Problem, flags: Callable) -> None:
    flags(BACKEND="other")
    dispatch("window_attention", problem, backend="sdpa")(X)
    assert ran(runs) == [("sdpa", "window_attention")]


def test_flags_are_read_once(runs: dict, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first operation; a process that changes them later says reset()."""
    dispatch("window_attention", problem)
    monkeypatch.setenv("NSA_BACKEND", "other")
    assert plan_for(problem).backend == "fast"
    reset()
    assert plan_for(problem).backend == "other"


def test_a_bad_flag_stops_even_a_named_backend(
    install: Callable, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa")
    monkeypatch.setenv("NSA_PRESTE", "perf")
    for name in (None, "sdpa"):
        with pytest.raises(ValueError, match=r"^NSA_PRESTE: expected one of the variables"):
            dispatch("window_attention", problem, backend=name)


def test_a_bad_profile_stops_everything(install: Callable, problem: Problem, flags: Callable) -> None:
    install("sdpa")
    flags(PROFILE="sm9000")
    with pytest.raises(ValueError, match=r"^profile: expected one of .*, got 'sm9000'$"):
        dispatch("window_attention", problem, backend="sdpa")


def test_op_and_problem_agree(install: Callable, problem: Problem) -> None:
    install("sdpa")
    with pytest.raises(ValueError, match=r"^op: expected problem.op='window_attention', got 'combine'$"):
        dispatch("combine", problem)


def test_a_plan_is_made_once_for_equal_problems(runs: dict, problem: Problem) -> None:
    first = dispatch("window_attention", problem)
    asked = len(runs["fast"].asked)
    assert dispatch("window_attention", replace(problem)) is first
    assert len(runs["fast"].asked) == asked
    for change in ({"needs_grad": True}, {"head_dim": 128}, {"window_size": 7}, {"deterministic": False}):
        assert dispatch("window_attention", replace(problem, **change)) is not first
    assert {x.needs_grad for _, x, _ in runs["fast"].asked} == {False, True}
    assert dispatch("window_attention", problem, backend="fast") is not first


def test_the_memory_of_routes_is_bounded(runs: dict, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatching, "MOST_ROUTES", 10)
    for head_dim in range(8, 8 + 35):
        dispatch("window_attention", replace(problem, head_dim=head_dim))
        assert len(dispatching._the_router().routes) <= 10


def test_plan_for_is_what_dispatch_follows(runs: dict, problem: Problem, flags: Callable) -> None:
    dispatch("window_attention", problem)(X)
    assert ran(runs) == [(plan_for(problem).backend, "window_attention")] == [("fast", "window_attention")]
    asked = plan_for(problem, Policy((("window_attention", "sdpa"),)))
    assert (asked.backend, asked.requested) == ("sdpa", "sdpa")
    flags(BACKEND="combine=fast")
    combine = replace(problem, op="combine")
    assert explain(plan_for(combine)).endswith("  fast  rejected: cannot combine")
    assert plan_for(combine, Policy()).backend == "other"


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def stated(made: dict, problem: Problem, **change: Any) -> tuple[Any, dict]:
    """What the backend was told when it was asked, and what options it ran with."""
    made["fast"].asked.clear()
    made["fast"].calls.clear()
    dispatch(problem.op, replace(problem, **change))(X)
    ((_, options),) = made["fast"].calls
    return (made["fast"].asked[0][1].deterministic if made["fast"].asked else "remembered"), options


def test_determinism_is_left_open_by_default(runs: dict, problem: Problem) -> None:
    assert stated(runs, problem) == (False, {})


@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
def test_the_flag_asks_for_determinism(op: str, runs: dict, problem: Problem, flags: Callable) -> None:
    flags(DETERMINISTIC="1")
    asked = replace(problem, op=op)
    assert stated(runs, asked) == (True, {"deterministic": True})
    assert stated(runs, asked, deterministic=False) == (False, {}), "what the caller says counts"


def test_plans_know_of_determinism_what_dispatch_knows(
    install: Callable, order: Callable, problem: Problem, flags: Callable
) -> None:
    install("sdpa", "fast")
    order("fast")
    flags(DETERMINISTIC="1")
    assert plan_for(problem).problem.deterministic is True
    assert plan_for(replace(problem, deterministic=False)).problem.deterministic is False


def test_an_op_without_the_keyword_is_not_given_it(runs: dict, problem: Problem, flags: Callable) -> None:
    flags(DETERMINISTIC="1")
    assert stated(runs, replace(problem, op="select_blocks")) == (True, {})


def test_torch_asks_for_determinism(runs: dict, problem: Problem, torch_deterministic: None) -> None:
    assert stated(runs, problem) == (True, {"deterministic": True})
    torch.use_deterministic_algorithms(False)
    assert stated(runs, problem) == (False, {}), "it may change between calls"
    torch.use_deterministic_algorithms(True)
    assert stated(runs, problem) == ("remembered", {"deterministic": True})


def test_a_caller_asks_for_determinism(runs: dict, problem: Problem) -> None:
    assert stated(runs, problem, deterministic=True) == (True, {"deterministic": True})


# --- what is said -----------------------------------------------------------------------------------------------------


def test_one_line_says_what_the_other_preset_would_do(
    install: Callable, order: Callable, problem: Problem, logged: Any
) -> None:
    install("fast", "sdpa")
    order("fast", presets={"perf": {"fast": "always"}})
    for op in OPS:
        for head_dim in (64, 128):
            dispatch(op, replace(problem, op=op, head_dim=head_dim))
    assert logged.warnings() == [
        "backend fast is installed and can run compress_mean here, but preset safe does not take it: NSA_PRESET=perf "
        "does (now: sdpa)"
    ]


@pytest.mark.parametrize(
    "installed, flag, backend",
    [
        (("sdpa",), {}, None),
        (("fast", "sdpa"), {"PRESET": "perf"}, None),
        (("fast", "sdpa"), {}, "sdpa"),
        (("fast", "sdpa"), {"BACKEND": "sdpa"}, None),
    ],
    ids=["not installed", "taken", "another named", "another in the flag"],
)
def test_where_there_is_nothing_to_say_nothing_is_said(
    installed: tuple, flag: dict, backend: str | None, install, order, flags, problem: Problem, logged: Any
) -> None:
    install(*installed)
    order("fast", presets={"perf": {"fast": "always"}})
    flags(**flag)
    dispatch("window_attention", problem, backend=backend)
    assert logged.warnings() == []


def test_a_broken_backend_does_not_go_unsaid(
    offer: Callable, fake_point: type, fake_backend: type, order: Callable, problem: Problem, logged: Any
) -> None:
    class Broken(fake_point):
        def load(self) -> object:
            raise ImportError("libfast.so: not found")

    offer(Broken("fast", None), fake_point("sdpa", fake_backend("sdpa")))
    order("fast")
    for op in OPS:
        dispatch(op, replace(problem, op=op))(X)
    assert logged.warnings() == [
        "backend fast is broken: ImportError: libfast.so: not found; others take its place",
    ]
    with pytest.raises(ImportError, match=r"libfast\.so"):
        dispatch("combine", replace(problem, op="combine"), backend="fast")


def test_a_device_without_a_profile_is_told_once(
    install: Callable, environment: Callable, problem: Problem, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa")
    monkeypatch.setattr(dispatching, "probe", lambda device, index: environment("sdpa", device=device, sm=86))
    for head_dim in (64, 128):
        dispatch("window_attention", replace(problem, device="cuda", head_dim=head_dim))
    assert logged.warnings() == ["no profile for SM 8.6: the nearest lower one of its family is used"]
    assert dispatching.machine_of("cuda").note == logged.warnings()[0]
    assert dispatching.machine_of("cuda").profile.name == "sm80"


def test_a_profile_that_was_named_is_not_commented_on(
    install: Callable,
    environment: Callable,
    problem: Problem,
    logged: Any,
    flags: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("sdpa")
    flags(PROFILE="sm89")
    monkeypatch.setattr(dispatching, "probe", lambda device, index: environment("sdpa", device=device, sm=86))
    assert plan_for(replace(problem, device="cuda")).profile == "sm89"
    assert plan_for(problem).profile == "sm89", "on every device"
    assert logged.warnings() == []


def test_each_route_is_told_at_level_info(runs: dict, problem: Problem, logged: Any, flags: Callable) -> None:
    flags(LOG="info")
    dispatch("window_attention", problem)
    dispatch("window_attention", replace(problem))
    dispatch("window_attention", problem, backend="other")
    words = "window_attention on cpu, torch.float32, head_dim 64/32, group size 4"
    assert [message for level, message in logged.seen if level == "INFO"] == [
        f"fast runs {words} (profile made, preset safe)",
        f"other runs {words} (requested)",
    ]


def test_threads_that_meet_follow_the_plan(runs: dict, problem: Problem) -> None:
    together, failures = threading.Barrier(8), []

    def work() -> None:
        together.wait()
        for head_dim in range(8, 40):
            run = dispatch("window_attention", replace(problem, head_dim=head_dim))
            out, _ = run(X)
            if not torch.equal(out, X):
                failures.append(head_dim)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert ran(runs) == [("fast", "window_attention")] * 8 * 32
