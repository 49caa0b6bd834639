"""Does a breaker remember, without waiting for the device, and does every holder see it open again?"""

import sys
import threading
from typing import Any

import pytest
import torch
from nsa_routing import breaker, closed, reset

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "_breakers", {})


def test_a_route_has_one_breaker() -> None:
    one = breaker.breaker("fast", "combine", "cpu")
    assert breaker.breaker("fast", "combine", "cpu") is one
    assert (one.backend, one.op, one.device, one.closed) == ("fast", "combine", "cpu", False)
    keys = ("x", "combine", "cpu"), ("fast", "x", "cpu"), ("fast", "combine", "x")
    others = [breaker.breaker(*key) for key in keys]
    assert breaker.all_breakers() == (one, *others)


def test_closed_routes_are_listed_until_reset() -> None:
    one, two = (breaker.breaker("fast", op, "cpu") for op in ("combine", "window_attention"))
    assert closed() == frozenset()
    one.closed = two.closed = True
    assert closed() == {("fast", "combine", "cpu"), ("fast", "window_attention", "cpu")}
    reset()
    assert closed() == frozenset()
    assert not one.closed, "who holds it sees it open"


def test_notes_are_kept_until_reset() -> None:
    route = breaker.breaker("fast", "combine", "cpu")
    route.prepare(CPU)
    assert not route.noted(wait=True)
    route.note(torch.tensor(False))
    assert not route.noted(wait=False)
    route.note(torch.tensor(True))
    route.note(torch.tensor(False))
    assert route.noted(wait=False)
    assert route.noted(wait=True)
    assert not route.closed, "whoever reads the news decides"
    flag = route.flag
    reset()
    assert route.flag is flag, "graphs hold it"
    assert not route.noted(wait=True)


def test_preparing_twice_keeps_the_flag() -> None:
    route = breaker.breaker("fast", "combine", "cpu")
    route.prepare(CPU)
    route.note(torch.tensor(True))
    route.prepare(CPU)
    assert route.noted(wait=True)


def test_the_first_note_makes_the_flag() -> None:
    """That of a route which was planned inside a capture."""
    route = breaker.breaker("fast", "combine", "cpu")
    assert not route.noted(wait=True)
    route.note(torch.tensor(True))
    assert route.noted(wait=True)


def test_a_flag_made_in_inference_mode_is_one_everywhere() -> None:
    route = breaker.breaker("fast", "combine", "cpu")
    with torch.inference_mode():
        route.prepare(torch.device("cpu"))
        route.note(torch.tensor(False))
    route.note(torch.tensor(True))
    assert route.noted(wait=True)
    breaker.forget()
    assert not route.noted(wait=True)


def test_no_flag_is_made_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory taken there is the graph's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    route = breaker.breaker("fast", "combine", "cuda:0")
    route.prepare(torch.device("cuda:0"))
    assert route.flag is None


def test_news_may_be_late_but_not_lost() -> None:
    """`mirror` stands for the host's copy, which arrives when the device gets to it."""
    route = breaker.breaker("fast", "combine", "cuda:0")
    route.flag, route.mirror = torch.tensor(True), torch.tensor(False)
    assert not route.noted(wait=False)
    assert route.noted(wait=True)
    route.note(torch.tensor(False))
    assert route.noted(wait=False), "each note sends the whole truth"


def test_threads_share_breakers_and_count_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As likely as can be: threads change places after every few instructions."""
    interval, errors = sys.getswitchinterval(), []

    def work(together: threading.Barrier, me: int, shared: list[Any]) -> None:
        together.wait()
        shared.append(breaker.breaker("fast", "combine", "shared"))
        try:
            for i in range(20):
                breaker.breaker("fast", "combine", f"{me} {i}").closed = True
                closed()
        except RuntimeError as error:  # "dictionary changed size during iteration"
            errors.append(error)

    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            monkeypatch.setattr(breaker, "_breakers", {})
            together, shared = threading.Barrier(8), []
            threads = [threading.Thread(target=work, args=(together, me, shared)) for me in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
            assert len({id(route) for route in shared}) == 1
            assert len(closed()) == 8 * 20
    finally:
        sys.setswitchinterval(interval)
