"""What is a kernel asked for: how many calls, dense or packed, over views or copies, and how much at a time?"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa_fa2 import FlashBackend, attention, branches, selected
from nsa_fa2.kernel import Limits, Segments
from nsa_fa2.testing import ANYTHING, Called, Case, PlainKernel, plain_backend
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.testing import to_pages
from torch import Tensor

CMP, SLC, WIN = OPS = ["compressed_attention", "selected_attention", "window_attention"]
BLOCKS = BlockGeometry(6, 3, 6, 3, window_size=8)
BATCHES = {
    "one": ([40], [40]),
    "one-after-a-prefix": ([22], [45]),
    "uniform": ([17] * 3, [26] * 3),
    "uniform-blind": ([13] * 3, [11] * 3),
    "ragged": ([9, 0, 20, 1, 4, 11, 5], [9, 6, 20, 30, 0, 31, 2]),
    "decode": ([1] * 5, [9, 30, 12, 3, 31]),
}


class Watched(PlainKernel):
    """Notes what storage the tensors of each call lie in, and how many sequences and rows it has."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.forward_tensors: list[tuple[Tensor, ...]] = []
        self.backward_tensors: list[tuple[Tensor, ...]] = []
        self.sequences: list[int] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, **options: Any) -> Any:
        self.forward_tensors.append((q, k, v))
        self.sequences.append(len(q) if segments is None else len(segments.offsets_q) - 1)
        return super().forward(q, k, v, segments, **options)

    def backward(self, *tensors: Any, **options: Any) -> Any:
        self.backward_tensors.append(tensors[:5])
        return super().backward(*tensors, **options)


def watched(**limits: bool) -> tuple[FlashBackend, Watched]:
    kernel = Watched(replace(ANYTHING, **limits))
    return FlashBackend("watched", kernel, lambda environment: None), kernel


def case_of(op: str, batch: str, **sizes: int) -> Case:
    return Case.random(op, VarlenLayout.from_lengths(*BATCHES[batch]), BLOCKS, **sizes)


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("lengths", "packed"),
    [([9], False), ([30], False), ([11, 11], False), ([9, 30, 12, 31], True), ([10, 10, 10, 9], True)],
)
def test_a_decode_step_is_one_call_of_the_compressed_branch_without_a_mask(lengths: list[int], packed: bool) -> None:
    """Whatever place in its row of the fold each sequence's query has."""
    backend, kernel = watched()
    layout = VarlenLayout.from_lengths([1] * len(lengths), lengths)
    Case.random(CMP, layout, BLOCKS).run(backend)
    shape = (len(lengths), 4, 8) if packed else (len(lengths), 1, 4, 8)
    assert kernel.calls == [Called(shape, packed, False, None)]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_window_is_one_call(batch: str) -> None:
    backend, kernel = watched()
    case = case_of(WIN, batch)
    case.run(backend)
    layout = case.rest[-2]
    packed = batch in ("ragged", "decode")
    shape = (layout.total_q, 4, 8) if packed else (layout.batch_size, layout.max_seqlen_q, 4, 8)
    assert kernel.calls == [Called(shape, packed, True, 8)]
    assert len(kernel.backward_tensors) == 1


def test_a_window_longer_than_the_batch_is_none() -> None:
    for lengths in ([8, 8], [8, 3]):
        layout = VarlenLayout.from_lengths(lengths)
        for window, expected in ((7, 7), (8, None), (512, None)):
            backend, kernel = watched()
            Case.random(WIN, layout, BlockGeometry(6, 3, 6, 3, window_size=window)).run(backend)
            assert [call.window for call in kernel.calls] == [expected]


@pytest.mark.parametrize("op", [CMP, WIN])
@pytest.mark.parametrize("batch", BATCHES)
def test_uniform_batches_get_dense_calls_ragged_ones_packed_calls(batch: str, op: str) -> None:
    backend, kernel = watched()
    case_of(op, batch).run(backend)
    assert {call.packed for call in kernel.calls} == {batch in ("ragged", "decode")}


def test_the_fold_is_one_causal_call_and_its_ends_have_none() -> None:
    """17 queries from position 9 on, places 4 to 20 of rows of 3: two, five rows, none; 22 from 23 on: seven, one.

    Phases of one sequence are a batch, unless the kernel would copy what is interleaved.
    """
    for batch, expected in (
        ("uniform", [((3, 2, 4, 8), False), ((3, 5, 12, 8), True)]),
        ("one-after-a-prefix", [((3, 7, 4, 8), True), ((1, 1, 4, 8), False)]),
    ):
        backend, kernel = watched()
        case_of(CMP, batch).run(backend)
        assert [(call.shape, call.causal) for call in kernel.calls] == expected
    backend, kernel = watched(interleaved=False)
    case_of(CMP, "one-after-a-prefix").run(backend)
    assert [call.shape for call in kernel.calls] == [(1, 7, 12, 8), (1, 1, 4, 8)]


@pytest.mark.parametrize("op", [CMP, WIN])
@pytest.mark.parametrize("batch", ["one", "one-after-a-prefix"])
def test_prefill_of_one_sequence_copies_nothing(batch: str, op: str) -> None:
    """Of q, k, v, of the output and of its gradient, forward and backward; keys of several phases least of all."""
    backend, kernel = watched()
    case = case_of(op, batch)
    q, k, v = (x.requires_grad_() for x in case[1:4])
    out, _ = getattr(backend, op)(q, k, v, *case.rest)
    out.backward(case.grad_out)
    assert {tuple(map(storage, tensors)) for tensors in kernel.forward_tensors} == {tuple(map(storage, (q, k, v)))}
    own = tuple(map(storage, (case.grad_out, q, k, v, out)))
    assert {tuple(map(storage, tensors)) for tensors in kernel.backward_tensors} == {own}


def test_the_queries_of_a_uniform_batch_are_never_copied() -> None:
    for op in (CMP, WIN):
        backend, kernel = watched()
        case = case_of(op, "uniform")
        case.q.requires_grad_()
        getattr(backend, op)(case.q, case.k, case.v, *case.rest)
        assert {storage(q) for q, _, _ in kernel.forward_tensors} == {storage(case.q)}


def patched_results(case: Case, monkeypatch: pytest.MonkeyPatch, **limits: int) -> tuple[dict[str, Tensor], Watched]:
    case = case._replace(rest=(*case.rest[:-2], fresh(case.rest[-2]), case.rest[-1]))  # plans are kept in layouts
    backend, kernel = watched()
    with monkeypatch.context() as patch:
        for module in (attention, branches, selected):
            for name in limits.keys() & vars(module).keys():
                patch.setattr(module, name, limits[name])
        return case.run(backend), kernel


def fresh(layout: VarlenLayout) -> VarlenLayout:
    return VarlenLayout.from_lengths(layout.cu_seqlens_q.diff().tolist(), layout.cu_seqlens_k.diff().tolist())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", BATCHES)
def test_workspace_changes_the_number_of_calls_and_no_result(
    batch: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(op, batch)
    expected, whole = patched_results(case, monkeypatch)
    case.assert_oracles(plain_backend())
    numbers = []
    for workspace in (1, 60_000 if op == SLC else 12_000):
        got, kernel = patched_results(case, monkeypatch, WORKSPACE=workspace)
        case.assert_close(got, expected)
        assert len(kernel.backward_tensors) == len(kernel.calls)
        numbers.append(len(kernel.calls))
    assert numbers[0] >= numbers[1] >= len(whole.calls)
    folds = op == CMP and any(call.causal for call in whole.calls)
    if op == SLC:
        assert numbers[0] == case.rest[-2].total_q > numbers[1] > 1 == len(whole.calls)
    else:
        assert numbers[0] == len(whole.calls) + folds * (BLOCKS.kernel_stride - 1)


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", BATCHES)
def test_calls_of_few_sequences_give_the_same(batch: str, op: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(op, batch)
    expected, whole = patched_results(case, monkeypatch)
    got, kernel = patched_results(case, monkeypatch, MAX_SEQUENCES=most)
    case.assert_close(got, expected)
    least = 4 if op == SLC else 1  # a query of two kv heads, each with what is left over
    assert max(kernel.sequences) <= max(least, most)
    assert len(kernel.calls) > len(whole.calls) or max(whole.sequences) <= most
    for call in kernel.calls:  # phases beside heads: of several sequences, or of packed ones
        assert call.shape[-2] <= max(4, most)


@pytest.mark.parametrize("op", OPS)
def test_without_gradients_more_fits_in_the_workspace(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(op, "one")
    _, trained = patched_results(case, monkeypatch, WORKSPACE=20_000)
    monkeypatch.setattr(attention, "WORKSPACE", 20_000)
    backend, kernel = watched()
    getattr(backend, op)(*case[1:4], *case.rest)
    assert 0 < len(kernel.calls) < len(trained.calls) or op == WIN


@pytest.mark.parametrize(("op", "limit"), [(CMP, 1_000), (CMP, 30_000), (CMP, 40_000), (SLC, 1_000), (SLC, 60_000)])
@pytest.mark.parametrize("batch", ["one", "uniform", "ragged"])
def test_what_a_call_copies_and_gives_fits_in_the_workspace(
    batch: str, op: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is of one phase, or one query: the copies that a call of the backward reads, and the gradients it gives."""
    monkeypatch.setattr(attention, "WORKSPACE", limit)
    backend, kernel = watched()
    case = case_of(op, batch)
    q, k, v = (x.requires_grad_() for x in case[1:4])
    out, _ = getattr(backend, op)(q, k, v, *case.rest)
    out.backward(case.grad_out)
    own = set(map(storage, (q, k, v, out, case.grad_out)))
    smallest = []
    for call, tensors in zip(kernel.calls, kernel.backward_tensors, strict=True):
        gradients = tensors[1:4] if op == CMP else tensors[2:4]
        copies = [x for x in tensors if storage(x) not in own]
        heads = call.shape[-2] * (call.shape[0] if batch == "one" else 1)
        smallest.append(heads == 4 if op == CMP else call.shape[0] == 4)
        assert sum(x.nbytes for x in (*copies, *gradients)) <= limit or smallest[-1]
    if limit != 30_000:  # not enough for two phases of every batch
        assert all(smallest) == (limit == 1_000)


def test_gradients_of_many_calls_are_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 phases, each of which gives a key the gradient 1: in bfloat16, 256 + 1 = 256."""

    class Ones(PlainKernel):
        def backward(self, *tensors: Any, **options: Any) -> tuple[Tensor, ...]:
            return tuple(torch.ones_like(x) for x in tensors[1:4])

    layout, blocks = VarlenLayout.from_lengths([599]), BlockGeometry(300, 300, 300, 3)
    for workspace in (1, 1 << 30):
        monkeypatch.setattr(attention, "WORKSPACE", workspace)
        q, k, v = (torch.ones(rows, 1, 2, dtype=torch.bfloat16, requires_grad=True) for rows in (599, 1, 1))
        out, _ = FlashBackend("ones", Ones(), lambda environment: None).compressed_attention(q, k, v, layout, blocks)
        out.sum().backward()
        assert k.grad.dtype == v.grad.dtype == torch.bfloat16
        assert k.grad.tolist() == v.grad.tolist() == [[[300.0, 300.0]]]


@pytest.mark.parametrize("op", [CMP, SLC])
@pytest.mark.parametrize("batch", BATCHES)
def test_pages_are_asked_for_in_the_same_calls(batch: str, op: str) -> None:
    case = case_of(op, batch)
    layout = case.rest[-2]
    offsets = layout.compressed(BLOCKS).cu_seqlens if op == CMP else layout.cu_seqlens_k
    asked = []
    for k, v in ((case.k, case.v), (to_pages(x, offsets.diff().tolist(), 4) for x in (case.k, case.v))):
        backend, kernel = watched()
        getattr(backend, op)(case.q, k, v, *case.rest)
        asked.append(kernel.calls)
    assert asked[0] == asked[1] != []
