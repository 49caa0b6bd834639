"""Is what nsa-bench times of this package right, and would a wrong result be seen?"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nsa import ops
from nsa.benchmarks import decode, routes, workloads
from nsa.benchmarks.decode import STEPS, Sequences
from nsa.reads import reads_when_selected
from nsa_routing import Accepted, Plan, Rejected, reset
from nsa_varlen import BlockGeometry
from nsa_varlen.sdpa import BACKEND

WORKLOADS = {workload.name: workload for workload in workloads()}
BLOCKS = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "topk": 4, "window_size": 32}
SIZES = {"S": 150, "batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture(autouse=True)
def _fresh_routes() -> Iterator[None]:
    """Routes hold the operations that they found: those of a test must not outlive it."""
    reset()
    yield
    reset()


def made(name: str, **changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(workload, state, parameters)."""
    workload = WORKLOADS[name]
    parameters = {**workload.parameters, **SIZES, **BLOCKS, **changes}
    return workload, workload.setup("cpu", 0, **parameters), parameters


def results(workload: Any, state: Any) -> list[Any]:
    return [workload.call(state, index) for index in range(workload.calls)]


@pytest.mark.parametrize("changes", [{}, {"S": 5, "batch": 1}, {"num_heads": 2}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_sound_backend_passes_its_check(name: str, changes: dict[str, Any]) -> None:
    workload, state, parameters = made(name, **changes)
    assert workload.refuse("cpu", **parameters) is None
    assert "off by" in workload.check(state, results(workload, state))


@pytest.mark.parametrize("name", ["nsa.prefill", "nsa.train"])
def test_smooth_inputs_choose_much_the_same(name: str) -> None:
    workload, state, _ = made(name, inputs="smooth", S=480, batch=1)
    (found,) = results(workload, state)
    assert "off by" in workload.check(state, [found])
    (other,) = results(*made(name, S=480, batch=1)[:2])
    shared = [(x[1][1:, :, :, None] == x[1][:-1, :, None]).any(-1).float()[320:].mean() for x in (found, other)]
    assert shared[0] > shared[1] + 0.1


def _key_of_the_future(args: list[Any]) -> None:
    """Rows of k and v, a token late."""
    args[1], args[2] = (x.roll(-1, 0) for x in args[1:3])


def _another_block(args: list[Any]) -> None:
    args[3] = args[3].clone()
    args[3][..., 1] = 0


def _swapped_gates(args: list[Any]) -> None:
    args[0] = args[0].flip(-1)


FAULTS: dict[str, tuple[str, Callable[[list[Any]], None]]] = {
    "window": ("window_attention", _key_of_the_future),
    "selected": ("selected_attention", _another_block),
    "combine": ("combine", _swapped_gates),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["nsa.prefill", "nsa.train"])
def test_a_wrong_operation_of_a_prefill_is_seen(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, spoil = FAULTS[fault]
    workload, state, _ = made(name)
    right = getattr(BACKEND, op)

    def wrong(*args: Any, **options: Any) -> Any:
        given = list(args)
        spoil(given)
        return right(*given, **options)

    monkeypatch.setattr(type(BACKEND), op, lambda self, *args, **options: wrong(*args, **options))
    reset()
    with pytest.raises(AssertionError, match="out of last 64 rows: max-abs error"):
        workload.check(state, results(workload, state))


def test_wrong_gradients_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, state, _ = made("nsa.train")
    right = BACKEND.combine

    def wrong(self: Any, gates: Any, *outputs: Any) -> Any:
        out = right(gates, *outputs)
        return out + (out - out.detach())  # the value is right, its gradient twice as large

    monkeypatch.setattr(type(BACKEND), "combine", wrong)
    reset()
    with pytest.raises(AssertionError, match="dq of last 64 rows: max-abs error"):
        workload.check(state, results(workload, state))


@pytest.mark.parametrize("place", [0, 1], ids=["out", "block_indices"])
@pytest.mark.parametrize("name", ["nsa.prefill", "nsa.decode"])
def test_a_wrong_result_is_seen(name: str, place: int) -> None:
    workload, state, _ = made(name)
    found = [[x.clone() for x in result] for result in results(workload, state)]
    if place == 0:
        found[-1][0][-1] += 1e-3
    else:
        found[-1][1][-1] = found[-1][1][-1].roll(1, -1)
    with pytest.raises(AssertionError):
        workload.check(state, found)


@pytest.mark.parametrize("stream", ["cmp", "slc", "win"])
def test_a_wrong_row_in_the_cache_is_seen(stream: str) -> None:
    workload, state, _ = made("nsa.decode")
    found = results(workload, state)
    pages = getattr(state.sequences.cache, stream).views(state.sequences.cache.device_lengths)[0]
    rows = {"cmp": 3, "slc": 40, "win": 150}[stream]
    slot = pages.slots(torch.tensor([1]), torch.tensor([rows]))
    pages.pages.flatten(0, 1)[slot] += 1e-3
    with pytest.raises(AssertionError, match="k_"):
        workload.check(state, found)


def _storing_nothing(right: Any) -> Any:
    def run(*args: Any, new: Any, **options: Any) -> Any:
        return right(*args, **options)

    return run


def test_steps_that_store_nothing_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they find was stored by the setup."""
    workload, state, _ = made("nsa.decode")
    monkeypatch.setattr(decode.ops, "decode_attention", _storing_nothing(ops.decode_attention))
    with pytest.raises(AssertionError, match=r"expected the (means|rows)"):
        workload.check(state, results(workload, state))
    monkeypatch.undo()
    assert "off by" in workload.check(state, results(workload, state))  # nothing of it is left


@pytest.mark.parametrize("value", [7.0, float("nan")])
def test_a_decode_step_has_to_be_right_in_every_sequence(value: float) -> None:
    workload, state, _ = made("nsa.decode")
    found = [(out.clone(), indices) for out, indices in results(workload, state)]
    for out, _ in found:
        out[0] = value
    with pytest.raises(AssertionError, match="step"):
        workload.check(state, found)


@pytest.mark.parametrize(
    ("rows", "value", "words"),
    [(slice(0, 75), 7.0, "middle 64 rows"), (slice(80, 200), float("nan"), "out: expected finite")],
)
@pytest.mark.parametrize("name", ["nsa.prefill", "nsa.train"])
def test_a_prefill_has_to_be_right_before_its_last_rows(name: str, rows: slice, value: float, words: str) -> None:
    workload, state, _ = made(name)
    found = [[x.clone() for x in result] for result in results(workload, state)]
    found[0][0][rows] = value
    with pytest.raises(AssertionError, match=words):
        workload.check(state, found)


class _DenseBackward(torch.autograd.Function):
    """Selected attention with the gradients of attention to everything."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.save_for_backward(*args[:3])
        ctx.layout = args[4]
        return args[6](*args[:6])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out, _ = ops.window_attention(*leaves, ctx.layout, BlockGeometry(window_size=1 << 20))
        return (*torch.autograd.grad(out, leaves, grads[0]), None, None, None, None)


@pytest.mark.parametrize("spoiled", ["long", "all"])
def test_gradients_of_blocks_that_were_not_chosen_are_seen(spoiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the short sequence, too: with no more tokens than topk blocks hold each block is chosen."""
    workload, state, _ = made("nsa.train", S=400, batch=1)
    right = BACKEND.selected_attention

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        return _DenseBackward.apply(*args[:6], right)

    with monkeypatch.context() as patch:
        patch.setattr(type(BACKEND), "selected_attention", wrong)
        reset()
        found = results(workload, state)
        if spoiled == "all":
            # As if rows of the timed problem were right.
            patch.setattr(type(state), "_check_row_gradients", lambda *args: None)
            with pytest.raises(AssertionError, match="dq: max-abs error"):
                workload.check(state, found)
            return
    reset()
    with pytest.raises(AssertionError, match="dq of last 64 rows: max-abs error"):
        workload.check(state, found)


def test_decode_steps_can_be_repeated() -> None:
    workload, state, _ = made("nsa.decode")
    first = results(workload, state)
    again = [workload.call(state, index) for index in reversed(range(STEPS))][::-1]
    for one, other in zip(first, again, strict=True):
        assert all(map(torch.equal, one, other))


def test_backends_share_their_sequences() -> None:
    _, auto, parameters = made("nsa.decode")
    workload = WORKLOADS["nsa.decode"]
    assert workload.setup("cpu", 0, **{**parameters, "backend": "sdpa"}).sequences is auto.sequences
    assert workload.setup("cpu", 1, **parameters).sequences is not auto.sequences


def test_reads_are_counted_over_the_prefill_and_the_steps() -> None:
    workload, state, _ = made("nsa.decode")
    blocks, kv_heads, batch, tokens = BlockGeometry(**BLOCKS), 2, 2, SIZES["S"]
    found = workload.facts(state)
    steps = range(tokens + 1, tokens + STEPS + 1)
    pairs = batch * kv_heads
    assert found["reads_actual_decode"] == pairs * sum(reads_when_selected(t, blocks) for t in steps)
    assert found["reads_expected_decode"] == pairs * sum(blocks.reads(t) for t in steps)
    everything = range(1, tokens + STEPS + 1)
    assert found["reads_actual"] == pairs * sum(reads_when_selected(t, blocks) for t in everything)
    assert found["reads_expected"] == pairs * sum(blocks.reads(t) for t in everything)
    prefill, state, _ = made("nsa.prefill")
    found = prefill.facts(state)
    assert found["reads_actual"] == pairs * sum(reads_when_selected(t, blocks) for t in range(1, tokens + 1))
    assert found["reads_expected"] == pairs * sum(blocks.reads(t) for t in range(1, tokens + 1))


def test_facts_say_who_decided() -> None:
    for backend, why in (("auto", "plan"), ("sdpa", "requested")):
        workload, state, _ = made("nsa.prefill", backend=backend)
        found = workload.facts(state)
        assert (found["backend"], found["profile"], found["preset"]) == ("sdpa", "cpu", "safe")
        assert str(found["why"]).partition(";")[0] == why


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_cannot_run_is_refused_in_words(name: str) -> None:
    workload, _, parameters = made(name)
    assert "not installed" in workload.refuse("cpu", **{**parameters, "backend": "gone"})
    assert "interpreted kernels are not timed" in workload.refuse("cpu", **{**parameters, "backend": "triton"})
    if "inputs" in parameters:
        assert "expected one of ['random', 'smooth']" in workload.refuse("cpu", **{**parameters, "inputs": "rough"})


def test_a_request_of_the_environment_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_BACKEND", "combine=sdpa")
    reset()
    found = routes.facts(("combine",), routes.layer_of("cpu", 8, 8, **WORKLOADS["nsa.prefill"].parameters), "auto")
    assert found["why"] == "requested"


def test_different_backends_are_named_by_operation_and_why_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def plans(ops: Any, layer: Any, backend: Any) -> list[Plan]:
        candidates = {
            "window_attention": (Rejected("fa2", "too short"), Accepted("triton"), Accepted("sdpa")),
            "compressed_attention": (Rejected("fa2", "too short"), Rejected("triton", "denied"), Accepted("sdpa")),
            "combine": (Accepted("triton"), Rejected("sdpa", "behind")),
        }
        return [Plan(layer.problem(op), candidates[op], None, "sm90", "perf") for op in ops]

    monkeypatch.setattr(routes, "plans", plans)
    layer = routes.layer_of("cpu", 8, 8, **WORKLOADS["nsa.prefill"].parameters)
    found = routes.facts(("window_attention", "compressed_attention", "combine"), layer, "auto")
    assert found["backend"] == "triton compressed_attention=sdpa"
    assert found["why"] == (
        "plan; not fa2: too short (window_attention, compressed_attention); not triton: denied (compressed_attention)"
    )


@pytest.mark.parametrize("name", ["nsa.prefill", "nsa.train"])
def test_parts_of_a_prefill_are_its_operations(name: str) -> None:
    workload, state, _ = made(name)
    parts = workload.parts(state)
    assert list(parts) == ["compress", "cmp", "choice", "sel", "win", "combine"]
    (found,) = results(workload, state)
    made_again = {part: run(0) for part, run in parts.items()}
    assert torch.equal(made_again["choice"], found[1])
    if name == "nsa.prefill":
        assert torch.equal(made_again["combine"], found[0])
    else:
        assert [len(made_again[part]) for part in ("compress", "cmp", "sel", "win", "combine")] == [2, 3, 3, 3, 4]


def test_costs_count_each_tensor_once() -> None:
    sizes = {**WORKLOADS["nsa.prefill"].parameters, **SIZES, **BLOCKS}
    tokens, batch, heads, kv_heads, dim = SIZES.values()
    blocks = BlockGeometry(**BLOCKS)
    seen = sum(reads_when_selected(t, blocks) for t in range(1, tokens + 1))
    scored = sum(blocks.num_compressed(t) for t in range(1, tokens + 1))
    flops, size = WORKLOADS["nsa.prefill"].cost(**sizes)
    assert flops == batch * heads * dim * (4 * seen + 2 * scored)
    assert size == 4 * batch * tokens * ((2 * heads + 2 * kv_heads) * dim + 3 * heads)
    flops, size = WORKLOADS["nsa.decode"].cost(**sizes)
    steps = [reads_when_selected(tokens + 1 + index, blocks) for index in range(STEPS)]
    assert flops == pytest.approx(4 * dim * batch * heads * sum(steps) / STEPS)
    assert size == pytest.approx(4 * 2 * dim * batch * (kv_heads * sum(steps) / STEPS + heads))


def test_long_sequences_are_prefilled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Sequences("cpu", 0, **{**WORKLOADS["nsa.decode"].parameters, **SIZES, **BLOCKS})
    monkeypatch.setattr(decode, "CHUNK", 64)
    workload, state, _ = made("nsa.decode", batch=1)
    assert state.sequences.prefilled["steps"] == 3  # 150 tokens
    assert whole.prefilled["steps"] == 2  # a sequence each
    assert "off by" in workload.check(state, results(workload, state))
