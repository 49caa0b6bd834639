"""Does routing on a GPU wait for nothing it need not wait for, and does news of a bad result arrive all the same?"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import nsa_routing
import pytest
import torch
from nsa_routing import Problem, backends, dispatch, dispatching, plan_for, probe
from nsa_routing.device_flag import Alarm
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROUTE = ("triton", "combine", "cuda:0")


@dataclass
class Adder:
    """`combine` that adds its arguments on the device, and NaN where `poison` holds one; no operation else."""

    name: str
    poison: Tensor = field(default_factory=lambda: torch.zeros((), device="cuda"))

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        return None if op == "combine" else f"has no operation {op}"

    def combine(self, gates: Tensor, *outputs: Tensor) -> Tensor:
        return outputs[0] + outputs[1] + outputs[2] + self.poison


@pytest.fixture
def triton() -> Adder:
    return Adder("triton")


@pytest.fixture(autouse=True)
def _two_backends(triton: Adder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A "triton" that can be poisoned over an honest "sdpa"; flags and routes of nobody else."""
    for name in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NSA_PRESET", "perf")
    points = [SimpleNamespace(name=b.name, value=b.name, load=lambda b=b: b) for b in (triton, Adder("sdpa"))]
    monkeypatch.setattr(backends, "entry_points", lambda group: points)
    monkeypatch.setattr(dispatching, "profile_of", lambda *_: ("sm90", None))
    nsa_routing.reset()
    yield
    nsa_routing.reset()


@pytest.fixture
def run() -> Callable[[], Tensor]:
    """combine(1, 1, 1) along the automatic route: 3 everywhere, from whichever backend."""
    ones = torch.ones(4, 2, 8, device="cuda")
    problem = Problem("combine", "cuda", torch.float32, 8, 8, 1, total_q=4)
    return lambda: dispatch("combine", problem)(ones[..., :3], ones, ones, ones)


def test_the_probe_knows_the_gpu() -> None:
    found = probe()
    assert (found.device, found.unknown) == ("cuda", ())
    assert found.sm == 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    assert found.name == torch.cuda.get_device_name()
    assert found.memory == torch.cuda.get_device_properties(0).total_memory
    assert found.cuda == torch.version.cuda
    assert found.cudnn == torch.backends.cudnn.version()
    assert found.driver is not None
    assert int(found.driver.split(".")[0]) > 400


def test_a_flag_costs_no_synchronisation_and_its_news_arrive(run: Callable, triton: Adder) -> None:
    assert plan_for(Problem("combine", "cuda", torch.float32, 8, 8, 1)).backend == "triton"
    run()  # makes the flag
    triton.poison.fill_(torch.nan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bad = run()
        triton.poison.zero_()
        for _ in range(Alarm.SENT_EVERY):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(bad.isnan().all())  # it went out
    torch.cuda.synchronize()
    triton.poison.fill_(torch.nan)
    assert bool(run().isnan().all())  # after the alarm it is found out whose fault it is
    torch.cuda.synchronize()
    assert bool((run() == 3).all())  # the news were there: sdpa ran
    assert nsa_routing.closed() == {ROUTE}


def test_always_recomputes_in_the_same_call(
    run: Callable, triton: Adder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NSA_CHECK_FINITE", "always")
    nsa_routing.reset()
    triton.poison.fill_(torch.inf)
    assert bool((run() == 3).all())
    assert nsa_routing.closed() == {ROUTE}
    assert "NSA_BACKEND=combine=triton" in caplog.text
    nsa_routing.reset()
    triton.poison.zero_()
    assert bool((run() == 3).all())
    assert nsa_routing.closed() == frozenset()


@pytest.mark.parametrize("check", ["always", "flag"])
def test_inside_a_graph_results_are_flagged(
    check: str, run: Callable, triton: Adder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_CHECK_FINITE", check)
    nsa_routing.reset()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    torch.cuda.synchronize()
    assert bool((out == 3).all())
    assert nsa_routing.poll() == frozenset()
    triton.poison.fill_(torch.nan)
    graph.replay()
    triton.poison.zero_()
    graph.replay()  # a good replay does not hide the bad one
    assert nsa_routing.poll() == frozenset(), "an alarm"
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):  # which holds looks at the inputs too
        run()
    triton.poison.fill_(torch.nan)
    graph.replay()
    assert nsa_routing.poll() == {ROUTE}
    assert bool((run() == 3).all())


def test_out_of_memory_falls_back_and_leaves_the_route_open(
    run: Callable, triton: Adder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def combine(self: Adder, gates: Tensor, *outputs: Tensor) -> Tensor:
        if self.name == "triton":
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return outputs[0] + outputs[1] + outputs[2]

    monkeypatch.setattr(Adder, "combine", combine)
    nsa_routing.reset()
    assert bool((run() == 3).all())
    assert "ran out of memory" in caplog.text
    assert nsa_routing.closed() == frozenset()


def test_compiled_code_takes_the_same_route(triton: Adder) -> None:
    def whole(x: Tensor) -> Tensor:
        problem = Problem("combine", x.device.type, x.dtype, x.shape[2], x.shape[2], 1, total_q=x.shape[0])
        return dispatch("combine", problem)(x, x, x, x) * 2

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    x = torch.ones(4, 2, 8, device="cuda")
    assert bool((compiled(x) == 6).all())
    triton.poison.fill_(torch.nan)
    assert bool(compiled(x).isnan().all())
    assert nsa_routing.poll() == {ROUTE}
    assert bool((compiled(x) == 6).all())
