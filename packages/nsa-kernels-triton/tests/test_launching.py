"""Do chunks take turns, after what came before and before what follows?"""

from contextlib import nullcontext

import pytest
import torch
from nsa_kernels_triton.ops import launching

CPU = torch.device("cpu")


class Stream:
    """Notes who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []
    main = Stream("main", noted)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return noted


def test_turns_go_round_between_a_fork_and_a_join(log: list[str]) -> None:
    streams = [Stream("a", log), Stream("b", log)]
    launching.take_turns(streams, range(3), lambda turn, item: log.append(f"{item} on {'ab'[turn]}"))
    fork, join = ["a waits for main", "b waits for main"], ["main waits for a", "main waits for b"]
    assert log == [*fork, "0 on a", "1 on b", "2 on a", *join]


def test_a_turn_that_raises_is_waited_for(log: list[str]) -> None:
    """Whoever catches it may give the memory away that the side streams still write to."""

    def fail(turn: int, item: int) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        launching.take_turns([Stream("a", log)], range(3), fail)
    assert log == ["a waits for main", "main waits for a"]


def test_one_stream_is_the_current_one(log: list[str]) -> None:
    done: list[int] = []
    launching.take_turns(launching.side_streams(CPU, wanted=True), range(3), lambda turn, item: done.append(item))
    assert (done, log) == ([0, 1, 2], [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stream_has_side_streams_of_its_own() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert launching.side_streams(device, wanted=False) == [None]
    beside = launching.side_streams(device, wanted=True)
    assert beside == launching.side_streams(device, wanted=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert not set(launching.side_streams(device, wanted=True)) & set(beside)
