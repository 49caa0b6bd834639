"""Workloads of single operations: do they run, do their checks see what is wrong, are their costs what there is?"""

from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, masks
from nsa_varlen.benchmarks import operation_checks, operations
from nsa_varlen.benchmarks.machine import DTYPES
from nsa_varlen.benchmarks.operation_costs import backward_cost, forward_cost
from nsa_varlen.benchmarks.operations import ABOUT, OF_NEIGHBOURS, WITHOUT_GRADIENTS, op_workloads
from nsa_varlen.benchmarks.trying import TINY, FaultyBackend, off_by_a_little, tried
from nsa_varlen.sdpa import BACKEND
from torch import Tensor

WORKLOADS = {workload.name: workload for workload in op_workloads(BACKEND)}


def is_there(op: str, direction: str, inputs: str) -> bool:
    return not (direction == "backward" and op in WITHOUT_GRADIENTS) and (inputs == "random" or op in OF_NEIGHBOURS)


CASES = [
    pytest.param(op, {"pass": direction, "inputs": inputs}, id=f"{op}-{direction}-{inputs}")
    for op in ABOUT
    for direction in ("forward", "backward")
    for inputs in ("random", "smooth")
    if is_there(op, direction, inputs)
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op, changes", CASES)
def test_runs_and_is_right(op: str, changes: dict[str, str], dtype: str) -> None:
    assert tried(WORKLOADS[f"sdpa.{op}"], **{**TINY, "dtype": dtype, **changes})


@pytest.mark.parametrize("op, changes", CASES)
def test_the_last_rows_of_longer_sequences(op: str, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gradients, and of a second problem: both are looked at, and said."""
    monkeypatch.setattr(operation_checks, "WHOLE", 0)
    for module in (operation_checks, operations):
        monkeypatch.setattr(module, "CHECKED", 70)
    words = tried(WORKLOADS[f"sdpa.{op}"], **{**TINY, **changes})
    if changes["pass"] == "backward":
        assert "of 70 tokens: d" in words


def another_choice(result: Tensor) -> Tensor:
    """The last query's free block is one that it did not choose: forced are 0 and the last two."""
    chosen = result.clone()
    row = chosen[-1, 0]
    row[1] = next(block for block in (1, 2, 3) if block not in row.tolist())
    return chosen


def another_lse(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return result[0], result[1] + 1e-3


def another_branch(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return result[0], another_choice(result[1].flatten(0, 1)).view(result[1].shape)


def off_by_a_thousandth(result: Any) -> Any:
    """As `off_by_a_little`, by what half precision would not notice."""
    out, spoiled = (x[0] if isinstance(x, tuple) else x for x in (result, off_by_a_little(result)))
    out = out + (spoiled - out) / 250
    return (out, *result[1:]) if isinstance(result, tuple) else out


FAULTS = [(op, off_by_a_thousandth) for op in ABOUT if op != "select_blocks"]
FAULTS += [
    ("select_blocks", another_choice),
    ("window_attention", another_lse),
    ("decode_attention", another_branch),
]


SAYS = {
    "compress_mean": "means of",
    "select_blocks": "block_indices of",
    "window_attention": "(out|lse) of",
    "decode_attention": "(out|block_indices) of",
}


@pytest.mark.parametrize("whole", [256, 0])
@pytest.mark.parametrize("op, spoil", FAULTS)
def test_a_planted_fault_is_seen(op: str, spoil: Any, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_checks, "WHOLE", whole)
    (workload,) = op_workloads(FaultyBackend(BACKEND, op, spoil), [op])
    with pytest.raises(AssertionError, match=f"^{SAYS.get(op, 'out of')} "):
        tried(workload, **TINY)


class Spoiled(torch.autograd.Function):
    """The identity, whose gradient is another in one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: int) -> Tensor:
        ctx.row = row
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        grad[ctx.row] += 0.05
        return grad, None


class Backwards:
    """Backend sdpa with a wrong gradient of one argument, in one row."""

    name = "backwards"

    def __init__(self, argument: int, row: int) -> None:
        self.argument, self.row = argument, row

    def __getattr__(self, name: str) -> Any:
        def op(*args: Any) -> Any:
            changed = list(args)
            if args[self.argument].requires_grad:
                changed[self.argument] = Spoiled.apply(args[self.argument], self.row)
            return getattr(BACKEND, name)(*changed)

        return getattr(BACKEND, name) if name == "refuse" else op


BACKWARD = {
    "compress_mean": 1,
    "compressed_attention": 3,
    "selected_attention": 3,
    "window_attention": 3,
    "combine": 4,
}


@pytest.mark.parametrize("op, argument", [(op, i) for op, count in BACKWARD.items() for i in range(count)])
@pytest.mark.parametrize("checked", [2048, 70])
def test_a_planted_fault_in_a_gradient_is_seen(
    op: str, argument: int, checked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last row, which is always looked at; in another, of which the second problem tells."""
    for module in (operation_checks, operations):
        monkeypatch.setattr(module, "CHECKED", checked)
    monkeypatch.setattr(operation_checks, "ROWS", 16)
    for row in (-1, 3) if op != "combine" else (-1,):
        (workload,) = op_workloads(Backwards(argument, row), [op])
        with pytest.raises(AssertionError, match=r"^d\w+ of "):
            tried(workload, **{**TINY, "pass": "backward", "batch": 1})


def test_gradients_that_are_not_finite_are_seen() -> None:
    workload = WORKLOADS["sdpa.window_attention"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **TINY, "pass": "backward"})
    grads = [x.clone() for x in workload.call(state, 0)]
    grads[1][-1] = torch.nan
    with pytest.raises(AssertionError, match=r"^gradients of window_attention: expected finite values"):
        workload.check(state, [grads])


# --- costs ------------------------------------------------------------------------------------------------------------


def tensors(*results: Any) -> int:
    """Bytes of all tensors."""
    return sum(x.nbytes for x in results if isinstance(x, Tensor))


def pairs(op: str, state: Any) -> int:
    """Of a query row and a key that it sees."""
    *_, layout, blocks = state.args
    if op == "selected_attention":
        return int(masks.selected_mask(state.args[3], layout, blocks).sum()) * 2
    seen = masks.window_mask if op == "window_attention" else masks.compressed_mask
    return int(seen(layout, blocks).sum()) * 4


@pytest.mark.parametrize("tokens", [90, 16, 7])
@pytest.mark.parametrize("op", [op for op in ABOUT if op != "decode_attention"])
def test_costs_are_counted(op: str, tokens: int) -> None:
    """Bytes are those of the tensors that go in and out; products those of the masks."""
    workload = WORKLOADS[f"sdpa.{op}"]
    parameters = {**workload.parameters, **TINY, "S": tokens}
    state = workload.setup("cpu", 0, **parameters)
    result = workload.call(state, 0)
    results = result if isinstance(result, tuple) else (result,)
    flops, moved = workload.cost(**parameters)
    assert (flops, moved) == forward_cost(op, parameters)
    assert moved == tensors(*state.args, *results)
    if op in OF_NEIGHBOURS:
        assert flops == (2 if op == "select_blocks" else 4) * 8 * pairs(op, state)
    if op in WITHOUT_GRADIENTS or tokens < 8:
        return
    parameters["pass"] = "backward"
    state = workload.setup("cpu", 0, **parameters)
    made = workload.call(state, 0)
    flops, moved = workload.cost(**parameters)
    assert (flops, moved) == backward_cost(op, parameters)
    read = () if op == "compress_mean" else state.args  # what is linear needs no arguments
    kept = results if op in OF_NEIGHBOURS else ()
    assert moved == tensors(*read, *kept, state.grad_out, *made)
    if op in OF_NEIGHBOURS:
        assert flops == 10 * 8 * pairs(op, state)


def test_costs_of_sums() -> None:
    """Multiplications and additions of pooling, of the gated sum and of its gradients."""
    parameters: dict[str, Any] = {**WORKLOADS["sdpa.combine"].parameters, **TINY}
    values, pooled = 2 * 90 * 4 * 8, 2 * 21 * 2 * 8
    assert forward_cost("compress_mean", parameters)[0] == 8 * pooled
    assert forward_cost("combine", parameters)[0] == (3 + 2) * values
    assert backward_cost("combine", parameters)[0] == (3 + 6) * values


@pytest.mark.parametrize("tokens", [90, 96, 97, 16, 7])
def test_costs_of_a_decode_step(tokens: int) -> None:
    """Each key that the masks show the last token, once a kv head."""
    workload = WORKLOADS["sdpa.decode_attention"]
    parameters = {**workload.parameters, **TINY, "S": tokens}
    state = workload.setup("cpu", 0, **parameters)
    q, *_, gates, _, blocks = state.args
    out, indices = workload.call(state, 0)
    layout = VarlenLayout.from_lengths([1], [tokens])
    keys = [
        int(masks.compressed_mask(layout, blocks).sum()),
        int(masks.selected_mask(indices[0], layout, blocks)[:, 0].sum()),
        int(masks.window_mask(layout, blocks).sum()),
    ]
    flops, moved = workload.cost(**parameters)
    assert flops == 4 * 8 * 4 * 2 * sum(keys)
    assert moved == tensors(q, out, gates, indices) + 2 * 2 * 2 * 4 * 8 * sum(keys)


# --- what else a workload tells ---------------------------------------------------------------------------------------


def test_names_and_parameters() -> None:
    assert list(WORKLOADS) == [f"sdpa.{op}" for op in ABOUT]
    for workload in WORKLOADS.values():
        geometry = {name: workload.parameters[name] for name in vars(BlockGeometry())}
        assert geometry == vars(BlockGeometry())
        assert {type(value) for value in workload.parameters.values()} == {int, str}
        assert list(workload.parameters)[:8] == [
            *("S", "batch", "num_heads", "num_kv_heads", "head_dim", "dtype", "pass", "inputs")
        ]
    (other,) = op_workloads(BACKEND, ["combine"], dtype="bfloat16")
    assert other.parameters["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "op, changes, words",
    [
        ("combine", {"pass": "sideways"}, "pass: expected one of ['forward', 'backward'], got 'sideways'"),
        ("combine", {"inputs": "odd"}, "inputs: expected one of ['random', 'smooth'], got 'odd'"),
        ("combine", {"dtype": "int8"}, f"dtype: expected one of {list(DTYPES)}, got 'int8'"),
        ("combine", {"inputs": "smooth"}, "combine has no neighbouring queries"),
        ("select_blocks", {"pass": "backward"}, "select_blocks has no gradients"),
        ("decode_attention", {"pass": "backward"}, "decode_attention has no gradients"),
        ("window_attention", {}, None),
    ],
)
def test_what_is_refused(op: str, changes: dict[str, str], words: str | None) -> None:
    workload = WORKLOADS[f"sdpa.{op}"]
    assert workload.refuse("cpu", **{**workload.parameters, **changes}) == words


def test_the_backend_is_asked_too() -> None:
    asked = []

    class Refusing:
        name = "refusing"

        def refuse(self, op: str, problem: Any, machine: Any) -> str:
            asked.append((op, problem, machine))
            return "no"

    (workload,) = op_workloads(Refusing(), ["selected_attention"])
    assert workload.refuse("cpu", **{**workload.parameters, "pass": "backward", "num_heads": 12}) == "no"
    ((op, problem, machine),) = asked
    assert (op, problem.needs_grad, problem.group_size, problem.topk) == ("selected_attention", True, 6, 16)
    assert (problem.dtype, problem.device, machine.device, machine.sm) == (torch.float32, "cpu", "cpu", None)


def test_neighbours_choose_alike_where_inputs_are_smooth() -> None:
    workload = WORKLOADS["sdpa.selected_attention"]
    changed = {}
    for inputs in ("random", "smooth"):
        state = workload.setup("cpu", 0, **{**workload.parameters, **TINY, "S": 400, "inputs": inputs})
        chosen = state.args[3]
        changed[inputs] = float((chosen[1:] != chosen[:-1]).any(-1).float().mean())
    assert changed["smooth"] < 0.5 * changed["random"]


def test_other_seeds_make_other_memory() -> None:
    workload = WORKLOADS["sdpa.compressed_attention"]
    first, second = (workload.setup("cpu", seed, **{**workload.parameters, **TINY}).args for seed in (0, 1))
    for x, y in zip(first[:3], second[:3], strict=True):
        assert x.data_ptr() != y.data_ptr()
        assert not torch.equal(x, y)


def test_a_decode_step_has_parts() -> None:
    workload = WORKLOADS["sdpa.decode_attention"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **TINY})
    out, _ = workload.call(state, 0)
    parts = workload.parts(state)
    assert set(parts) == {"cmp", "choice", "sel", "win", "combine"}
    assert torch.equal(parts["combine"](0), out)
    other = WORKLOADS["sdpa.combine"]
    assert other.parts(other.setup("cpu", 0, **{**other.parameters, **TINY})) == {}


@pytest.mark.parametrize("op", ABOUT)
def test_rubbish_in_another_sequence_is_seen(op: str) -> None:
    """In rows that nobody looks at one by one."""

    def spoil(result: Any) -> Any:
        first = (result[0] if isinstance(result, tuple) else result).clone()
        first[0] = -7 if first.dtype == torch.int32 else torch.nan
        return (first, *result[1:]) if isinstance(result, tuple) else first

    (workload,) = op_workloads(FaultyBackend(BACKEND, op, spoil), [op])
    with pytest.raises(AssertionError, match=f"{op}: expected (finite values|blocks of)"):
        tried(workload, **TINY)


def test_a_block_that_there_is_not_is_seen_in_a_decode_step() -> None:
    def spoil(result: Any) -> Any:
        indices = result[1].clone()
        indices[0] = 10_000
        return result[0], indices

    (workload,) = op_workloads(FaultyBackend(BACKEND, "decode_attention", spoil), ["decode_attention"])
    with pytest.raises(AssertionError, match="decode_attention: expected blocks of"):
        tried(workload, **TINY)
