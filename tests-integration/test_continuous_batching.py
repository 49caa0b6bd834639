"""Does docs/examples/continuous_batching.py answer every request as if it were alone, whoever else is there?"""

import functools
import random
import re
from copy import deepcopy

import continuous_batching
import pytest
import torch
from byte_model import ByteModel
from continuous_batching import Sequence, Server, Step
from nsa import CacheFull, NSAConfig, PagePool
from nsa_varlen import VarlenLayout

CONFIG = NSAConfig(32, 4, 2, 8, kernel_size=8, kernel_stride=4, block_size=16, topk=3, window_size=24)
RANDOM = random.Random(3)
SYSTEM = RANDOM.randbytes(50)  # ends inside a page of each stream
# Prompts of one token and of more than a chunk; answers of one token and of several pages.
REQUESTS = [(RANDOM.randbytes(n), new) for n, new in ((1, 9), (17, 1), (50, 10), (33, 14), (5, 24))]
LONG = [(RANDOM.randbytes(n), 50) for n in (3, 20)]
LARGE = 400  # pages: more than all need at once


@functools.cache
def model() -> ByteModel:
    torch.manual_seed(0)
    return ByteModel(CONFIG, num_blocks=2).double()


@functools.cache
def alone(text: bytes, max_new_tokens: int) -> bytes:
    """The greedy answer without any cache: everything is read anew for each token."""
    tokens = [*text]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model().extend(torch.tensor(tokens), VarlenLayout.from_lengths([len(tokens)]))[-1]
        first, second = logits.topk(2).values
        # Two orders of summation differ by 1e-16 a term: a dozen sums in a row, of some hundred terms of about 1 each,
        # by 1e-12 in the worst case.
        assert first - second > 1e-9
        tokens.append(int(logits.argmax()))
    return bytes(tokens[len(text) :])


def answers(requests: list[tuple[bytes, int]]) -> list[bytes]:
    return [alone(SYSTEM + prompt, new) for prompt, new in requests]


def make(num_pages: int = LARGE, **options) -> Server:
    return Server(model(), num_pages, **{"slots": 3, "budget": 40, "page_size": 16, "system": SYSTEM} | options)


def submit_all(server: Server, requests: list[tuple[bytes, int]] = REQUESTS) -> list[Sequence]:
    return [server.submit(f"r{i}", prompt, new) for i, (prompt, new) in enumerate(requests)]


def run(server: Server) -> list[Step]:
    """Until nobody is there."""
    steps = []
    while server.waiting or server.running:
        steps.append(server.step())
        assert len(steps) < 1000
    return steps


def preempted(steps: list[Step]) -> int:
    return sum("preempted" in event for step in steps for event in step.events)


def held(server: Server) -> int:
    return server.pool.num_pages - server.pool.num_free


def least_pages(requests: list[tuple[bytes, int]], **options) -> int:
    """Of a pool in which each of these fits alone."""
    server = make(**options)
    return held(server) + max(server._pages(s.longest, server.budget) for s in submit_all(server, requests))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize(
    "slots, budget, few",
    [(1, 40, False), (3, 3, True), (2, 17, True), (5, 1000, False), (5, 64, True)],
)
def test_everyone_is_answered_as_alone_and_no_page_is_kept(slots: int, budget: int, few: bool, share: bool) -> None:
    options = {"slots": slots, "budget": budget, "share": share}
    server = make(least_pages(REQUESTS, **options) if few else LARGE, **options)
    before = held(server)
    assert (before > 0) == share
    sequences = submit_all(server)
    steps = run(server)
    assert [s.new for s in sequences] == answers(REQUESTS)
    assert all(sum(step.counts) <= budget for step in steps)
    assert (max(step.waiting for step in steps) > 0) == (slots < 5 or few)
    # Each token of a prompt and of an answer, save its last, is read once: nobody began anew.
    assert sum(sum(step.counts) for step in steps) == sum(s.longest - server.shared for s in sequences)
    assert held(server) == before
    server.close()
    assert held(server) == 0


@pytest.mark.parametrize("tokens", [1, 16, 33, 80])
def test_a_system_prompt_of_any_length_is_shared(tokens: int) -> None:
    """Within a block, at the ends of pages, and with a last chunk of one token, which opens a page."""
    system = SYSTEM[:1] * 64 + SYSTEM
    server = make(system=system[:tokens], budget=16)
    sequence = server.submit("r", *REQUESTS[3])
    run(server)
    assert sequence.new == alone(system[:tokens] + REQUESTS[3][0], REQUESTS[3][1])


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
def test_who_begins_anew_is_answered_all_the_same(share: bool) -> None:
    """Both are admitted for what they have, and cannot both grow to their ends."""
    options = {"share": share, "budget": 4, "overcommit": True}
    server = make(**options)
    pages = held(server) + sum(server._promised(s) for s in submit_all(server, LONG))
    server = make(max(pages, least_pages(LONG, **options)), **options)
    before, sequences = held(server), submit_all(server, LONG)
    steps = run(server)
    assert preempted(steps) > 0
    assert [s.new for s in sequences] == answers(LONG)
    assert held(server) == before


def test_a_pool_that_somebody_else_fills_costs_time_and_no_answer() -> None:
    server = make()
    sequences = submit_all(server)
    for _ in range(8):
        server.step()
    running, taken = [*server.running], []

    def run_without_room() -> None:
        for _ in range(100):
            taken.extend(server.pool.take(server.pool.num_free))
            server.step()

    with pytest.raises(CacheFull):
        run_without_room()
    assert len(running) > len(server.running) == 1  # the others began anew, and even this one cannot go on
    for page in taken:
        server.pool.drop(page)
    run(server)
    assert [s.new for s in sequences] == answers(REQUESTS)


def test_a_step_mixes_chunks_with_decoding_and_lets_nobody_wait_who_decodes() -> None:
    server = make(budget=17)
    submit_all(server)
    mixed = 0
    while server.waiting or server.running:
        decoding = [s for s in server.running if s.new]
        slots = [s.slot for s in decoding]
        step = server.step()
        assert all(step.counts[slot] == 1 for slot in slots)
        mixed += bool(slots) and max(step.counts) > 1
    assert mixed > 3


def test_steps_in_which_all_decode_take_the_way_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    server, ways = make(), []
    for name in ("extend", "decode"):
        method = getattr(ByteModel, name)
        spied = functools.wraps(method)(lambda *args, name=name, method=method: ways.append(name) or method(*args))
        monkeypatch.setattr(ByteModel, name, spied)
    submit_all(server)
    steps = run(server)
    assert ways == ["extend" if max(step.counts) > 1 else "decode" for step in steps]
    assert set(ways) == {"extend", "decode"}


def test_cancelled_requests_leave_no_page_and_do_not_disturb() -> None:
    server = make(slots=3, budget=17)
    before, sequences = held(server), submit_all(server)
    while not sequences[3].read or sequences[3].new:
        server.step()
    reading, waiting = sequences[3], sequences[4]
    decoding = next(s for s in server.running if s.new)
    assert waiting in server.waiting
    for s in (reading, waiting, decoding, sequences[1]):  # the last is done, and has nothing to give back
        server.cancel(s)
        assert s not in server.running
        assert s not in server.waiting
    run(server)
    kept = [i for i, s in enumerate(sequences) if s not in (reading, waiting, decoding)]
    assert len(kept) == 2
    assert [sequences[i].new for i in kept] == [answers(REQUESTS)[i] for i in kept]
    assert held(server) == before
    again = server.submit("again", *REQUESTS[3])  # the slots are as new
    run(server)
    assert again.new == answers(REQUESTS)[3]
    submit_all(server)
    server.step()
    server.close()
    assert (held(server), server.running, [*server.waiting]) == (0, [], [])


def test_an_answer_ends_with_its_stop() -> None:
    whole = answers(REQUESTS)[4]
    stop = whole[len(whole) // 2]
    server = make()
    sequence = server.submit("stops", *REQUESTS[4], stop=stop)
    run(server)
    assert sequence.new == whole[: whole.index(stop) + 1]
    assert len(sequence.new) < len(whole)


@pytest.mark.parametrize("where", ["before", "during"])
def test_the_answers_tell_wrong_keys(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests compare would differ: by one byte of the system prompt, by a shared page that is not copied."""
    server = make(system=bytes([SYSTEM[0] ^ 1]) + SYSTEM[1:] if where == "before" else SYSTEM)
    if where == "during":
        monkeypatch.setattr(PagePool, "copy", lambda pool, source, target: None)
    sequences = submit_all(server)
    run(server)
    assert [s.new for s in sequences] != answers(REQUESTS)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make(slots=4, budget=3), "budget: expected a token for each of slots=4, got 3"),
        (lambda: make().submit("r", b"", 1), "r: expected a prompt and at least one new token, got b'', 1"),
        (lambda: make().submit("r", b"a", 0), "r: expected a prompt and at least one new token, got b'a', 0"),
        (lambda: make(max_tokens=60).submit("r", b"a" * 10, 2), "r: expected at most 60 tokens, got 61"),
        (lambda: make(50).submit("r", b"a" * 300, 2), "r: expected at most 34 pages, got 62"),
    ],
)
def test_what_can_never_run_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_table_has_all_steps_and_tokens(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    continuous_batching.main(requests=3, slots=2, pages=300)
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    numbers = [row[0].split("-") for row in rows]
    assert [int(first) for first, *_ in numbers[1:]] == [int(last) + 1 for *_, last in numbers[:-1]]
    events = " ".join(row[-1] for row in rows)
    assert all(f"{name} {what}" in events for name in ("r0", "r1", "r2") for what in ("joins", "done"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_answers_the_same() -> None:
    server = Server(deepcopy(model()).cuda(), LARGE, slots=3, budget=40, page_size=16, system=SYSTEM)
    assert server.graph is not None
    sequences = submit_all(server)
    run(server)
    assert [s.new for s in sequences] == answers(REQUESTS)
