"""Does a threshold decide exactly at its edges, and only where its mode and its sources let it?"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from nsa_routing import Policy, Problem, dispatch, dispatching, load_profile, plan
from nsa_routing.problem import LENGTHS

MEASURED = {"measured": {"date": "2026-11-22", "gpu": "H100", "csv": "sm90.csv"}}
BELIEVED = {"not_measured": "no GPU at hand"}
AUTOMATIC = Policy()


@pytest.fixture
def reason(install: Callable, environment: Callable, ordered: Callable, problem: Problem) -> Callable[..., str | None]:
    """Why `name` is not taken, None if it is: for a preset's mode, a threshold and lengths."""

    def ask(mode: str, threshold: dict | None, policy: Policy = AUTOMATIC, name: str = "fa2", **lengths: int):
        install(name, "sdpa")
        thresholds = {} if threshold is None else {"window_attention": {name: threshold}}
        profile = ordered(name, presets={"safe": {name: mode}, "perf": {name: "always"}}, thresholds=thresholds)
        chosen = plan(environment(name, "sdpa"), profile, replace(problem, **lengths), policy)
        assert chosen.accepted[-1] == "sdpa"
        return getattr(chosen.candidates[0], "reason", None)

    return ask


@pytest.mark.parametrize("name", LENGTHS)
def test_bounds_are_inclusive(name: str, reason: Callable) -> None:
    threshold = {"at_least": {name: 8}, "at_most": {name: 32}, **MEASURED}
    found = {length: reason("threshold", threshold, **{name: length}) for length in (0, 7, 8, 9, 31, 32, 33)}
    assert found == {
        0: f"pays from {name} 8, got 0",
        7: f"pays from {name} 8, got 7",
        8: None,
        9: None,
        31: None,
        32: None,
        33: f"pays up to {name} 32, got 33",
    }


def test_all_bounds_must_hold(reason: Callable) -> None:
    threshold = {"at_least": {"total_q": 8, "max_seqlen_k": 100}, "at_most": {"max_seqlen_q": 16}, **MEASURED}
    inside = {"total_q": 8, "max_seqlen_q": 16, "max_seqlen_k": 100}
    assert reason("threshold", threshold, **inside) is None
    assert reason("threshold", threshold, **inside | {"total_q": 7}) == "pays from total_q 8, got 7"
    assert reason("threshold", threshold, **inside | {"max_seqlen_q": 17}) == "pays up to max_seqlen_q 16, got 17"
    assert reason("threshold", threshold, **inside | {"max_seqlen_k": 99}) == "pays from max_seqlen_k 100, got 99"


NO_THRESHOLD = "profile made has no threshold for it"
NOT_MEASURED = "its threshold is not measured (no GPU at hand)"
OPT_IN = "opt-in: NSA_FA2=1 takes it where its threshold allows"
SHORT = "pays from total_q 8, got 7"


# For each mode and backend: why it is not taken without a threshold, with a measured one, with one that is only
# believed; NSA_FA2=1 changes the answers for FA-2 alone.
@pytest.mark.parametrize(
    "mode, name, fa2, without, measured, believed",
    [
        ("always", "fa2", "auto", None, None, None),
        ("always", "cudnn", "auto", None, None, None),
        ("threshold", "fa2", "auto", NO_THRESHOLD, None, None),
        ("threshold", "cudnn", "1", NO_THRESHOLD, None, None),
        ("measured", "fa2", "auto", NO_THRESHOLD, None, f"{NOT_MEASURED}; NSA_FA2=1 trusts it"),
        ("measured", "fa2-torch", "auto", NO_THRESHOLD, None, f"{NOT_MEASURED}; NSA_FA2=1 trusts it"),
        ("measured", "fa2", "1", NO_THRESHOLD, None, None),
        ("measured", "fa2-torch", "1", NO_THRESHOLD, None, None),
        ("measured", "cudnn", "auto", NO_THRESHOLD, None, NOT_MEASURED),
        ("measured", "cudnn", "1", NO_THRESHOLD, None, NOT_MEASURED),
        ("opt-in", "fa2", "auto", OPT_IN, OPT_IN, OPT_IN),
        ("opt-in", "fa2", "1", NO_THRESHOLD, None, None),
        ("opt-in", "fa2-torch", "1", NO_THRESHOLD, None, None),
    ],
)
def test_modes(mode: str, name: str, fa2: str, without: Any, measured: Any, believed: Any, reason: Callable) -> None:
    policy, bound = Policy(fa2=fa2), {"at_least": {"total_q": 8}}
    assert reason(mode, None, policy, name) == without
    assert reason(mode, bound | MEASURED, policy, name, total_q=8) == measured
    assert reason(mode, bound | BELIEVED, policy, name, total_q=8) == believed
    if measured is None:
        assert reason(mode, bound | MEASURED, policy, name, total_q=7) == SHORT, "a bound holds in every mode"


@pytest.mark.parametrize("fa2", ["auto", "0", "1"])
@pytest.mark.parametrize("preset", ["safe", "perf"])
def test_presets_take_cudnn_where_it_was_measured(
    preset: str, fa2: str, install: Callable, environment: Callable, problem: Problem, tmp_path: Path
) -> None:
    """A profile on top of a shipped one, as `tune` writes it; NSA_FA2 does not speak of cudnn."""
    install("cudnn", "sdpa")
    modes = {"safe": {"cudnn": "measured"}, "perf": {"cudnn": "threshold"}}
    bounds = {"cudnn": {"at_least": {"max_seqlen_q": 8, "max_seqlen_k": 8}, **MEASURED}}
    thresholds = {"compressed_attention": bounds}
    document = {"name": "mine", "source": "a test", "extends": "sm80", "presets": modes, "thresholds": thresholds}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    profile, policy = load_profile(tmp_path / "mine.yaml"), Policy(preset=preset, fa2=fa2)
    machine = environment("cudnn", "sdpa", device="cuda", sm=90)

    def taken(op: str, length: int, **facts: Any) -> str | None:
        asked = replace(problem, op=op, device="cuda", max_seqlen_q=length, max_seqlen_k=length, **facts)
        return plan(machine, profile, asked, policy).backend

    assert [taken("compressed_attention", length) for length in (7, 8)] == ["sdpa", "cudnn"]
    assert taken("compressed_attention", 8, uniform=True) == "cudnn"
    assert taken("selected_attention", 8) == "sdpa", "no shipped order tries it there"


@pytest.mark.parametrize("mode", ["threshold", "measured", "opt-in"])
def test_a_request_outranks_every_mode(
    mode: str, install: Callable, environment: Callable, ordered: Callable, problem: Problem
) -> None:
    install("fa2", "sdpa")
    bound = {"window_attention": {"fa2": {"at_least": {"total_q": 8}, **BELIEVED}}}
    profile = ordered("fa2", presets={"safe": {"fa2": mode}}, thresholds=bound)
    asked = plan(environment("fa2", "sdpa"), profile, problem, Policy((("window_attention", "fa2"),)))
    assert asked.accepted == ("fa2",)


# --- and through dispatch, which remembers routes by the interval between thresholds ----------------------------------


@pytest.fixture
def bounded(install: Callable, order: Callable) -> dict[str, Any]:
    """Between 8 and 32 queries fast runs, and from 100 keys on other does."""
    made = install("fast", "other", "sdpa")
    modes = {"fast": "threshold", "other": "threshold"}
    thresholds = {
        "fast": {"at_least": {"total_q": 8}, "at_most": {"total_q": 32}, **MEASURED},
        "other": {"at_least": {"max_seqlen_k": 100}, **BELIEVED},
    }
    order("fast", "other", presets={"safe": modes}, thresholds={"window_attention": thresholds})
    return made


def test_dispatch_agrees_with_the_plan_at_every_length(bounded: dict, problem: Problem) -> None:
    x = torch.ones(2, 1, 4)
    for total_q in (0, 7, 8, 9, 31, 32, 33, 7, 8, 32, 33):  # again, now from memory
        for max_seqlen_k in (0, 99, 100, 101):
            asked = replace(problem, total_q=total_q, max_seqlen_k=max_seqlen_k)
            expected = "fast" if 8 <= total_q <= 32 else "other" if max_seqlen_k >= 100 else "sdpa"
            before = len(bounded[expected].calls)
            dispatch("window_attention", asked)(x)
            assert len(bounded[expected].calls) == before + 1, asked
            assert dispatching.plan_for(asked).backend == expected


def test_one_route_per_interval(bounded: dict, problem: Problem) -> None:
    """Three intervals of queries, two of keys; the third length has no threshold."""
    runs = {
        id(dispatch("window_attention", replace(problem, total_q=total_q, max_seqlen_q=total_q, max_seqlen_k=keys)))
        for total_q in range(100)
        for keys in (0, 99, 100, 500)
    }
    assert len(runs) == 6


@pytest.mark.parametrize("taken", ["always", None])
def test_a_preferred_backend_goes_first_where_its_preset_takes_it(
    taken: str | None, install: Callable, order: Callable, problem: Problem
) -> None:
    """Up to 50 keys other is preferred to fast, whichever was asked for before; the rest keeps its order."""
    made = install("fast", "other", "spare", "sdpa")
    modes = dict.fromkeys(("fast", "spare"), "always") | ({"other": taken} if taken else {})
    prefer = {"window_attention": {"other": {"at_most": {"max_seqlen_k": 50}, **BELIEVED}}}
    order("fast", "other", "spare", presets={"safe": modes, "perf": {"other": "always"}}, prefer=prefer)
    x = torch.ones(2, 1, 4)
    for keys in (51, 50, 51, 0):
        asked = replace(problem, max_seqlen_k=keys)
        first = ("other", "fast") if keys <= 50 else ("fast", "other")
        expected = [*(name for name in first if taken or name != "other"), "spare", "sdpa"]
        assert list(dispatching.plan_for(asked).accepted) == expected
        before = len(made[expected[0]].calls)
        dispatch("window_attention", asked)(x)
        assert len(made[expected[0]].calls) == before + 1


def test_ops_without_thresholds_have_one_plan(bounded: dict, problem: Problem) -> None:
    runs = {
        id(dispatch("combine", replace(problem, op="combine", total_q=length, max_seqlen_k=length)))
        for length in range(0, 200, 7)
    }
    assert len(runs) == 1
