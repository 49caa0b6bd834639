"""Does a checkpoint give the gradients of the run without it, and is nothing selected twice when indices are reused?"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from nsa import NSAAttention, ops, reuse_block_indices
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.sdpa import BACKEND
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

again = partial(checkpoint, use_reentrant=False)
reusing = partial(again, context_fn=reuse_block_indices)


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch, fresh_routes: None) -> list[int]:
    """One entry for each time that blocks are selected."""
    select, seen = BACKEND.select_blocks, []

    def counted(*args: Any, **options: Any) -> Tensor:
        seen.append(args[0].shape[0])
        return select(*args, **options)

    monkeypatch.setattr(type(BACKEND), "select_blocks", staticmethod(counted))
    return seen


def whole(function: Callable, *args: Any) -> Any:
    return function(*args)


def each(run: Callable, layers: list[NSAAttention], x: Tensor) -> Tensor:
    """Layer upon layer, each in a checkpoint of its own."""
    for layer in layers:
        x = x + run(layer, x)
    return x


def all_in_one(run: Callable, layers: list[NSAAttention], x: Tensor) -> Tensor:
    return run(partial(each, whole, layers), x)


def nested(run: Callable, layers: list[NSAAttention], x: Tensor) -> Tensor:
    """A checkpoint around two layers, and one around each of them."""
    return run(partial(each, run, layers), x)


def gradients(
    arrange: Callable, run: Callable, layers: list[NSAAttention], x: Tensor, retain_graph: bool = False
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = arrange(run, layers, x)
    parameters = [p for layer in layers for p in layer.parameters()]
    for _ in range(1 + retain_graph):
        found = torch.autograd.grad(out.square().sum(), (x, *parameters), retain_graph=retain_graph)
    return [out.detach(), *found]


@pytest.fixture
def layers(make_layer: Callable) -> list[NSAAttention]:
    """Unequal ones: an index in the wrong place changes the gradients."""
    return [make_layer(), make_layer(compression="mlp", rope_cmp="before", topk=5)]


@pytest.mark.parametrize("arrange", [each, all_in_one, nested])
@pytest.mark.parametrize("retain_graph", [False, True], ids=["once", "twice"])
def test_gradients_are_bitwise_those_without_a_checkpoint(
    arrange: Callable, retain_graph: bool, layers: list[NSAAttention], selections: list[int]
) -> None:
    x = torch.randn(2, 80, 24, dtype=torch.float64)
    expected = gradients(arrange, whole, layers, x)
    assert len(selections) == 2
    selected: dict[str, int] = {}
    for name, run in (("again", again), ("reused", reusing)):
        selections.clear()
        found = gradients(arrange, run, layers, x, retain_graph)
        selected[name] = len(selections)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
    assert selected["reused"] == 2
    assert selected["again"] > 2, "without notes the recomputation selects: the count is able to see it"


def test_a_recomputation_to_the_end_takes_every_note(layers: list[NSAAttention], selections: list[int]) -> None:
    """As without early stopping, where the context ends by itself."""
    x = torch.randn(1, 70, 24, dtype=torch.float64)
    with set_checkpoint_early_stop(False):
        gradients(all_in_one, reusing, layers, x)
    assert len(selections) == 2


def test_a_backward_in_another_thread_takes_the_notes(layers: list[NSAAttention], selections: list[int]) -> None:
    """As on a GPU, where autograd has a thread of its own."""
    x = torch.randn(1, 80, 24, dtype=torch.float64)
    expected = gradients(each, whole, layers, x)
    selections.clear()
    x.requires_grad_()
    loss = each(reusing, layers, x).square().sum()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert torch.equal(x.grad, expected[1])
    assert len(selections) == 2


@pytest.mark.usefixtures("fresh_routes")
def test_the_notes_are_used(make_layer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recomputation that selected other blocks would change the gradients; this one never gets to."""
    layer, x = make_layer(), torch.randn(1, 90, 24, dtype=torch.float64, requires_grad=True)

    def gradient(run: Callable, spoil: bool) -> Tensor:
        out = run(layer, x).square().sum()
        with monkeypatch.context() as patch:
            if spoil:
                dispatch = ops.dispatch
                patch.setattr(
                    ops,
                    "dispatch",
                    lambda op, *a, **o: first_blocks if op == "select_blocks" else dispatch(op, *a, **o),
                )
            return torch.autograd.grad(out, x)[0]

    def first_blocks(
        q: Tensor, k_cmp: Tensor, lse: Tensor, layout: VarlenLayout, blocks: BlockGeometry, **_: Any
    ) -> Tensor:
        indices = torch.full((len(q), k_cmp.shape[1], blocks.topk), -1, dtype=torch.int32)
        indices[..., 0] = 0
        return indices

    expected = gradient(whole, spoil=False)
    assert torch.equal(gradient(reusing, spoil=True), expected)
    assert not torch.equal(gradient(again, spoil=True), expected)


def test_given_indices_are_nobodys_business(selections: list[int]) -> None:
    layout, blocks = VarlenLayout.from_lengths([40]), BlockGeometry()
    q, k = torch.randn(40, 2, 8, requires_grad=True), torch.randn(40, 1, 8)
    indices = torch.zeros(40, 1, 1, dtype=torch.int32)

    def attend(q: Tensor) -> Tensor:
        return ops.selected_attention(q, k, k, indices, layout, blocks)[0]

    reusing(attend, q).sum().backward()
    assert q.grad is not None
    assert selections == []


def test_nothing_is_noted_outside_and_after(make_layer: Callable, selections: list[int]) -> None:
    layer, x = make_layer(), torch.randn(1, 70, 24, dtype=torch.float64)
    reusing(layer, x).sum().backward()
    layer(x)
    with torch.no_grad():
        reusing(layer, x)
    assert len(selections) == 3


@pytest.mark.parametrize("calls, early_stop", [((1, 2), True), ((0, 1), True), ((1, 2), False), ((2, 1), False)])
def test_a_recomputation_that_selects_more_or_less_often_is_told(calls: tuple[int, int], early_stop: bool) -> None:
    """Selections save nothing, so torch's own check does not see them. Ended early, a recomputation may owe some."""
    layout, blocks = VarlenLayout.from_lengths([40]), BlockGeometry()
    q, k_cmp, lse, counts = torch.randn(40, 2, 8), torch.randn(1, 1, 8), torch.zeros(2, 40), iter(calls)

    def run(x: Tensor) -> Tensor:
        for _ in range(next(counts)):
            ops.select_blocks(q, k_cmp, lse, layout, blocks)
        return x * x

    got = "one more" if calls[1] > calls[0] else calls[1]
    with set_checkpoint_early_stop(early_stop):
        out = reusing(run, torch.ones(3, requires_grad=True))
        with pytest.raises(RuntimeError, match=f"expected the recomputation to select {calls[0]} times.*got {got}"):
            out.sum().backward()


def test_other_sizes_in_the_recomputation_are_told(make_layer: Callable) -> None:
    layer, x = make_layer(), torch.randn(1, 70, 24, dtype=torch.float64, requires_grad=True)
    lengths = iter((70, 60))
    out = reusing(lambda x: layer(x[:, : next(lengths)]), x).sum()
    with pytest.raises(
        RuntimeError, match=r"selection 0 .* of shape \[70, 2, 4\], as in the forward, got \[60, 2, 4\]"
    ):
        out.backward()
