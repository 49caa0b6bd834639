"""Does torch.compile trace through dispatch, without a break, once per interval, and see a route that changes?"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nsa_routing import Problem, closed, dispatch, poll, reset
from torch import Tensor
from torch._dynamo.testing import CompileCounter

KEY = ("fast", "window_attention", "cpu")


class Scaling:
    """A backend that Dynamo can trace: its window attention multiplies by `factor`."""

    def __init__(self, name: str, factor: float) -> None:
        self.name, self.factor = name, factor

    def refuse(self, op: str, problem: Problem, environment: object) -> str | None:
        return None

    def window_attention(self, x: Tensor, *, deterministic: bool | None = None) -> tuple[Tensor, Tensor]:
        out = x * self.factor if deterministic is None else x * self.factor + 1
        return out, out.detach().amax(-1).T


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def scaling(offer: Callable, fake_point: type, order: Callable) -> dict[str, Scaling]:
    """fast, 2, runs from 8 to 32 queries; sdpa, 1, elsewhere."""
    made = {name: Scaling(name, factor) for name, factor in (("fast", 2.0), ("sdpa", 1.0))}
    offer(*(fake_point(name, backend, f"{name}:BACKEND") for name, backend in made.items()))
    bounds = {"at_least": {"total_q": 8}, "at_most": {"total_q": 32}, "not_measured": "a test"}
    modes = {"fast": "threshold"}
    order("fast", presets={"safe": modes, "perf": modes}, thresholds={"window_attention": {"fast": bounds}})
    return made


def attend(x: Tensor, backend: str | None = None, deterministic: bool | None = None) -> Tensor:
    length = x.shape[0]
    problem = Problem(
        *("window_attention", "cpu", torch.float32, 4, 4, 1),
        deterministic=deterministic,
        total_q=length,
        max_seqlen_q=length,
        max_seqlen_k=length,
    )
    out, _ = dispatch("window_attention", problem, backend=backend)(x)
    return out


def compiled(**options: Any) -> tuple[Callable[..., Tensor], CompileCounter]:
    """`attend`, compiled whole, and the counter of its graphs."""
    counter = CompileCounter()
    torch._dynamo.reset()
    return torch.compile(attend, fullgraph=True, backend=counter, **options), counter


def rows(length: int) -> Tensor:
    return torch.arange(1.0, 1 + 4 * length).reshape(length, 1, 4)


@pytest.mark.usefixtures("scaling")
@pytest.mark.parametrize("check", ["always", "flag", "off"])
@pytest.mark.parametrize("length", [5, 20, 40])
def test_compiled_equals_eager(length: int, check: str, flags: Callable) -> None:
    flags(CHECK_FINITE=check)
    run = torch.compile(attend, fullgraph=True, backend="eager")
    x = rows(length)
    assert torch.equal(run(x), attend(x))
    assert torch.equal(run(x), x * (2 if length == 20 else 1))


@pytest.mark.usefixtures("scaling")
def test_one_graph_per_interval_of_lengths() -> None:
    """Lengths are symbolic from the start; each threshold is a guard, and nothing else about a length is."""
    run, counter = compiled(dynamic=True)
    graphs = []
    for length in (5, 2, 7, 8, 9, 31, 32, 33, 1000, 3, 20):
        x = rows(length)
        assert torch.equal(run(x), x * (2 if 8 <= length <= 32 else 1)), length
        graphs.append(counter.frame_count)
    if torch.__version__ >= (2, 5):  # Dynamo of 2.4 takes more lengths for constants
        assert graphs == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert graphs[:4] == [1, 1, 1, 2]


def test_a_flag_may_compare_lengths(offer: Callable, fake_point: type) -> None:
    """As `uniform` does: what is a comparison of symbolic lengths while tracing reaches the backend as a bool."""
    stated: list[bool] = []

    class Asked(Scaling):
        def refuse(self, op: str, problem: Problem, environment: object) -> str | None:
            stated.append(problem.uniform)
            return None

    offer(fake_point("sdpa", Asked("sdpa", 2.0), "sdpa:BACKEND"))

    def both(x: Tensor, y: Tensor) -> Tensor:
        sizes = {"total_q": x.shape[0], "max_seqlen_q": y.shape[0]}
        problem = Problem("window_attention", "cpu", x.dtype, 4, 4, 1, **sizes, uniform=x.shape[0] == 2 * y.shape[0])
        return dispatch("window_attention", problem)(x)[0]

    counter = CompileCounter()
    run = torch.compile(both, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for x, y in ((6, 3), (8, 4), (8, 5), (9, 7), (14, 7)):
        run(rows(x), rows(y))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 2]
    assert dict.fromkeys(stated) == {True: None, False: None}, "in this order"


@pytest.mark.usefixtures("scaling")
def test_a_named_backend_is_obeyed() -> None:
    run, counter = compiled(dynamic=True)
    x = rows(5)
    assert torch.equal(run(x, backend="fast"), x * 2)
    assert torch.equal(run(x, backend="sdpa"), x)
    assert torch.equal(run(rows(20), backend="fast"), rows(20) * 2)
    assert counter.frame_count <= 3


@pytest.mark.usefixtures("scaling")
def test_determinism_reaches_the_backend(flags: Callable) -> None:
    run, _ = compiled()
    x = rows(5)
    assert torch.equal(run(x, deterministic=True), x + 1)
    assert torch.equal(run(x), x)
    flags(DETERMINISTIC="1")
    assert torch.equal(run(x), x + 1)


def test_gradients_flow(scaling: dict) -> None:
    run, _ = compiled()
    x = rows(20).requires_grad_()
    run(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_a_graph_is_kept_while_nothing_changes_and_made_anew_after_reset(scaling: dict, flags: Callable) -> None:
    run, counter = compiled()
    x = rows(20)
    for _ in range(3):
        assert torch.equal(run(x), x * 2)
    assert counter.frame_count == 1
    scaling["fast"].factor = 3.0
    reset()
    assert torch.equal(run(x), x * 3)
    flags(BACKEND="sdpa")
    assert torch.equal(run(x), x)
    assert counter.frame_count == 3


@pytest.mark.usefixtures("scaling")
def test_a_route_that_closes_leads_to_a_new_graph() -> None:
    from nsa_routing import breaker

    run, counter = compiled()
    x = rows(20)
    run(x)
    breaker.breaker(*KEY).closed = True
    assert torch.equal(run(x), x), "the fallback"
    assert torch.equal(run(x), x)
    assert counter.frame_count == 2
    reset()
    assert torch.equal(run(x), x * 2)


@pytest.mark.parametrize("check", ["always", "flag"])
def test_a_bad_result_is_noted_and_polling_closes_the_route(
    check: str, scaling: dict, flags: Callable, logged: Any
) -> None:
    """Compiled code cannot wait for a verdict, so `always` is `flag` there."""
    flags(CHECK_FINITE=check)
    scaling["fast"].factor = torch.nan
    run, _ = compiled()
    x = rows(20)
    assert run(x).isnan().all()
    assert closed() == frozenset()
    assert poll() == {KEY}
    assert len(logged.warnings()) == 1
    assert torch.equal(run(x), x)


def test_what_comes_of_bad_inputs_is_not_noted(scaling: dict) -> None:
    run, _ = compiled()
    x = rows(20)
    x[3, 0, 1] = torch.inf
    assert run(x).isinf().any()
    assert poll() == frozenset()


@pytest.mark.usefixtures("scaling")
def test_with_checks_off_nothing_is_added_to_the_graph(flags: Callable) -> None:
    sizes = {}
    for check in ("off", "flag"):
        flags(CHECK_FINITE=check)
        run, counter = compiled()
        run(rows(20))
        sizes[check] = counter.op_count
    reference = CompileCounter()
    torch.compile(lambda x: (x * 2.0, (x * 2.0).detach().amax(-1).T)[0], fullgraph=True, backend=reference)(rows(20))
    assert sizes["off"] <= reference.op_count + 4 < sizes["flag"]


def test_an_unknown_backend_is_an_error_while_compiling(scaling: dict) -> None:
    run, _ = compiled()
    with pytest.raises(Exception, match=r"expected one of .*, got 'none-such'"):
        run(rows(5), backend="none-such")
