"""Is the operator told once, or as often as asked, where asked, and does the program get its logging back?"""

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from nsa_routing import Policy, dispatch, events, reset

LOGGER = logging.getLogger("nsa_routing")


def test_a_message_comes_once(logged: Any) -> None:
    for _ in range(5):
        events.tell(logging.WARNING, "slow", "route", "a")
    assert logged.seen == [("WARNING", "slow")]


def test_messages_are_told_apart_by_their_keys(logged: Any) -> None:
    events.tell(logging.WARNING, "slow", "route", "a")
    events.tell(logging.INFO, "slow", "route", "b")
    events.tell(logging.WARNING, "other words", "route", "a")
    assert logged.warnings() == ["slow"]


def test_a_message_comes_again_each_so_many_times(logged: Any) -> None:
    events.configure(Policy(log_every=3))
    for _ in range(7):
        events.tell(logging.WARNING, "slow", "route")
    assert logged.warnings() == ["slow", "slow (3 times so far)", "slow (6 times so far)"]


def test_a_message_comes_again_after_so_many_seconds(logged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(events._settings, "clock", lambda: now[0])
    events.configure(Policy(log_every=2, log_seconds=10.0))
    for seconds in (0, 1, 8, 2, 9, 1, 10):  # shown at 0, 11 and 21
        now[0] += seconds
        events.tell(logging.WARNING, "slow", "route")
    assert logged.warnings() == ["slow", "slow (4 times so far)", "slow (6 times so far)"]


def test_another_rate_holds_for_messages_that_came_before(logged: Any) -> None:
    events.tell(logging.WARNING, "slow", "route")
    events.configure(Policy(log_every=2))
    events.tell(logging.WARNING, "slow", "route")
    assert logged.warnings() == ["slow", "slow (2 times so far)"]


def test_reset_makes_messages_new(logged: Any) -> None:
    events.configure(Policy(log_every=2))
    events.tell(logging.WARNING, "slow", "route")
    reset()
    for _ in range(4):
        events.tell(logging.WARNING, "slow", "route")
    assert logged.warnings() == ["slow", "slow"], "and NSA_LOG_EVERY is read anew with the next route"


def test_a_traceback_is_that_of_the_exception_at_hand(logged: Any) -> None:
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        events.tell(logging.WARNING, "with", "a", traceback=True)
        events.tell(logging.WARNING, "without", "b")
    assert len(logged.tracebacks) == 1
    assert "ZeroDivisionError: a bug" in logged.tracebacks[0]


LEVELS = ("debug", "info", "warning", "error")


@pytest.mark.parametrize("level", [*LEVELS, "off"])
def test_levels_on_standard_error(level: str, capsys: pytest.CaptureFixture) -> None:
    events.configure(Policy(log=level))
    for name in LEVELS:
        events.tell(logging.getLevelName(name.upper()), f"at {name}", name)
    out, err = capsys.readouterr()
    shown = [line.split("nsa_routing ")[1] for line in err.splitlines()]
    assert out == ""
    assert shown == [f"{n.upper()} at {n}" for n in (() if level == "off" else LEVELS[LEVELS.index(level) :])]


def test_with_a_level_the_program_hears_nothing_twice(
    capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    events.configure(Policy(log="info"))
    events.tell(logging.WARNING, "slow", "route")
    assert capsys.readouterr().err.count("slow") == 1
    assert caplog.records == []


def test_without_a_level_the_program_hears_it(caplog: pytest.LogCaptureFixture) -> None:
    events.configure(Policy())
    events.tell(logging.WARNING, "slow", "route")
    assert [record.getMessage() for record in caplog.records] == ["slow"]
    assert LOGGER.handlers == []


def test_a_level_shows_the_layers_too(capsys: pytest.CaptureFixture) -> None:
    layers = logging.getLogger("nsa")
    before = layers.handlers.copy(), layers.level, layers.propagate
    events.configure(Policy(log="info"))
    layers.info("nsa decode layer=0")
    layers.debug("no more than asked for")
    events.configure(Policy())
    assert capsys.readouterr().err.splitlines()[0].endswith(" nsa INFO nsa decode layer=0")
    assert (layers.handlers, layers.level, layers.propagate) == before


@pytest.mark.parametrize("undo", [reset, lambda: events.configure(Policy())], ids=["reset", "no NSA_LOG"])
def test_the_program_gets_its_logging_back(undo: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.NullHandler()
    monkeypatch.setattr(LOGGER, "handlers", [handler])
    monkeypatch.setattr(LOGGER, "level", logging.INFO)
    monkeypatch.setattr(LOGGER, "propagate", False)
    for log in ("debug", "off", "error"):
        events.configure(Policy(log=log))
        assert len(LOGGER.handlers) == 2
        assert LOGGER.level != logging.INFO
    undo()
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == ([handler], logging.INFO, False)


def test_flags_reach_the_logger_with_the_first_route(
    install: Callable, problem: Any, flags: Callable, capsys: pytest.CaptureFixture
) -> None:
    install("sdpa")
    flags(LOG="info", LOG_EVERY="2")
    assert LOGGER.handlers == []
    dispatch("window_attention", problem)
    assert LOGGER.level == logging.INFO
    expected = "sdpa runs window_attention on cpu, torch.float32, head_dim 64/32, group size 4"
    assert capsys.readouterr().err.strip().endswith(f"INFO {expected} (profile cpu, preset safe)")
    assert events._settings.every == 2


def test_threads_that_meet_are_told_once(logged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As likely as can be: threads change places after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(100):
            together = threading.Barrier(8)

            def speak(number: int = number, together: threading.Barrier = together) -> None:
                together.wait()
                events.tell(logging.WARNING, f"message {number}", str(number))

            threads = [threading.Thread(target=speak) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert logged.warnings() == [f"message {number}" for number in range(100)]
