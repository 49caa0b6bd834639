"""Does tune find where a backend begins to pay, mistrust wrong results, and write only what loads?

The clock is made up: a backend moves it by what a call of it costs.
"""

import csv
import datetime
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from nsa_routing import Policy, Problem, backends, load_profile, plan, probe, reset
from nsa_routing.profile import SHIPPED
from nsa_routing.tuning import COLUMNS, TuningError, _tune, measuring, tune
from nsa_routing.tuning.findings import _advice, crossover, wins
from nsa_routing.tuning.measuring import Timing, compare, stopwatch
from torch import Tensor

LENGTHS = (128, 256, 512, 1024)
WINDOW = {"ops": ("window_attention",), "lengths": LENGTHS, "repeat": 5, "device": "cpu"}


class Clock:
    """Stands still until someone moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, x[..., 0].T.float().contiguous()


@dataclass
class Made:
    """A backend that computes `run` of its one tensor and takes `cost` milliseconds at each length."""

    name: str
    clock: Clock
    cost: Callable[[int], float] = lambda length: 1.0
    run: Callable[[Tensor], Any] = exact
    refused: str | None = None
    uses_triton: bool = False
    calls: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def refuse(self, op: str, problem: Problem, environment: object) -> str | None:
        return self.refused

    def window_attention(self, x: Tensor, **kwargs: Any) -> Any:
        self.calls.append((len(x), kwargs))
        self.clock.now += self.cost(len(x)) / 1e3
        return self.run(x)

    combine = window_attention


def op_inputs(op: str, lengths_q: list[int], lengths_k: list[int], **given: Any) -> tuple[Any, Any]:
    """Of the group's contract as much as `Made` needs."""
    (length,) = lengths_q
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(length, 2, given["head_dim"], generator=generator, dtype=given["dtype"])
    return (x.requires_grad_(given["requires_grad"]),), {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(measuring, "perf_counter", made)
    return made


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable[..., None]:
    """Install these backends beside an `sdpa` that takes 10 ms, and the inputs for them."""

    def install(*made: Made, sdpa: Made | None = None) -> None:
        module = ModuleType("made_backends")
        points = []
        for number, backend in enumerate((sdpa or Made("sdpa", clock, lambda length: 10.0), *made)):
            setattr(module, f"backend_{number}", backend)
            points.append(EntryPoint(backend.name, f"made_backends:backend_{number}", "nsa.backends"))
        module.op_inputs = op_inputs
        monkeypatch.setitem(sys.modules, "made_backends", module)
        monkeypatch.setattr(backends, "entry_points", lambda group: tuple(points))
        inputs = EntryPoint("made", "made_backends:op_inputs", "nsa.op_inputs")
        monkeypatch.setattr(_tune, "entry_points", lambda group: {"nsa.op_inputs": (inputs,)}[group])
        reset()

    return install


def timing(median: float, spread: float = 0.0) -> Timing:
    return Timing(median, median - spread, median + spread, median - 2 * spread)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({1: 9, 2: 9, 4: 1, 8: 1}, 4),
        ({1: 1, 2: 1, 4: 1, 8: 1}, 1),
        ({1: 9, 2: 9, 4: 9, 8: 9}, None),
        ({1: 1, 2: 1, 4: 1, 8: 9}, None),
        ({1: 1, 2: 9, 4: 1, 8: 1}, 4),
        ({1: 9, 2: 9, 4: 9, 8: 1}, 8),
        ({1: 1, 2: 1, 4: 1, 8: 5}, None),
        ({1: 1, 2: 1, 8: 1}, 8),
        ({}, None),
    ],
    ids=["middle", "always", "never", "only-short", "with-a-gap", "longest", "tie", "missing", "none"],
)
def test_crossover(own: dict[int, float], expected: int | None) -> None:
    timings = {length: timing(median) for length, median in own.items()}
    assert crossover(timings, {length: timing(5) for length in (8, 1, 4, 2)}) == expected


def test_a_win_is_one_by_more_than_the_spread() -> None:
    assert wins(timing(4, 0.4), timing(5, 0.5))
    assert not wins(timing(4, 0.5), timing(5, 0.5)), "the quartiles touch"
    assert not wins(timing(4, 0.1), timing(5, 2)), "sdpa's spread counts too"
    assert not wins(timing(5), timing(4))


def test_a_win_is_one_by_a_fifth() -> None:
    assert wins(timing(10), timing(12)), "exactly 1.2 times as fast"
    assert not wins(timing(10), timing(11.999)), "beyond the spread is not enough"
    assert wins(timing(10), timing(11.999), 1.1)
    assert not wins(timing(10), timing(12), 1.3)
    assert wins(timing(10), timing(10.001), 1)
    assert not wins(timing(10), timing(10), 1), "the spread counts at every factor"


def test_quartiles_of_the_calls() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3, 2, 4, 1)
    assert Timing.of([1.0, 2.0, 4.0]) == Timing(2, 1.5, 3, 1)


def test_a_threshold_in_the_middle_drives_the_plan(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    offer(Made("dense", clock, lambda length: 20.0 if length < 512 else 5.0))
    tuned = tune(tmp_path / "mine.yaml", **WINDOW, preset="perf")
    (found,) = tuned.findings
    assert (found.outcome, found.at_least) == ("threshold", 512)
    profile = load_profile(tuned.profile)
    assert (profile.name, tuned.extends) == ("mine", "cpu")
    assert profile.order["window_attention"][-2:] == ("dense", "sdpa")
    measured = profile.thresholds["window_attention"]["dense"].measured
    assert (measured.date, measured.csv) == (datetime.date.today(), "mine.csv")
    assert measured.gpu

    def chosen(q: int, k: int, preset: str = "perf") -> str | None:
        problem = Problem(
            "window_attention", "cpu", torch.float32, 128, 128, 16, total_q=2048, max_seqlen_q=q, max_seqlen_k=k
        )
        return plan(probe("cpu"), profile, problem, Policy(preset=preset)).backend

    assert [chosen(511, 511), chosen(512, 512), chosen(4096, 4096)] == ["sdpa", "dense", "dense"]
    assert chosen(1, 4096) == "sdpa", "a decode step was not measured"
    assert chosen(512, 512, "safe") == "sdpa"


def test_combine_has_no_keys_to_bound(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    offer(Made("dense", clock, lambda length: 5.0))
    given = {"ops": ("combine",), "lengths": (64, 32, 64), "repeat": 3, "device": "cpu"}
    tuned = tune(tmp_path / "mine.yaml", **given, preset="perf")
    assert [row.length for row in tuned.rows if row.backend == "sdpa"] == [32, 64]
    threshold = load_profile(tuned.profile).thresholds["combine"]["dense"]
    assert threshold.at_least.model_dump(exclude_none=True) == {"total_q": 32}


def test_always_faster_pays_from_the_shortest_length(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    offer(Made("dense", clock, lambda length: 5.0))
    assert tune(tmp_path / "mine.yaml", **WINDOW, preset="perf").findings[0].at_least == 128


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (lambda length: 20.0, "at no length"),
        (lambda length: 10.0, "at no length"),
        (lambda length: 8.5, "at no length"),
        (lambda length: length / 80, "at 128, 256, 512 tokens only"),
    ],
    ids=["slower", "equal", "little-faster", "only-short"],
)
def test_what_does_not_pay_gets_no_threshold(
    cost: Callable, words: str, offer: Callable, clock: Clock, tmp_path: Path
) -> None:
    words = f"no threshold: {words} 1.2 times as fast as sdpa, beyond the spread"
    offer(Made("dense", clock, cost))
    tuned = tune(tmp_path / "mine.yaml", **WINDOW, preset="perf")
    (found,) = tuned.findings
    assert (found.outcome, found.at_least, found.words) == ("never", None, words)
    text = tuned.profile.read_text()
    assert f"# window_attention, dense: {words}\n" in text
    assert yaml.safe_load(text).keys() == {"name", "extends", "source"}
    assert load_profile(tuned.profile).order == load_profile("cpu").order


def test_how_fast_is_fast_enough_is_said(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    dense = Made("dense", clock, lambda length: 8.5)
    offer(dense)
    tuned = tune(tmp_path / "mine.yaml", **WINDOW, preset="perf", speedup=1.1)
    assert tuned.findings[0].at_least == 128
    words = "A backend pays where it is at least 1.1 times as fast as sdpa."
    assert load_profile(tuned.profile).source.endswith(words)
    (found,) = tune(tmp_path / "mine.yaml", **WINDOW, preset="perf", speedup=1.5).findings
    assert found.words == "no threshold: at no length 1.5 times as fast as sdpa, beyond the spread"
    dense.cost = lambda length: length / 80
    (found,) = tune(tmp_path / "mine.yaml", **WINDOW, preset="perf", speedup=2).findings
    assert found.words == "no threshold: at 128, 256 tokens only 2 times as fast as sdpa, beyond the spread"


def test_a_backend_that_no_preset_takes_needs_the_option(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    offer(Made("dense", clock, lambda length: 5.0))
    tuned = tune(tmp_path / "mine.yaml", **WINDOW)
    assert tuned.findings[0].outcome == "no preset"
    assert "pays from 128 tokens, but profile cpu does not take it; --preset" in tuned.profile.read_text()
    assert not load_profile(tuned.profile).thresholds


def test_triton_is_never_entered_in_safe(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    offer(Made("quick", clock, lambda length: 5.0, uses_triton=True))
    assert tune(tmp_path / "safe.yaml", **WINDOW, preset="safe").findings[0].outcome == "no preset"
    tuned = tune(tmp_path / "perf.yaml", **WINDOW, preset="perf")
    assert load_profile(tuned.profile).presets == {"safe": {}, "perf": {"quick": "measured"}}


def sm80(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune as if the CPU's shipped profile were that of SM 8.0, where nothing is measured."""
    monkeypatch.setattr(_tune, "profile_of", lambda device, sm: ("sm80", None))


def test_a_measured_threshold_replaces_a_believed_one(
    offer: Callable, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sm80(monkeypatch)
    offer(Made("fa2", clock, lambda length: 5.0))
    tuned = tune(tmp_path / "mine.yaml", **WINDOW)
    assert yaml.safe_load(tuned.profile.read_text()).keys() == {"name", "extends", "source", "thresholds"}
    profile, before = load_profile(tuned.profile), load_profile("sm80")
    assert profile.thresholds["window_attention"]["fa2"].at_least.max_seqlen_k == 128
    others = ("window_attention", "fa2-torch"), ("compressed_attention", "fa2")
    assert all(profile.thresholds[op][name] == before.thresholds[op][name] for op, name in others)
    problem = Problem("window_attention", "cpu", torch.float32, 8, 8, 1, max_seqlen_q=128, max_seqlen_k=128)
    answers = [plan(probe("cpu"), one, problem, Policy(preset="safe")).backend for one in (before, profile)]
    assert answers == ["sdpa", "fa2"], "safe trusts what is measured"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("fa2", "the unmeasured threshold of profile sm80 holds on: thresholds: {window_attention: {fa2: null}} remov"),
        ("triton", "preset perf takes it at every length that no threshold excludes: order: {window_attention: [fa2, "),
    ],
)
def test_what_the_extended_profile_goes_on_believing_is_said(
    name: str, advice: str, offer: Callable, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sm80(monkeypatch)
    offer(Made(name, clock, lambda length: 20.0))
    tuned = tune(tmp_path / "mine.yaml", **WINDOW)
    assert advice in tuned.findings[0].words
    text = tuned.profile.read_text()
    assert advice in text
    followed = {"thresholds": {"window_attention": {"fa2": None}}, "order": {"window_attention": ["fa2-torch", "sdpa"]}}
    (tmp_path / "followed.yaml").write_text(text + yaml.safe_dump(followed))
    assert "fa2" not in load_profile(tmp_path / "followed.yaml").thresholds["window_attention"]


@pytest.mark.parametrize("shipped", sorted(file.stem for file in SHIPPED.glob("*.yaml") if file.stem != "base"))
def test_what_is_said_to_stop_a_backend_loads_and_stops_it(shipped: str, tmp_path: Path) -> None:
    """Of each operation and backend that a preset takes at any length."""
    profile = load_profile(shipped)
    for op, order in profile.order.items():
        for name in order[:-1]:
            said = re.findall(r"\w+: \{\w+: (?:\[[^]]*\]|\{[^}]*\})\}", _advice(op, name, profile))
            mappings = [yaml.safe_load(each) for each in said]
            document = {"name": "mine", "extends": shipped, "source": "a test"}
            file = tmp_path / f"{op}-{name}.yaml"  # a file is read once
            file.write_text(yaml.safe_dump(document | {key: value for each in mappings for key, value in each.items()}))
            found = load_profile(file)
            assert name not in found.thresholds.get(op, {})
            always = "always" in [modes.get(name) for modes in profile.presets.values()]
            if always and name not in profile.denials.get(op, {}):  # what is denied no preset takes
                assert list(found.order[op]) == [other for other in order if other != name]
                assert name not in found.prefer.get(op, {})


def off(x: Tensor, by: float) -> tuple[Tensor, Tensor]:
    out, lse = exact(x)
    return out * (1 + by), lse


def one_row_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = exact(x)
    keep = torch.arange(len(x)) != len(x) - 1
    return out * keep[:, None, None], lse


def nan(x: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = exact(x)
    return torch.where(torch.arange(len(x))[:, None, None] == 3, torch.nan, out), lse


def explode(x: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) > 256:
        raise ArithmeticError("too\n long")
    return exact(x)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda x: off(x, 2e-3), "out is off sdpa's by 0.002 of a row's length, at 128 tokens"),
        (one_row_zero, "out is off sdpa's by"),
        (nan, "out is off sdpa's by nan of a row's length, at 128 tokens"),
        (lambda x: (exact(x)[0], exact(x)[1] * 1.4427), "lse is off sdpa's by"),
        (lambda x: (exact(x)[0], exact(x)[1] - torch.inf), "lse is off sdpa's by inf, at 128 tokens"),
        (lambda x: exact(x)[0], r"returns ['out'], sdpa ['out', 'lse'], at 128 tokens"),
        (lambda x: (exact(x)[0].half(), exact(x)[1]), "out is torch.float16 [128, 2, 8], sdpa's torch.float32 [128, 2"),
        (lambda x: (exact(x)[0][1:], exact(x)[1]), "out is torch.float32 [127, 2, 8], sdpa's torch.float32 [128"),
        (lambda x: (None, exact(x)[1]), "out is NoneType, sdpa's torch.float32 [128, 2, 8], at 128 tokens"),
        (explode, "raises ArithmeticError: too long, at 512 tokens"),
    ],
    ids=["scaled", "a-row", "nan", "log2", "minus-inf", "no-lse", "dtype", "shape", "none", "raises"],
)
def test_wrong_results_are_told_and_get_no_threshold(
    run: Callable, words: str, offer: Callable, clock: Clock, tmp_path: Path
) -> None:
    wrong, good = (Made(name, clock, lambda length: 1.0) for name in ("wrong", "good"))
    wrong.run = run
    offer(wrong, good)
    tuned = tune(tmp_path / "mine.yaml", **WINDOW, head_dim=8, preset="perf")
    told = {found.backend: found for found in tuned.findings}
    assert told["wrong"].outcome == "wrong"
    assert words in told["wrong"].words
    assert told["good"].at_least == 128
    assert list(load_profile(tuned.profile).thresholds["window_attention"]) == ["good"]
    longest = int(told["wrong"].words.split()[-2])
    assert not [row for row in tuned.rows if row.backend == "wrong" and row.length >= longest]
    assert max(length for length, _ in wrong.calls) == longest, "it is not asked again"


def test_rounding_is_not_wrong(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    offer(Made("dense", clock, lambda length: 5.0, run=lambda x: off(x, 1e-4)))
    assert tune(tmp_path / "mine.yaml", **WINDOW, preset="perf").findings[0].outcome == "threshold"


def test_gradients_are_compared_too(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * grad

    wrong = Made("wrong", clock, run=lambda x: (Doubled.apply(x), exact(x)[1].detach()))
    offer(wrong, Made("right", clock))
    assert tune(tmp_path / "no.yaml", **WINDOW, preset="perf").findings[0].outcome == "threshold"
    tuned = tune(tmp_path / "yes.yaml", **WINDOW, preset="perf", grad=True)
    assert "gradient 0 is off sdpa's by 0.5 of a row's length" in tuned.findings[1].words
    assert [found.outcome for found in tuned.findings] == ["threshold", "wrong"]
    assert "with gradients" in load_profile(tuned.profile).source
    wrong.run = lambda x: off(x, 0.5)
    tuned = tune(tmp_path / "yes.yaml", **WINDOW, preset="perf", grad=True)
    assert "out is off sdpa's by 0.5 of a row's length" in tuned.findings[1].words


def test_a_backend_that_fails_while_it_is_timed(clock: Clock) -> None:
    calls = []

    def run(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > 5:
            raise MemoryError("no more")
        return 2 * x

    watch = stopwatch("cpu")
    timings, wrong = compare(lambda x: 2 * x, {"dense": run}, (torch.ones(4, 2, 3),), {}, repeat=6, watch=watch)
    assert (list(timings), wrong) == (["sdpa"], {"dense": "raises MemoryError: no more"})
    assert len(calls) == 6


@pytest.mark.parametrize(("differing", "accepted"), [(1, True), (3, False)])
def test_chosen_blocks_may_differ_in_a_near_tie_or_two(differing: int, accepted: bool, clock: Clock) -> None:
    x = torch.zeros(100, 1, 4, dtype=torch.int32)
    other = x.clone()
    other[:differing, 0, 2] = 1
    args = (torch.ones(1),)
    _, wrong = compare(lambda _: x, {"dense": lambda _: other}, args, {}, repeat=3, watch=stopwatch("cpu"))
    assert wrong == ({} if accepted else {"dense": "out differs from sdpa's in 3.0% of its rows"})


def test_each_backend_goes_first_in_turn() -> None:
    order = []

    def named(name: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            order.append(name)
            return x

        return run

    def watch(run: Callable[[], object]) -> float:
        run()
        return 1.0

    others = {name: named(name) for name in ("b", "c")}
    compare(named("a"), others, (torch.ones(2, 2, 2),), {}, repeat=6, watch=watch, name="a")
    rounds = [order[start : start + 3] for start in range(3, len(order), 3)]
    assert len(rounds) == measuring.WARM_UP + 6
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert all(first[0] != second[0] for first, second in pairwise(rounds))
    assert {names[0] for names in rounds} == {"a", "b", "c"}


def test_warm_up_is_not_timed(clock: Clock) -> None:
    left = [0.5] * (1 + measuring.WARM_UP) + [0.001] * 5

    def run(x: Tensor) -> Tensor:
        clock.now += left.pop(0)
        return x

    timings, _ = compare(run, {}, (torch.ones(2, 2, 2),), {}, repeat=5, watch=stopwatch("cpu"))
    assert timings["sdpa"].p75_ms == pytest.approx(1.0, abs=1e-9)  # doubles near 2.0, times 1e3
    assert left == []


@pytest.mark.parametrize(
    ("properties", "least"),
    [(SimpleNamespace(L2_cache_size=50 << 20), 100 << 20), (SimpleNamespace(), 2 * measuring.LARGEST_L2)],
    ids=["told", "not told"],
)
def test_on_cuda_each_call_finds_the_l2_cache_overwritten(
    properties: SimpleNamespace, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bytes that are written before the clock starts, every time."""
    done: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("synchronize")

        def elapsed_time(self, end: object) -> float:
            return 2.5

    class Bytes:
        def zero_(self) -> None:
            done.append("flush")

    def empty(size: int, *, dtype: torch.dtype, device: str) -> Bytes:
        assert size * dtype.itemsize >= least
        assert device == "cuda"
        return Bytes()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: properties}.get)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    watch = stopwatch("cuda")
    assert [watch(lambda: done.append("run")) for _ in range(2)] == [2.5, 2.5]
    assert done == 2 * ["flush", "record", "run", "record", "synchronize"]


def test_the_raw_measurements(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    offer(Made("dense", clock, lambda length: length / 100))
    tuned = tune(tmp_path / "mine.yaml", **WINDOW, num_heads=6, num_kv_heads=3, head_dim=8, v_head_dim=4)
    with tuned.csv.open() as file:
        read = csv.DictReader(file)
        rows = list(read)
    assert tuple(read.fieldnames or ()) == COLUMNS
    keys = [(row["op"], int(row["length"]), row["backend"]) for row in rows]
    assert keys == [("window_attention", length, name) for length in LENGTHS for name in ("sdpa", "dense")]
    row = rows[-1]
    environment = probe("cpu")
    assert {name: row[name] for name in COLUMNS if name not in ("op", "backend", "length", "device")} == {
        "date": datetime.date.today().isoformat(),
        "torch": environment.torch,
        "triton": environment.triton or "",
        "flash_attn": environment.flash_attn or "",
        "cudnn": "",
        "num_heads": "6",
        "num_kv_heads": "3",
        "head_dim": "8",
        "v_head_dim": "4",
        "dtype": "float32",
        "grad": "0",
        "repeats": "5",
        **dict.fromkeys(("median_ms", "p25_ms", "p75_ms", "min_ms"), "10.240000"),
    }
    assert row["device"] == load_profile(tuned.profile).source.split(", ")[1].partition(":")[0]


@pytest.mark.parametrize(
    ("facts", "columns", "words"),
    [
        (
            {"triton": "3.6.0", "flash_attn": "2.8.3", "cudnn": 91900},
            ["2.11.0", "3.6.0", "2.8.3", "9.19.0"],
            "torch 2.11.0, triton 3.6.0, flash-attn 2.8.3, cuDNN 9.19.0",
        ),
        ({"triton": None, "flash_attn": None, "cudnn": None}, ["2.11.0", "", "", ""], "torch 2.11.0"),
    ],
    ids=["all", "none"],
)
def test_the_versions_that_were_measured(
    facts: dict[str, Any],
    columns: list[str],
    words: str,
    offer: Callable,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(Made("dense", clock, lambda length: 5.0))
    monkeypatch.setattr(_tune, "probe", lambda *_: replace(probe("cpu"), torch="2.11.0", **facts))
    tuned = tune(tmp_path / "mine.yaml", **WINDOW, preset="perf")
    assert load_profile(tuned.profile).thresholds["window_attention"]["dense"].measured.versions == words
    with tuned.csv.open() as file:
        found = [[row[name] for name in ("torch", "triton", "flash_attn", "cudnn")] for row in csv.DictReader(file)]
    assert found == [columns] * len(found)


def test_what_is_measured_is_a_uniform_batch(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    class Uniform(Made):
        def refuse(self, op: str, problem: Problem, environment: object) -> str | None:
            return None if problem.uniform else "takes uniform batches only"

    offer(Uniform("dense", clock, lambda length: 5.0))
    (found,) = tune(tmp_path / "mine.yaml", **WINDOW, preset="perf").findings
    assert found.outcome == "threshold"


def test_a_backend_that_refuses_is_not_run(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    shy = Made("shy", clock, refused="takes no float32")
    offer(shy, Made("dense", clock))
    tuned = tune(tmp_path / "mine.yaml", **WINDOW)
    told = {found.backend: found for found in tuned.findings}
    assert (told["shy"].outcome, told["shy"].words) == ("refused", "not measured: takes no float32")
    assert shy.calls == []


def test_flags_that_forbid_are_kept_and_requests_do_not_count(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    fa2 = Made("fa2", clock)
    offer(fa2, Made("dense", clock))
    requests = Policy(fa2="0", backends=(("window_attention", "sdpa"),), profile="no-such", deterministic=True)
    tuned = tune(tmp_path / "mine.yaml", **WINDOW, policy=requests)
    assert [(found.backend, found.outcome) for found in tuned.findings] == [("fa2", "refused"), ("dense", "no preset")]
    dense = backends.load_backend("dense")
    assert all(kwargs == {"deterministic": True} for _, kwargs in dense.calls)
    tune(tmp_path / "mine.yaml", **WINDOW, policy=replace(requests, fa2="auto", deterministic=False))
    assert all(kwargs == {} for _, kwargs in fa2.calls)
    assert fa2.calls


def test_with_sdpa_alone_there_is_nothing_to_measure(offer: Callable, tmp_path: Path, clock: Clock) -> None:
    offer()
    with pytest.raises(TuningError, match=r"^expected sdpa and another backend .*, got \(installed\) sdpa$"):
        tune(tmp_path / "mine.yaml", **WINDOW)
    offer(Made("shy", clock, refused="not here"))
    with pytest.raises(TuningError, match=r"got none: window_attention, shy: not measured: not here$"):
        tune(tmp_path / "mine.yaml", **WINDOW)
    assert list(tmp_path.iterdir()) == []


def test_without_inputs_there_is_nothing_to_measure(
    offer: Callable, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(Made("dense", clock))
    monkeypatch.setattr(_tune, "entry_points", lambda group: ())
    with pytest.raises(TuningError, match=r"group nsa\.op_inputs, got \[\]; nsa-varlen offers one$"):
        tune(tmp_path / "mine.yaml", **WINDOW)


def test_sdpa_out_of_memory(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    def run(x: Tensor) -> Any:
        if len(x) == 512:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return exact(x)

    offer(Made("dense", clock), sdpa=Made("sdpa", clock, run=run))
    message = r"^window_attention at 512 tokens: sdpa ran out of memory; take shorter lengths$"
    with pytest.raises(TuningError, match=message):
        tune(tmp_path / "mine.yaml", **WINDOW)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_does_not_load_leaves_nothing_and_spoils_nothing(
    offer: Callable, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(Made("dense", clock))
    (tmp_path / "mine.yaml").write_text("old")
    monkeypatch.setattr(_tune, "entries", lambda *_: {"order": {"window_attention": ["dense"]}})
    with pytest.raises(ValueError, match=r"order\.window_attention: expected sdpa at the end"):
        tune(tmp_path / "mine.yaml", **WINDOW)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "old"


def test_tuning_anew_replaces_what_was_loaded(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    dense = Made("dense", clock)
    offer(dense)
    for pays_from in (512, 256):
        dense.cost = lambda length, pays_from=pays_from: 20.0 if length < pays_from else 1.0
        tuned = tune(tmp_path / "mine.yaml", **WINDOW, preset="perf")
        at_least = load_profile(tuned.profile).thresholds["window_attention"]["dense"].at_least
        assert at_least.max_seqlen_k == pays_from
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.csv", "mine.yaml"]


def test_each_case_is_told(offer: Callable, clock: Clock, tmp_path: Path) -> None:
    offer(Made("dense", clock, lambda length: 20.0))
    lines: list[str] = []
    tune(tmp_path / "mine.yaml", **WINDOW, tell=lines.append)
    assert lines[0] == "window_attention, 128 tokens: sdpa 10.000 ms, dense 20.000 ms"
    assert len(lines) == len(LENGTHS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out": Path("mine.yml")}, r"^out: expected a path that ends in \.yaml, got 'mine\.yml'$"),
        ({"out": Path("no-such-folder/mine.yaml")}, r"^out: expected a folder that can be written to, got 'no-such"),
        ({"ops": ("attention",)}, r"^ops: expected some of \[.*\], got \['attention'\]$"),
        ({"ops": ("combine", "decode_attention")}, r"^ops: expected some of \[.*\], got \['decode_attention'\]$"),
        ({"ops": ()}, r"^ops: expected some of \[.*\], got \[\]$"),
        ({"lengths": ()}, r"^lengths: expected numbers from 1 to 2\^31 - 1, got \[\]$"),
        ({"lengths": (0, 5)}, r"^lengths: expected numbers from 1 to 2\^31 - 1, got \[0, 5\]$"),
        ({"lengths": (5, 2**31)}, r"^lengths: expected numbers from 1 to 2\^31 - 1, got \[5, 2147483648\]$"),
        ({"repeat": 2}, r"^repeat: expected at least 3, got 2$"),
        ({"speedup": 0.9}, r"^speedup: expected a number of at least 1, got 0\.9$"),
        ({"speedup": float("nan")}, r"^speedup: expected a number of at least 1, got nan$"),
        ({"speedup": float("inf")}, r"^speedup: expected a number of at least 1, got inf$"),
        ({"preset": "fast"}, r"^preset: expected one of \['safe', 'perf'\], got 'fast'$"),
        ({"num_heads": 6}, r"^num_heads: expected a multiple of num_kv_heads=4, got 6$"),
        ({"dtype": torch.int8}, r"^dtype: expected one of \[.*\], got torch\.int8$"),
        ({"head_dim": -1}, r"^head_dim: expected at least 1, got -1$"),
    ],
)
def test_arguments_that_do_not_fit(
    changed: dict[str, Any], message: str, offer: Callable, clock: Clock, tmp_path: Path
) -> None:
    offer(Made("dense", clock))
    with pytest.raises(ValueError, match=message):
        tune(**({"out": tmp_path / "mine.yaml"} | WINDOW | changed))
