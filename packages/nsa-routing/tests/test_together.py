"""Does one look at the outcome find what a look at each operation would, and does the alarm bring those looks back?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa_routing import closed, dispatch, judged_together, outcome, poll, reset, together
from nsa_routing.finiteness import all_finite
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

INF, NAN = torch.inf, torch.nan
ALARM = (
    "operations returned non-finite values on cpu in an earlier call; each is looked at with what it is given from now "
    "on, until nsa_routing.reset(). A CUDA graph keeps the looks that it was captured with"
)


def attending(out: float = 1.0, lse: float = 1.0) -> Callable[..., Any]:
    """An attention with this in the last element of its out and of its lse."""

    def run(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        outs, lses = x + 1.0, x.detach().amax(-1).T.clone()
        outs[-1, -1, -1], lses[-1, -1] = out, lse
        return outs, lses

    return run


class Kernels(TorchDispatchMode):
    """The operations of torch that compute something."""

    VIEWS = ("aten.detach", "aten._local_scalar_dense", "aten.alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(self.VIEWS):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tensors that were looked at, lses excepted."""
    sizes: list[int] = []
    norm = torch.linalg.vector_norm

    def noted(x: Tensor, *args: Any) -> Tensor:
        sizes.append(x.numel())
        return norm(x, *args)

    monkeypatch.setattr(torch.linalg, "vector_norm", noted)
    return sizes


@pytest.fixture
def fast(install: Callable, order: Callable, fake_backend: type, flags: Callable) -> Callable[..., Any]:
    """Install backend fast, with this attention, before sdpa, under NSA_CHECK_FINITE=flag."""

    def make(run: Callable[..., Any]) -> None:
        install(fake_backend("fast", runs={"window_attention": run}), fake_backend("sdpa", factor=2.0))
        order("fast")
        flags(CHECK_FINITE="flag")

    return make


def call(problem: Any, x: Tensor) -> Tensor:
    """Attention and one operation more, whose result the outcome is."""
    run = dispatch("window_attention", problem)
    with judged_together():
        out, _ = run(x)
        return outcome(out[:, :1] + out[:, 1:] * 0.0)  # a gate of 0 hides nothing: 0 * NaN is NaN


@pytest.fixture
def x() -> Tensor:
    return torch.arange(1.0, 25.0).reshape(3, 2, 4)


def test_only_the_outcome_is_looked_at(fast: Callable, problem: Any, x: Tensor, looks: list[int]) -> None:
    fast(attending())
    call(problem, x)
    assert looks == [12]
    assert (poll(), closed()) == (frozenset(), frozenset())


@pytest.mark.parametrize("bad", [{"out": NAN}, {"out": INF}, {"out": -INF}, {"lse": NAN}, {"lse": INF}], ids=str)
def test_a_bad_outcome_brings_looks_at_each_operation_and_those_close_the_route(
    bad: dict[str, float], fast: Callable, problem: Any, x: Tensor, looks: list[int], logged: Any
) -> None:
    fast(attending(**bad))
    call(problem, x)
    assert (looks.copy(), closed(), logged.warnings()) == ([12], frozenset(), [])
    call(problem, x)
    assert looks == [12, 24, 24], "then the result and the input, and no outcome"
    assert (closed(), logged.warnings()) == (frozenset(), [ALARM])
    assert bool(call(problem, x).isfinite().all())
    assert closed() == {("fast", "window_attention", "cpu")}
    reset()
    looks.clear()
    call(problem, x)
    assert looks == [12], "no alarm any more"


def test_an_lse_of_minus_infinity_is_no_alarm(fast: Callable, problem: Any, x: Tensor, logged: Any) -> None:
    fast(attending(lse=-INF))
    for _ in range(3):
        call(problem, x)
    assert (poll(), logged.warnings()) == (frozenset(), [])


def test_bad_inputs_raise_the_alarm_and_close_nothing(fast: Callable, problem: Any, x: Tensor, logged: Any) -> None:
    fast(attending())
    x[0] = NAN
    for _ in range(4):
        call(problem, x)
    assert (poll(), logged.warnings()) == (frozenset(), [ALARM])


def test_polling_tells_of_an_alarm(fast: Callable, problem: Any, x: Tensor, logged: Any) -> None:
    fast(attending(NAN))
    call(problem, x)
    assert poll() == frozenset()
    assert logged.warnings() == [ALARM]
    call(problem, x)
    assert poll() == {("fast", "window_attention", "cpu")}


def test_an_operation_by_itself_is_a_chain_of_one(
    fast: Callable, problem: Any, x: Tensor, looks: list[int], logged: Any
) -> None:
    """Its outcome alone, until there is an alarm; what was given to it only then."""
    fast(attending(NAN))
    run = dispatch("window_attention", problem)
    run(x)
    assert (looks.copy(), logged.warnings()) == ([24], [])
    run(x)
    assert (looks, logged.warnings(), closed()) == ([24, 24, 24], [ALARM], frozenset())
    assert bool(run(x)[0].isfinite().all())
    assert closed() == {("fast", "window_attention", "cpu")}


@pytest.mark.parametrize("together_or_not", ["alone", "chain"])
def test_a_look_is_two_kernels_for_an_out_and_two_for_an_lse(
    together_or_not: str, fast: Callable, problem: Any, x: Tensor
) -> None:
    """Largest magnitude and a maximum, and nothing else: a decode step is not much longer."""
    fast(attending())
    flat = {"window_attention": 4, "decode_attention": 2}
    together.by_outcome(x)  # a device's first look makes the number that looks go into
    for op, kernels in flat.items():
        run = together.by_outcome
        result = (x, x[..., 0].T) if op == "window_attention" else (x, x.int())
        with Kernels() as ran:
            if together_or_not == "alone":
                run(result)
            else:
                with judged_together():
                    run(result)
                    outcome(x)
        assert len(ran.names) == kernels, ran.names


def test_always_judges_each_operation_in_the_same_call(
    fast: Callable, problem: Any, x: Tensor, flags: Callable, looks: list[int]
) -> None:
    fast(attending(NAN))
    flags(CHECK_FINITE="always")
    assert bool(call(problem, x).isfinite().all())
    assert closed() == {("fast", "window_attention", "cpu")}
    assert 24 in looks


def test_off_looks_at_nothing(fast: Callable, problem: Any, x: Tensor, flags: Callable, looks: list[int]) -> None:
    fast(attending(NAN))
    flags(CHECK_FINITE="off")
    call(problem, x)
    assert looks == []


def test_an_outcome_is_wanted_where_something_was_postponed(fast: Callable, problem: Any, x: Tensor) -> None:
    fast(attending())
    with judged_together():
        pass
    run = dispatch("window_attention", problem)
    with pytest.raises(RuntimeError, match=r"^judged_together: expected an outcome, got none$"), judged_together():
        run(x)


def test_exceptions_pass_and_leave_nothing_behind(
    fast: Callable, problem: Any, x: Tensor, looks: list[int], logged: Any
) -> None:
    fast(attending(NAN))
    run = dispatch("window_attention", problem)

    def failing() -> None:
        with judged_together():
            run(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert (poll(), logged.warnings(), looks) == (frozenset(), [], [])
    run(x)
    assert looks == [24], "outside of a chain a result is looked at by itself"


def test_a_chain_within_a_chain_is_part_of_it(fast: Callable, problem: Any, x: Tensor, looks: list[int]) -> None:
    fast(attending())
    run = dispatch("window_attention", problem)
    with judged_together():
        first, _ = run(x)
        with judged_together():
            second = outcome(run(first)[0])
        outcome(second[:1])
    assert looks == [8]


def test_after_an_alarm_a_tensor_is_looked_at_once(fast: Callable, problem: Any, x: Tensor, looks: list[int]) -> None:
    fast(attending())
    together._alarm(x.device).look([torch.tensor(NAN)])
    run = dispatch("window_attention", problem)
    with judged_together():
        first, _ = run(x)
        run(x)
        outcome(run(first)[0])
    assert looks == [24] * 4, "x, and three results"
    assert all_finite((x,)).item() is True


def test_compiled_code_judges_each_operation(fast: Callable, problem: Any, x: Tensor) -> None:
    fast(attending(NAN))
    run = dispatch("window_attention", problem)
    run(x)  # the flag exists
    reset()

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        with judged_together():
            return outcome(run(x)[0])

    compiled(x)
    assert poll() == {("fast", "window_attention", "cpu")}
