"""Is the line of the log the one that was promised, as often as asked, and never waited for?"""

import logging
from collections.abc import Callable

import pytest
import torch
from nsa import NSACache, layer_observer, observe
from nsa.later_copy import LaterCopy
from nsa.layer_observer import making_a_graph
from nsa.sampling import Sampler, line, route_of
from nsa_routing import RateLimit
from nsa_varlen import VarlenLayout
from torch import Tensor

NUMBERS = {
    **{"reads.cmp": 4095.0, "reads.slc": 1024.0, "reads.win": 512.0, "budget": 5631.0, "nonfinite": 0},
    **{"gate_mean.cmp": 0.31, "gate_mean.slc": 0.52, "gate_mean.win": 0.17},
    **{"gate_std.cmp": 0.08, "gate_std.slc": 0.11, "gate_std.win": 0.05},
}
EXAMPLE = (
    "nsa decode layer=3 S=65536 reads cmp=4095 slc=1024 win=512 (budget 5631) "
    "gate cmp=.31±.08 slc=.52±.11 win=.17±.05 route=triton"
)


def test_the_example_of_the_line() -> None:
    assert line("decode", 3, 65536.0, NUMBERS, "triton") == EXAMPLE


def test_what_is_wrong_is_added() -> None:
    assert line("decode", 3, 65536.0, NUMBERS | {"nonfinite": 2}, "triton", 1) == f"{EXAMPLE} nonfinite=2 failures=1"


@pytest.mark.parametrize("value, shown", [(0.0, ".00"), (0.004, ".00"), (0.996, "1.00"), (1.0, "1.00"), (0.5, ".50")])
def test_how_a_gate_is_written(value: float, shown: str) -> None:
    said = line("prefill", 0, 1.0, NUMBERS | {"gate_mean.cmp": value, "gate_std.cmp": value}, "sdpa")
    assert f" gate cmp={shown}±{shown} slc" in said


def test_means_and_gaps() -> None:
    said = line("prefill", 0, 7.0, {"reads.cmp": 10.25, "reads.slc": 3.0}, "-")
    assert said == "nsa prefill layer=0 S=7 reads cmp=10.2 slc=3 win=- (budget -) gate cmp=- slc=- win=- route=-"


def test_routes_that_differ() -> None:
    assert route_of({"window_attention": "fa2", "combine": "triton"}) == "combine:triton,window_attention:fa2"
    assert route_of({}) == "-"


# --- from a layer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines so far, with what makes them appear."""
    caplog.set_level(logging.INFO, "nsa")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "nsa" and r.levelno == logging.INFO]


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 24, dtype=torch.float64)


def step(layer: torch.nn.Module, cache: NSACache, counts: list[int]) -> None:
    cache.reserve(counts)
    layer.decode(tokens(len(counts), 1), cache, torch.tensor(counts, dtype=torch.int32))
    cache.advance(counts)


@torch.no_grad()
def test_a_layer_says_what_its_step_read(make_layer: Callable, make_cache: Callable, lines: Callable) -> None:
    """For one sequence by the formulas: 102 tokens, 24 compressed blocks, 3 whole blocks and 6 tokens of its own."""
    layer = make_layer()
    cache = make_cache(layer.config)
    with torch.no_grad():
        layer.gates.out.weight.zero_()
        layer.gates.out.bias.zero_()
    with observe(layer):
        layer(tokens(1, 101), cache=cache)
        step(layer, cache, [1])
    first, second = lines()
    assert first.startswith("nsa prefill layer=0 S=101 reads cmp=")
    assert second == (
        "nsa decode layer=0 S=102 reads cmp=24 slc=54 win=12 (budget 100) "
        "gate cmp=.50±.00 slc=.50±.00 win=.50±.00 route=sdpa"
    )


@torch.no_grad()
def ten_steps(make_layer: Callable, make_cache: Callable, **options: float) -> None:
    """A second apart; the length in a line says which step it was."""
    layer, clock = make_layer(), Clock()
    cache = make_cache(layer.config)
    with observe(layer, clock=clock, **options):
        for _ in range(10):
            step(layer, cache, [1])
            clock.now += 1.0


def lengths(lines: list[str]) -> list[int]:
    return [int(said.split("S=")[1].split()[0]) for said in lines]


@pytest.mark.parametrize(
    "every, seconds, expected",
    [
        (None, None, [1]),
        (4, None, [1, 4, 8]),
        (None, 3.0, [1, 4, 7, 10]),
        (2, 3.0, [1, 4, 7, 10]),
        (4, 5.0, [1, 6]),
        (5, 1.0, [1, 5, 10]),
    ],
)
def test_rates_by_steps_and_by_seconds(
    every: int | None,
    seconds: float | None,
    expected: list[int],
    make_layer: Callable,
    make_cache: Callable,
    lines: Callable,
) -> None:
    ten_steps(make_layer, make_cache, log_every=every, log_seconds=seconds)
    assert lengths(lines()) == expected


@pytest.mark.parametrize(
    "flag, options, expected",
    [
        ("3", {}, [1, 3, 6, 9]),
        ("4s", {}, [1, 5, 9]),
        ("2,5s", {}, [1, 6]),
        ("3", {"log_every": 5}, [1, 5, 10]),
        ("2,5s", {"log_seconds": 0.0}, [1, 2, 4, 6, 8, 10]),
    ],
)
def test_the_flag_is_the_default(
    flag: str,
    options: dict,
    expected: list[int],
    make_layer: Callable,
    make_cache: Callable,
    lines: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NSA_LOG_EVERY", flag)
    ten_steps(make_layer, make_cache, **options)
    assert lengths(lines()) == expected


@torch.no_grad()
def test_a_step_without_queries_leaves_its_turn_to_the_next(
    make_layer: Callable, make_cache: Callable, lines: Callable
) -> None:
    layer = make_layer()
    cache = make_cache(layer.config, 2)
    with observe(layer):
        step(layer, cache, [0, 0])
        layer(tokens(0), layout=VarlenLayout.from_lengths([0, 0]), cache=cache)
        assert lines() == []
        step(layer, cache, [1, 0])
        step(layer, cache, [1, 0])
    assert [said.split(" reads")[0] for said in lines()] == ["nsa decode layer=0 S=1"]


@torch.no_grad()
def test_a_replay_ticks_until_the_observer_is_closed(
    make_layer: Callable, make_cache: Callable, lines: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `DecodeGraph` does it; the device's part is done by a step here."""
    layer = make_layer()
    cache = make_cache(layer.config)
    with observe(layer, log_every=1):
        with making_a_graph() as found, monkeypatch.context() as capture:
            capture.setattr(layer_observer, "capturing", lambda device: True)
            step(layer, cache, [1])
        assert lines() == []
        (recorded,) = found
        recorded.observer.replayed(is_counted=False)
        assert lines() == []
        recorded.count()
        recorded.observer.replayed(is_counted=True)
        assert len(lines()) == 1
    recorded.observer.replayed(is_counted=True)
    assert len(lines()) == 1


@torch.no_grad()
def test_nothing_is_copied_while_nobody_listens(
    make_layer: Callable, make_cache: Callable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: LaterCopy) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(LaterCopy, "start", never)
    caplog.set_level(logging.WARNING, "nsa")
    layer = make_layer()
    with observe(layer, log_every=1):
        step(layer, make_cache(layer.config), [1])


# --- copies that take their time


class Slow(LaterCopy):
    """A copy that lands when the test says so."""

    there = False

    def landed(self) -> bool:
        return self.there


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    monkeypatch.setattr("nsa.sampling.LaterCopy", Slow)
    monkeypatch.setattr(Slow, "there", False)
    return Slow


def test_the_line_is_of_the_step_that_was_due(slow: type[Slow], lines: Callable) -> None:
    """It comes with a later step; steps that are due meanwhile wait until the copy is free."""
    state, said = torch.zeros(1), []
    sampler = Sampler(
        state,
        lambda kind, values: said.append((kind, *values)) or f"{kind} {values}",
        {"decode": RateLimit(2), "prefill": RateLimit()},
    )
    for number in range(1, 8):
        state.fill_(number)
        slow.there = number in (4, 7)
        sampler.tick("prefill" if number == 5 else "decode")
    # 1 is due and on its way until 4; 2 and 4 are due meanwhile; 5 is the first prefill, on its way until 7.
    assert said == [("decode", 1.0), ("prefill", 5.0)]
    slow.there = True
    state.fill_(8)
    sampler.tick("decode")
    assert said[2:] == [("decode", 8.0)]
    assert len(lines()) == 3
