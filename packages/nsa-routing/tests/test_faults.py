"""What happens when a backend fails: does the caller get a right answer, or the exception that is theirs?"""

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from nsa_routing import OPS, Problem, closed, dispatch, explain, failure_counts, plan_for, poll, reset
from nsa_routing.breaker import breaker
from torch import Tensor

INF, NAN = torch.inf, torch.nan
KEY = ("fast", "window_attention", "cpu")


def as_if_from(module: str, name: str, *bases: type) -> type[Exception]:
    """An exception class that says it comes from `module`: triton's, without triton."""
    return type(name, bases or (Exception,), {"__module__": module})


TRITON = as_if_from("triton.errors", "TritonError")
MEMORY = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory"),
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
}
COMPILE = {
    "triton": TRITON("x"),
    "compiler": as_if_from("triton.compiler.errors", "CompilationError", TRITON)("at 3:4: x"),
    "resources": as_if_from("triton.runtime.errors", "OutOfResources")("out of resource: shared memory"),
    "pass": RuntimeError("PassManager::run failed"),
}
OTHERS = {
    "value": ValueError("q: expected 3 dimensions, got 2"),
    "cuda": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "interpreter": as_if_from("triton.runtime.errors", "InterpreterError", TRITON)("what a kernel raised"),
    "interrupt": KeyboardInterrupt(),
}
OUT, LSE = {"nan": NAN, "inf": INF, "-inf": -INF}, {"lse nan": NAN, "lse inf": INF}
BAD = OUT | LSE


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


def spoiled(which: str) -> Callable[..., Any]:
    """An attention three times too large, with a bad row in its out or a bad element in its lse."""

    def run(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        out, lse = x * 3, x.detach().amax(-1).T.clone()
        (lse if which.startswith("lse") else out)[-1, -1] = BAD[which]
        return out, lse

    return run


@pytest.fixture
def x() -> Tensor:
    return torch.arange(1.0, 25.0).reshape(3, 2, 4)


@pytest.fixture
def faulty(install: Callable, order: Callable, fake_backend: type, problem: Problem) -> Callable[..., dict[str, Any]]:
    """Install sdpa, which doubles, before it spare, and before that fast, whose window attention fails in this way."""

    def make(run: Callable[..., Any], *, spare: bool = False) -> dict[str, Any]:
        made = install(
            fake_backend("fast", runs={"window_attention": run}),
            fake_backend("spare", factor=5.0),
            fake_backend("sdpa", factor=2.0),
        )
        order(*(("fast", "spare") if spare else ("fast",)))
        return made

    return make


def ran(made: dict[str, Any]) -> list[str]:
    """The backends that ran since the last question."""
    names = [name for name, backend in made.items() for _ in backend.calls]
    for backend in made.values():
        backend.calls.clear()
    return names


def answer(factor: float, x: Tensor) -> tuple[Tensor, Tensor]:
    return x * factor, (x * factor).amax(-1).T


def assert_is(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


ALARM = (
    "operations returned non-finite values on cpu in an earlier call; each is looked at with what it is given from now "
    "on, until nsa_routing.reset(). A CUDA graph keeps the looks that it was captured with"
)
HOW = "To reproduce, set NSA_BACKEND=window_attention=fast NSA_CHECK_FINITE=off and call "
CALL = "window_attention(float32[3, 2, 4], 'layout', scale=0.5)"


# --- non-finite results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", BAD)
def test_a_bad_result_is_recomputed_in_the_same_call(
    which: str, faulty: Callable, problem: Problem, x: Tensor, logged: Any
) -> None:
    made = faulty(spoiled(which), spare=True)
    run = dispatch("window_attention", problem)
    assert_is(run(x, "layout", scale=0.5), answer(2, x))
    assert ran(made) == ["fast", "sdpa"], "by the last resort, not by the next backend"
    assert closed() == {KEY}
    assert logged.warnings() == [
        "window_attention on fast, cpu: returned non-finite values for finite inputs; another backend takes over; the "
        f"route is closed on cpu until nsa_routing.reset(). {HOW}{CALL}"
    ]
    assert logged.tracebacks == [], "nothing was raised"
    assert_is(run(x), answer(5, x))
    assert ran(made) == ["spare"], "later calls take the next backend"
    assert len(logged.warnings()) == 1


def test_a_closed_route_is_seen_by_plans_and_opened_by_reset(faulty: Callable, problem: Problem, x: Tensor) -> None:
    made = faulty(spoiled("nan"))
    run = dispatch("window_attention", problem)
    run(x)
    reason = "closed on cpu after a failure, until nsa_routing.reset()"
    assert explain(plan_for(problem)).splitlines()[1:] == [f"  fast  rejected: {reason}", "  sdpa  chosen"]
    assert plan_for(replace(problem, op="combine")).backend == "fast", "other operations stay open"
    del made["fast"].runs["window_attention"]
    ran(made)
    run(x)
    dispatch("window_attention", replace(problem, head_dim=128))(x)
    assert ran(made) == ["sdpa", "sdpa"], "mended or not, it stays closed"
    reset()
    assert closed() == frozenset()
    assert plan_for(problem).backend == "fast"
    dispatch("window_attention", problem)(x)
    run(x)
    assert ran(made) == ["fast", "fast"], "also for who holds the callable"


def test_an_lse_of_minus_infinity_is_no_fault(faulty: Callable, problem: Problem, x: Tensor, logged: Any) -> None:
    made = faulty(lambda x, *_: (torch.zeros_like(x), torch.full((2, 3), -INF)))
    out, lse = dispatch("window_attention", problem)(x)
    assert (out.any().item(), lse.unique().tolist()) == (False, [-INF])
    assert (ran(made), closed(), logged.warnings()) == (["fast"], frozenset(), [])


@pytest.mark.parametrize("op", ["compress_mean", "combine"])
def test_ops_that_return_one_tensor_are_judged_too(
    op: str, install: Callable, order: Callable, fake_backend: type, problem: Problem, x: Tensor
) -> None:
    install(fake_backend("fast", factor=NAN), fake_backend("sdpa", factor=2.0))
    order("fast")
    assert torch.equal(dispatch(op, replace(problem, op=op))(x), x * 2)
    assert closed() == {("fast", op, "cpu")}


def test_indices_cannot_be_infinite(faulty: Callable, problem: Problem, x: Tensor) -> None:
    made = faulty(spoiled("nan"))
    got = dispatch("select_blocks", replace(problem, op="select_blocks"))(x, torch.full((2, 3), -INF))
    assert torch.equal(got, x.int())
    assert (ran(made), closed()) == (["fast"], frozenset())


def decoded(which: str = "") -> Callable[..., tuple[Tensor, Tensor]]:
    """An out three times too large beside block indices; the last row is padding, 0 and -1."""

    def run(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        out, indices = x * 3, torch.arange(6, dtype=torch.int32).view(3, 2)
        out[-1], indices[-1] = 0.0, -1
        if which:
            out[0, 0] = OUT[which]
        return out, indices

    return run


@pytest.mark.parametrize("check", ["always", "flag"])
def test_block_indices_beside_an_out_are_no_fault(
    check: str, install: Callable, order: Callable, fake_backend: type, problem: Problem, x: Tensor, flags: Callable
) -> None:
    made = install(fake_backend("fast", runs={"decode_attention": decoded()}), fake_backend("sdpa", factor=2.0))
    order("fast")
    flags(CHECK_FINITE=check)
    for _ in range(2):
        out, indices = dispatch("decode_attention", replace(problem, op="decode_attention"))(x)
        assert torch.equal(out[:-1], x[:-1] * 3)
        assert (out[-1].any().item(), indices[-1].tolist()) == (False, [-1, -1])
    assert (ran(made), poll(), closed()) == (["fast"] * 2, frozenset(), frozenset())


@pytest.mark.parametrize("which", OUT)
@pytest.mark.parametrize("check", ["always", "flag"])
def test_a_bad_out_beside_block_indices_is_caught(
    which: str,
    check: str,
    install: Callable,
    order: Callable,
    fake_backend: type,
    problem: Problem,
    x: Tensor,
    flags: Callable,
) -> None:
    made = install(fake_backend("fast", runs={"decode_attention": decoded(which)}), fake_backend("sdpa", factor=2.0))
    order("fast")
    flags(CHECK_FINITE=check)
    run = dispatch("decode_attention", replace(problem, op="decode_attention"))
    first, _ = run(x)
    if check == "always":
        assert torch.equal(first, x * 2)
        assert closed() == {("fast", "decode_attention", "cpu")}
    else:
        assert not first.isfinite().all(), "what went out went out"
        assert poll() == frozenset(), "an alarm: whose fault it is, the next call tells"
        run(x)
        assert poll() == {("fast", "decode_attention", "cpu")}
    second, _ = run(x)
    assert torch.equal(second, x * 2)
    assert ran(made) == (["fast", "sdpa", "sdpa"] if check == "always" else ["fast", "fast", "sdpa"])


def test_an_empty_result_is_no_fault(faulty: Callable, problem: Problem) -> None:
    made = faulty(lambda x, *_: (x.clone(), torch.zeros(2, 0)))
    out, lse = dispatch("window_attention", problem)(torch.zeros(0, 2, 4))
    assert (out.shape, lse.shape) == ((0, 2, 4), (2, 0))
    assert (ran(made), closed()) == (["fast"], frozenset())


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("check", ["always", "flag"])
def test_what_comes_of_bad_inputs_is_the_callers(
    check: str, value: float, faulty: Callable, problem: Problem, x: Tensor, flags: Callable, logged: Any
) -> None:
    """The kernel's result is returned as it is, in whichever argument the bad value came."""
    made = faulty(spoiled("nan"))
    flags(CHECK_FINITE=check)
    spoilt = x.clone()
    spoilt[0, 0, 0] = value
    for args in ((spoilt, x), (x, spoilt), (spoilt, x)):
        out, _ = dispatch("window_attention", problem)(*args)
        assert torch.equal(out[1, 0], args[0][1, 0] * 3)
        assert out[-1, -1].isnan().all()
        assert ran(made) == ["fast"]
        assert poll() == frozenset()
    assert logged.warnings() == ([] if check == "always" else [ALARM])


def test_a_true_result_that_the_dtype_cannot_hold(faulty: Callable, problem: Problem, logged: Any) -> None:
    """sdpa overflows as well: nobody's fault."""
    made = faulty(lambda x, *_: (x * INF, x.amax(-1).T))
    large = torch.full((3, 2, 4), torch.finfo(torch.float32).max)
    out, _ = dispatch("window_attention", problem)(large)
    assert out.isinf().all()
    assert (ran(made), closed(), logged.warnings()) == (["fast", "sdpa"], frozenset(), [])


def test_what_no_sequence_owns_may_hold_anything(faulty: Callable, problem: Problem, x: Tensor) -> None:
    """Pages count as finite: their spare rows do not, and a bad result is still judged."""

    class Pages:
        pages = torch.full((4, 2, 2, 4), NAN)

    made = faulty(spoiled("nan"))
    assert_is(dispatch("window_attention", replace(problem, paged=True))(x, Pages(), Pages()), answer(2, x))
    assert (ran(made), closed()) == (["fast", "sdpa"], {KEY})


@dataclass(frozen=True, eq=False)
class Ring:
    k: Tensor
    scale: float = 0.5
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    k: Tensor
    ring: Ring

    def tensors(self) -> list[Tensor]:
        return [self.k]


def test_rows_to_store_are_judged_and_described(faulty: Callable, problem: Problem, x: Tensor, logged: Any) -> None:
    """Rows that are not finite excuse the result; a ring's spare rows do not."""
    made, ring = faulty(spoiled("nan")), Ring(torch.full((1, 5), NAN))
    dispatch("window_attention", problem)(x, new=Rows(torch.full((2,), INF), ring))
    assert (ran(made), closed()) == (["fast"], frozenset())
    assert_is(dispatch("window_attention", problem)(x, new=Rows(torch.ones(2), ring)), answer(2, x))
    assert closed() == {KEY}
    (warning,) = logged.warnings()
    assert warning.endswith(", new=Rows(k=float32[2], ring=Ring(k=float32[1, 5], scale=0.5)))")


@pytest.mark.parametrize("which", ["nan", "lse inf"])
def test_gradients_flow_through_the_recomputed_result(which: str, faulty: Callable, problem: Problem, x: Tensor):
    faulty(spoiled(which))
    leaf = x.clone().requires_grad_()
    out, _ = dispatch("window_attention", replace(problem, needs_grad=True))(leaf)
    out.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(x, 2.0))


def test_where_the_last_resort_cannot_judge_the_next_backend_answers(
    install: Callable, order: Callable, fake_backend: type, problem: Problem, x: Tensor
) -> None:
    made = install(
        fake_backend("fast", runs={"window_attention": spoiled("inf")}),
        fake_backend("spare", factor=5.0),
        sdpa={"window_attention": "no pages"},
    )
    order("fast", "spare")
    assert_is(dispatch("window_attention", problem)(x), answer(5, x))
    assert (ran(made), closed()) == (["fast", "spare"], {KEY})


def test_a_bad_fallback_is_judged_like_the_first(
    install: Callable, order: Callable, fake_backend: type, problem: Problem, x: Tensor
) -> None:
    runs = {"window_attention": spoiled("nan")}
    made = install(fake_backend("fast", runs=runs), fake_backend("spare", runs=runs), fake_backend("sdpa", factor=2.0))
    order("fast", "spare")
    run = dispatch("window_attention", problem)
    for names in (["fast", "sdpa"], ["spare", "sdpa"], ["sdpa"]):
        assert_is(run(x), answer(2, x))
        assert ran(made) == names
    assert closed() == {KEY, ("spare", "window_attention", "cpu")}


@pytest.mark.parametrize("which", BAD)
@pytest.mark.parametrize("how", ["argument", "NSA_BACKEND", "NSA_FALLBACK"])
def test_who_asked_for_it_is_told(
    how: str, which: str, faulty: Callable, problem: Problem, x: Tensor, flags: Callable, logged: Any
) -> None:
    made = faulty(spoiled(which))
    flags(**{"argument": {}, "NSA_BACKEND": {"BACKEND": "fast"}, "NSA_FALLBACK": {"FALLBACK": "raise"}}[how])
    run = dispatch("window_attention", problem, backend="fast" if how == "argument" else None)
    with pytest.raises(RuntimeError) as caught:
        run(x, "layout", scale=0.5)
    told = (
        "window_attention on fast, cpu: returned non-finite values for finite inputs; raised; the route is closed on "
        f"cpu until nsa_routing.reset(). {HOW}{CALL}"
    )
    assert [str(caught.value), *logged.warnings()] == [told, told]
    assert ran(made) == ["fast", "sdpa"], "which judged it"
    with pytest.raises(RuntimeError, match=r"^window_attention on fast: the route is closed on cpu"):
        run(x)
    assert ran(made) == []
    fresh = replace(problem, head_dim=128)
    if how == "NSA_FALLBACK":  # nor does a new route go around the closed one
        with pytest.raises(RuntimeError, match="fast  stops here: closed on cpu after a failure"):
            dispatch("window_attention", fresh)
    else:
        with pytest.raises(RuntimeError, match="fast  rejected: closed on cpu after a failure"):
            dispatch("window_attention", fresh, backend="fast")


@pytest.mark.parametrize("which", BAD)
def test_flagged_results_are_returned_and_the_news_closes_the_route(
    which: str, faulty: Callable, problem: Problem, x: Tensor, flags: Callable, logged: Any
) -> None:
    made = faulty(spoiled(which))
    flags(CHECK_FINITE="flag")
    run = dispatch("window_attention", problem)
    for told in ([], [ALARM]):  # the outcome alone, which may be the caller's fault; then what it was made of too
        out, lse = run(x)
        assert not (out.isfinite().all() and lse.isfinite().all())
        assert (ran(made), closed(), logged.warnings()) == (["fast"], frozenset(), told)
    assert_is(run(x, "layout", scale=0.5), answer(2, x))
    assert (ran(made), closed()) == (["sdpa"], {KEY})
    assert logged.warnings() == [
        ALARM,
        "window_attention on fast, cpu: returned non-finite values for finite inputs in an earlier call; another "
        f"backend takes over; the route is closed on cpu until nsa_routing.reset(). {HOW}{CALL}",
    ]
    reset()
    run(x)
    assert (ran(made), closed()) == (["fast"], frozenset()), "old news is gone"


def test_polling_reads_the_news(faulty: Callable, problem: Problem, x: Tensor, flags: Callable, logged: Any) -> None:
    made = faulty(spoiled("nan"))
    flags(CHECK_FINITE="flag")
    run = dispatch("window_attention", problem)
    assert poll() == frozenset()
    run(x)
    assert poll() == frozenset() == closed()
    assert logged.warnings() == [ALARM]
    run(x)
    assert closed() == frozenset()
    assert poll() == {KEY} == poll() == closed()
    _, line = logged.warnings()
    assert line.startswith("window_attention on fast, cpu: returned non-finite values for finite inputs in an earlier ")
    assert line.endswith("To reproduce, set NSA_BACKEND=window_attention=fast NSA_CHECK_FINITE=always")
    ran(made)
    assert_is(run(x), answer(2, x))
    assert ran(made) == ["sdpa"]


def test_flagged_news_reaches_who_asked_for_it(faulty: Callable, problem: Problem, x: Tensor, flags: Callable) -> None:
    faulty(spoiled("nan"))
    flags(CHECK_FINITE="flag")
    run = dispatch("window_attention", problem, backend="fast")
    for _ in range(2):
        run(x)
    with pytest.raises(RuntimeError, match=r"^window_attention on fast: the route is closed on cpu"):
        run(x)


def test_perf_flags_and_safe_checks(faulty: Callable, problem: Problem, x: Tensor, flags: Callable) -> None:
    made = faulty(spoiled("nan"))
    for preset, names in (("perf", ["fast"]), ("safe", ["fast", "sdpa"])):
        flags(PRESET=preset)
        dispatch("window_attention", problem)(x)
        assert ran(made) == names


def test_with_checks_off_nobody_looks(faulty: Callable, problem: Problem, x: Tensor, flags: Callable) -> None:
    made = faulty(spoiled("nan"))
    flags(CHECK_FINITE="off")
    run = dispatch("window_attention", problem)
    for _ in range(3):
        assert run(x)[0].isnan().any()
    assert (ran(made), poll()) == (["fast"] * 3, frozenset())


@pytest.mark.parametrize("check", ["always", "flag"])
def test_a_capture_is_flagged_whatever_was_asked(
    check: str,
    faulty: Callable,
    problem: Problem,
    x: Tensor,
    flags: Callable,
    monkeypatch: pytest.MonkeyPatch,
    logged: Any,
) -> None:
    """Nothing may wait there; `always` leaves the same note as `flag`. A graph that is captured after an alarm holds
    looks at the inputs too, and closes the route: by `poll` alone.
    """
    from nsa_routing import route

    made = faulty(spoiled("nan"))
    flags(CHECK_FINITE=check)
    run = dispatch("window_attention", problem)
    monkeypatch.setattr(route, "capturing", lambda device: True)
    for found in (frozenset(), {KEY}):
        assert run(x)[0].isnan().any()
        assert (ran(made), closed()) == (["fast"], frozenset())
        assert poll() == found
    assert logged.warnings()[0] == ALARM


# --- memory and compilation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", MEMORY)
@pytest.mark.parametrize("check", ["always", "flag", "off"])
def test_out_of_memory_falls_back_and_may_succeed_later(
    check: str, error: str, faulty: Callable, problem: Problem, x: Tensor, flags: Callable, logged: Any
) -> None:
    made = faulty(raising(MEMORY[error]), spare=True)
    flags(CHECK_FINITE=check)
    run = dispatch("window_attention", problem)
    for _ in range(3):
        assert_is(run(x, "layout", scale=0.5), answer(5, x))
        assert ran(made) == ["fast", "spare"], "each call tries again"
    assert closed() == frozenset()
    assert logged.warnings() == [
        f"window_attention on fast, cpu: ran out of memory; another backend takes over. {HOW}{CALL}"
    ]
    (traceback,) = logged.tracebacks
    assert f"{type(MEMORY[error]).__name__}" in traceback
    assert "in run" in traceback, "where it happened"


@pytest.mark.parametrize("error", COMPILE)
@pytest.mark.parametrize("check", ["always", "flag", "off"])
def test_what_does_not_compile_falls_back_and_is_closed(
    check: str, error: str, faulty: Callable, problem: Problem, x: Tensor, flags: Callable, logged: Any
) -> None:
    made = faulty(raising(COMPILE[error]), spare=True)
    flags(CHECK_FINITE=check)
    run = dispatch("window_attention", problem)
    for names in (["fast", "spare"], ["spare"], ["spare"]):
        assert_is(run(x, "layout", scale=0.5), answer(5, x))
        assert ran(made) == names, "a kernel that does not compile never will"
    assert closed() == {KEY}
    assert logged.warnings() == [
        "window_attention on fast, cpu: failed to compile; another backend takes over; the route is closed on cpu "
        f"until nsa_routing.reset(). {HOW}{CALL}"
    ]
    assert len(logged.tracebacks) == 1


@pytest.mark.parametrize("error", [*MEMORY.values(), *COMPILE.values()], ids=[*MEMORY, *COMPILE])
@pytest.mark.parametrize("how", ["argument", "NSA_BACKEND", "NSA_FALLBACK"])
def test_who_asked_for_it_gets_the_exception(
    how: str, error: Exception, faulty: Callable, problem: Problem, x: Tensor, flags: Callable
) -> None:
    made = faulty(raising(error))
    flags(**{"argument": {}, "NSA_BACKEND": {"BACKEND": "fast"}, "NSA_FALLBACK": {"FALLBACK": "raise"}}[how])
    run = dispatch("window_attention", problem, backend="fast" if how == "argument" else None)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            run(x)
        assert caught.value is error
        assert ran(made) == ["fast"]
    assert closed() == frozenset()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("backend", [None, "fast"])
def test_any_other_exception_is_the_callers(
    backend: str | None, name: str, faulty: Callable, problem: Problem, x: Tensor, logged: Any
) -> None:
    made = faulty(raising(OTHERS[name]))
    with pytest.raises(type(OTHERS[name])) as caught:
        dispatch("window_attention", problem, backend=backend)(x)
    assert caught.value is OTHERS[name]
    assert (ran(made), closed(), logged.warnings()) == (["fast"], frozenset(), [])


def test_the_last_resort_has_nothing_to_fall_back_to(
    install: Callable, order: Callable, fake_backend: type, problem: Problem, x: Tensor
) -> None:
    install(fake_backend("sdpa", runs={"window_attention": raising(MEMORY["cuda"])}))
    order()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        dispatch("window_attention", problem)(x)


def test_the_last_resort_is_bare(install: Callable, order: Callable, fake_backend: type, problem: Problem, x: Tensor):
    """Its results are not judged: there is nothing to judge them by."""
    install(fake_backend("sdpa", runs={"window_attention": spoiled("nan")}))
    order()
    assert dispatch("window_attention", problem)(x)[0].isnan().any()
    assert closed() == frozenset()


def test_a_chain_of_failures_ends_at_the_last_resort(
    install: Callable, order: Callable, fake_backend: type, problem: Problem, x: Tensor, logged: Any
) -> None:
    made = install(
        fake_backend("fast", runs={"window_attention": raising(MEMORY["cuda"])}),
        fake_backend("spare", runs={"window_attention": raising(COMPILE["compiler"])}),
        fake_backend("sdpa", factor=2.0),
    )
    order("fast", "spare")
    assert_is(dispatch("window_attention", problem)(x), answer(2, x))
    assert ran(made) == ["fast", "spare", "sdpa"]
    assert closed() == {("spare", "window_attention", "cpu")}
    assert len(logged.warnings()) == len(logged.tracebacks) == 2


@pytest.mark.parametrize("error", [MEMORY["cuda"], COMPILE["compiler"]], ids=["memory", "compile"])
def test_a_fallback_keeps_options_and_gradients(error: Exception, faulty: Callable, problem: Problem, x: Tensor):
    made = faulty(raising(error))
    leaf = x.clone().requires_grad_()
    out, _ = dispatch("window_attention", replace(problem, deterministic=True, needs_grad=True))(leaf, scale=0.5)
    assert made["sdpa"].calls == [("window_attention", {"scale": 0.5, "deterministic": True})]
    out.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize("check", ["always", "flag", "off"])
@pytest.mark.parametrize("kind", [torch.cuda.OutOfMemoryError, MemoryError, COMPILE["compiler"].__class__])
def test_nothing_of_a_failed_call_stays_in_memory(
    kind: type[Exception], check: str, faulty: Callable, problem: Problem, x: Tensor, flags: Callable, logged: Any
) -> None:
    """What the backend had made when it failed is gone before the fallback needs the room, without the collector."""
    alive: list[weakref.ref] = []

    def run(x: Tensor, *_: Any) -> Any:
        workspace = torch.empty(1000)
        alive.append(weakref.ref(workspace))
        raise kind("no room")

    made = faulty(run)
    flags(CHECK_FINITE=check)

    def sdpa(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        assert [ref() for ref in alive] == [None]
        return answer(2, x)

    made["sdpa"].runs["window_attention"] = sdpa
    given = x.clone()
    alive_input = weakref.ref(given)
    gc.disable()
    try:
        dispatch("window_attention", problem)(given)
        del given
        assert alive_input() is None
    finally:
        gc.enable()
    assert len(logged.tracebacks) == 1


def test_nothing_of_a_recomputed_call_stays_in_memory(faulty: Callable, problem: Problem, x: Tensor) -> None:
    alive: list[weakref.ref] = []

    def run(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        out, lse = spoiled("nan")(x)
        alive.append(weakref.ref(out))
        return out, lse

    faulty(run)
    gc.disable()
    try:
        dispatch("window_attention", problem)(x)
        assert [ref() for ref in alive] == [None]
    finally:
        gc.enable()


def test_threads_that_meet_a_closing_route_all_get_the_answer(
    faulty: Callable, problem: Problem, x: Tensor, logged: Any
) -> None:
    made = faulty(spoiled("nan"))
    together, wrong = threading.Barrier(8), []

    def work() -> None:
        together.wait()
        for head_dim in range(8, 24):
            out, _ = dispatch("window_attention", replace(problem, head_dim=head_dim))(x)
            if not torch.equal(out, x * 2):
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert closed() == {KEY}
    assert 1 <= ran(made).count("fast") <= 8, "each thread tries it once at most"
    assert len(logged.warnings()) == 1


def test_a_route_that_closes_while_one_is_planned_is_no_reason_for_perf(
    faulty: Callable, problem: Problem, x: Tensor, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread may close it: what runs then is no faster, and safe takes it."""
    made = faulty(lambda x, *_: answer(3, x))

    def refuse(*_: Any) -> None:
        breaker("fast", "window_attention", "cpu").closed = True

    monkeypatch.setattr(made["fast"], "refuse", refuse)
    dispatch("window_attention", problem)(x)
    assert closed() == {KEY}
    assert logged.warnings() == []


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_guarded(op: str, install: Callable, order: Callable, fake_backend: type, problem: Problem, x):
    runs = dict.fromkeys(OPS, raising(COMPILE["compiler"]))
    made = install(fake_backend("fast", runs=runs), fake_backend("sdpa", factor=2.0))
    order("fast")
    dispatch(op, replace(problem, op=op))(x)
    assert ran(made) == ["fast", "sdpa"]
    assert closed() == {("fast", op, "cpu")}


def test_failures_are_counted_until_reset(faulty: Callable, problem: Problem, x: Tensor) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    faulty(full)
    run = dispatch("window_attention", problem)
    for _ in range(3):
        run(x)
    assert failure_counts() == {KEY: {"ran out of memory": 3}}
    assert closed() == frozenset()
    reset()
    assert failure_counts() == {}


def test_inference_mode_first_and_training_after(
    faulty: Callable, problem: Problem, x: Tensor, flags: Callable
) -> None:
    faulty(lambda x, *_, **__: answer(1, x))
    flags(PRESET="perf")
    with torch.inference_mode():
        dispatch("window_attention", problem)(x)
    dispatch("window_attention", problem)(x)
    assert poll() == frozenset()
    reset()


def test_always_reads_what_compiled_code_noted(faulty: Callable, problem: Problem, x: Tensor) -> None:
    made = faulty(lambda x, *_, **__: answer(1, x))
    run = dispatch("window_attention", problem)
    run.breaker.note(torch.tensor(True))
    assert_is(run(x), answer(2, x))
    assert (ran(made), closed()) == (["sdpa"], {KEY})


def test_keyword_arguments_are_inputs_too(faulty: Callable, problem: Problem, x: Tensor, flags: Callable) -> None:
    faulty(spoiled("nan"))
    for check in ("always", "flag"):
        flags(CHECK_FINITE=check)
        for _ in range(2):
            dispatch("window_attention", problem)(x, k=x * torch.nan)
            assert poll() == frozenset()
