"""Are the numbers of an observed layer those of its tensors, recomputed plainly? And is the layer still the layer?"""

import contextlib
import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import nsa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nsa import (
    NSAAttention,
    NSACache,
    NSAConfig,
    Observer,
    decode_graph,
    layer_observer,
    observe,
    ops,
    reuse_block_indices,
)
from nsa.layer_observer import making_a_graph
from nsa.layer_statistics import BRANCHES, NEAR_ONE, NEAR_ZERO, SUMS, LayerStatistics, summary
from nsa.reads import count_reads
from nsa.selection_overlap import overlap
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HIDDEN = 24


@dataclass
class Seen:
    """Rows of every call of an attention operation: what the numbers are to be recomputed from."""

    gates: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    position: list[list[int]] = field(default_factory=list)  # -1 for padding
    sequence: list[list[int]] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)  # whether a cache connects the call with the next

    def expected(self, blocks: BlockGeometry) -> dict[str, float]:
        """The snapshot's numbers of this layer, without those of parity."""
        real = [torch.tensor(position) >= 0 for position in self.position]
        gates, out, indices = (
            torch.cat([x[rows] for x, rows in zip(tensors, real, strict=True)]).double()
            for tensors in (self.gates, self.out, self.indices)
        )
        positions = [p for call in self.position for p in call if p >= 0]
        layout = VarlenLayout.from_lengths([1] * len(positions), [p + 1 for p in positions])
        reads = count_reads(indices.int(), layout, blocks)
        found = {
            "steps": sum(any(p >= 0 for p in call) for call in self.position),
            "queries": len(positions),
            "nonfinite": int((~out.isfinite()).sum()),
            "parity_steps": 0,
            "budget": sum(blocks.reads(p + 1) for p in positions) / len(positions),
        }
        for number, branch in enumerate(BRANCHES):
            gate = gates[..., number]
            gate = gate[gate.isfinite()]
            found[f"gate_mean.{branch}"] = gate.mean().item()
            found[f"gate_std.{branch}"] = gate.std(correction=0).item()
            found[f"gate_low.{branch}"] = (gate < NEAR_ZERO).double().mean().item()
            found[f"gate_high.{branch}"] = (gate > NEAR_ONE).double().mean().item()
            found[f"reads.{branch}"] = getattr(reads, branch).double().mean().item()
        lengths = [p + 1 for p in positions]
        found["budget.cmp"] = sum(map(blocks.num_compressed, lengths)) / len(lengths)
        found["budget.slc"] = float(blocks.topk * blocks.block_size)
        found["budget.win"] = sum(min(length, blocks.window_size) for length in lengths) / len(lengths)
        shares = self.shares()
        return found | ({"overlap": sum(shares) / len(shares)} if shares else {})

    def shares(self) -> list[float]:
        """|I_t ∩ I_(t-1)| / |I_t| of every pair of neighbours and kv head, with Python's sets."""
        shares: list[float] = []
        before: dict[tuple[int, int], list[set[int]]] = {}
        for indices, position, sequence, kept in zip(
            self.indices, self.position, self.sequence, self.kept, strict=True
        ):
            before = before if kept else {}
            for row, p, s in zip(indices.tolist(), position, sequence, strict=True):
                if p < 0:
                    continue
                sets = [set(head) - {-1} for head in row]
                earlier = before.get((s, p - 1), [])
                shares += [len(x & y) / len(x) for x, y in zip(sets, earlier, strict=False)]
                before[s, p] = sets
        return shares


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every attention call of observed layers from now on."""
    found = Seen()
    attention, decode = layer_observer.nsa_attention, ops.decode_attention

    def attended(*args: Any, **options: Any) -> Any:
        out, aux = attention(*args, **options)
        gates, layout = args[7:9]
        found.gates.append(gates.detach())
        found.out.append(out.detach())
        found.indices.append(aux.block_indices)
        found.position.append(layout.positions().tolist())
        found.sequence.append(layout.sequence_of_queries().tolist())
        found.kept.append(not isinstance(args[1], Tensor))
        return out, aux

    def decoded(*args: Any, **options: Any) -> Any:
        out, indices = decode(*args, **options)
        if options.get("backend") is None:
            gates, counts = args[7:9]
            lengths = args[3].lengths.tolist()  # the new tokens included
            rows = [(b, n) for b in range(out.shape[0]) for n in range(out.shape[1])]
            count = counts.tolist()
            found.gates.append(gates.flatten(0, 1))
            found.out.append(out.flatten(0, 1))
            found.indices.append(indices.flatten(0, 1))
            found.position.append([lengths[b] - count[b] + n if n < count[b] else -1 for b, n in rows])
            found.sequence.append([b for b, _ in rows])
            found.kept.append(True)
        return out, indices

    monkeypatch.setattr(layer_observer, "nsa_attention", attended)
    monkeypatch.setattr(ops, "decode_attention", decoded)
    return found


def numbers_of(observer: Observer, number: int = 0) -> dict[str, float]:
    """A layer's numbers, less names."""
    prefix = f"layer.{number}."
    found = {name.removeprefix(prefix): x for name, x in observer.snapshot().items() if name.startswith(prefix)}
    return {name: x for name, x in found.items() if not isinstance(x, str)}


def assert_numbers(got: dict[str, float], expected: dict[str, float]) -> None:
    """fp64 sums of some thousand terms of at most 1, in another order; a std is the root of a difference of two."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name] == pytest.approx(x, rel=1e-12, abs=1e-6 if "gate_std" in name else 1e-12), name


def step(layer: NSAAttention, cache: NSACache, x: Tensor, counts: list[int]) -> Tensor:
    cache.reserve(counts)
    out = layer.decode(x, cache, torch.tensor(counts, dtype=torch.int32))
    cache.advance(counts)
    return out


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.float64)


# --- the numbers


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "no_grad"])
def test_a_prefill(kind: str, training: bool, make_layer: Callable, seen: Seen) -> None:
    layer = make_layer()
    with observe(layer) as observer, torch.set_grad_enabled(training):
        for _ in range(2):
            if kind == "whole":
                layer(tokens(2, 90))
            elif kind == "padded":
                mask = torch.zeros(2, 90, dtype=torch.bool)
                mask[0, 3:80] = mask[1, ::2] = True
                layer(tokens(2, 90), padding_mask=mask)
            else:
                layer(tokens(118), layout=VarlenLayout.from_lengths([90, 0, 1, 27]))
    expected = seen.expected(layer.config.blocks)
    assert_numbers(numbers_of(observer), expected)
    assert 0.2 < expected["overlap"] < 1
    assert expected["queries"] == {"whole": 360, "padded": 2 * (77 + 45), "packed": 236}[kind]


@pytest.mark.parametrize("changes", [{}, {"shared_kv": True}, {"compression": "mlp"}], ids=["", "shared_kv", "mlp"])
@torch.no_grad()
def test_chunks_and_decode_steps(changes: dict, make_layer: Callable, make_cache: Callable, seen: Seen) -> None:
    """Ragged chunks, a pause, single tokens by `forward` and by `decode`, several at once, nobody at all."""
    layer = make_layer(**changes)
    cache = make_cache(layer.config, 3)
    with observe(layer) as observer:
        for lengths in ([70, 0, 20], [9, 3, 0], [1, 1, 1], [0, 0, 0]):
            layer(tokens(sum(lengths)), layout=VarlenLayout.from_lengths(lengths), cache=cache)
        for counts in ([1, 1, 1], [1, 0, 1], [4, 2, 0], [0, 0, 0], [1, 1, 1]):
            step(layer, cache, tokens(3, max(1, *counts)), counts)
    assert_numbers(numbers_of(observer), seen.expected(layer.config.blocks))
    assert numbers_of(observer)["queries"] == sum(cache.lengths)
    assert numbers_of(observer)["steps"] == 7


@torch.no_grad()
def test_one_sequence_alone(make_layer: Callable, make_cache: Callable, seen: Seen) -> None:
    """Its first row of a step follows the last one of the step before."""
    layer = make_layer()
    cache = make_cache(layer.config, 1)
    with observe(layer) as observer:
        layer(tokens(1, 70), cache=cache)
        layer(tokens(1, 3), cache=cache)
        for count in (3, 1, 2):
            step(layer, cache, tokens(1, 3), [count])
    assert_numbers(numbers_of(observer), seen.expected(layer.config.blocks))
    neighbours = observer.layers[0].statistics.state[1][SUMS.index("neighbours")]
    assert neighbours == (cache.lengths[0] - 1) * layer.config.num_kv_heads


def test_the_first_row_is_no_neighbour_of_the_last() -> None:
    indices = torch.tensor([[[0, 1]], [[0, 1]]], dtype=torch.int32)
    assert overlap(indices, torch.tensor([70, 71]), torch.tensor([0, 0]), None, 256).tolist() == [1.0, 1.0]


def test_reads_are_those_that_are_counted_from_indices(make_layer: Callable, seen: Seen) -> None:
    layer, layout = make_layer(), VarlenLayout.from_lengths([100, 33])
    with observe(layer) as observer:
        layer(tokens(133), layout=layout)
    reads = count_reads(seen.indices[0], layout, layer.config.blocks)
    got = numbers_of(observer)
    for branch in BRANCHES:
        assert got[f"reads.{branch}"] == getattr(reads, branch).double().mean().item()
    assert sum(got[f"reads.{branch}"] for branch in BRANCHES) < got["budget"]


def test_extreme_gates_are_counted(make_layer: Callable) -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.gates.out.weight.zero_()
        layer.gates.out.bias.copy_(torch.tensor([-9.0, 0.0, 9.0] * 3 + [0.0, 0.0, 9.0]))
    with observe(layer) as observer:
        layer(tokens(1, 10))
    got = numbers_of(observer)
    assert [got[f"gate_low.{branch}"] for branch in BRANCHES] == [0.75, 0.0, 0.0]
    assert [got[f"gate_high.{branch}"] for branch in BRANCHES] == [0.0, 0.0, 1.0]


@torch.no_grad()
def test_what_is_not_finite_is_counted_and_stays_out_of_the_means(make_layer: Callable, seen: Seen) -> None:
    layer, x = make_layer(), tokens(2, 40)
    x[1, 30] = torch.nan
    with observe(layer, parity_every=1) as observer:
        layer(x)
    got = numbers_of(observer)
    expected = seen.expected(layer.config.blocks) | {"parity_steps": 1, "parity_mae": got["parity_mae"]}
    assert_numbers(got, expected)
    assert 10 * 4 * 6 <= got["nonfinite"] <= 40 * 4 * 6, "its own row and those after it at least"
    assert got["parity_mae"] < 1e-13
    assert all(math.isfinite(x) for x in got.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_each_value_that_is_not_finite(value: float) -> None:
    """Once in the output and once among the gates, of a query and of padding."""
    statistics = LayerStatistics(torch.device("cpu"))
    gates, out, indices = torch.full((3, 2, 3), 0.5), torch.ones(3, 2, 4), torch.zeros(3, 1, 1, dtype=torch.int32)
    for row in (1, 2):
        gates[row, 0, 1] = out[row, 1, 2] = value
    statistics.add(gates, out, indices, torch.tensor([0, 1, -1]), torch.zeros(2, dtype=torch.float64), BlockGeometry())
    statistics.add_parity(out.double() - 1.25, torch.tensor([True, True, False])[:, None, None])
    numbers = summary(statistics.state[1].tolist(), 1)
    assert (numbers["queries"], numbers["nonfinite"], numbers["parity_steps"]) == (2, 1, 1)
    assert numbers["gate_mean.slc"] == 0.5
    assert numbers["gate_low.slc"] == numbers["gate_high.slc"] == numbers["gate_std.slc"] == 0
    assert numbers["parity_mae"] == 0.25


def test_a_gate_whose_square_is_too_large_has_no_spread() -> None:
    """Of a module of one's own: what cannot be said is left out."""
    row = dict.fromkeys(SUMS, 1.0) | {"gate_squares.cmp": torch.inf}
    numbers = summary(list(row.values()), 1)
    assert "gate_std.cmp" not in numbers
    assert numbers["gate_mean.cmp"] == 1.0


def test_long_calls_are_counted_in_parts(make_layer: Callable, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.layer_statistics.ROWS_AT_ONCE", 16)
    layer = make_layer()
    with observe(layer) as observer:
        layer(tokens(2, 41))
    assert_numbers(numbers_of(observer), seen.expected(layer.config.blocks))


# --- overlap


@pytest.mark.parametrize("rows", [1, 2, 7, 29, 30, 100])
def test_overlap_looks_at_the_last_rows(rows: int) -> None:
    indices = torch.stack([torch.randperm(9)[:4] for _ in range(60)]).view(30, 2, 4).int()
    indices[::3, 0, 2:] = -1
    position = torch.tensor([*range(5, 25), -1, *range(9)])
    sequence = torch.tensor([0] * 21 + [1] * 9)
    seen = Seen()
    seen.indices, seen.position, seen.sequence, seen.kept = [indices], [position.tolist()], [sequence.tolist()], [False]
    per_pair = seen.shares()
    pairs = [row for row in range(1, 30) if row not in (20, 21)]
    expected = [x for row, x in zip([r for r in pairs for _ in "hk"], per_pair, strict=True) if row >= 30 - rows]
    got = overlap(indices, position, sequence, None, rows).tolist()
    assert got == pytest.approx([sum(expected), len(expected)])


@torch.no_grad()
def test_a_sequence_that_begins_like_another_has_no_neighbour_yet(make_layer: Callable, make_cache: Callable) -> None:
    layer = make_layer()
    cache = make_cache(layer.config, 2)
    with observe(layer) as observer:
        layer(tokens(2, 30), cache=cache)
        before = observer.layers[0].statistics.state[1].clone()
        cache.free(1)
        cache.fork(0, 1)  # as long as the one that left: its position would fit
        step(layer, cache, tokens(2, 1), [1, 1])
        counted = observer.layers[0].statistics.state[1] - before
    assert counted[SUMS.index("neighbours")] == layer.config.num_kv_heads, "of sequence 0 alone"


@pytest.mark.parametrize("ended", ["truncate", "free"])
@torch.no_grad()
def test_a_query_that_was_taken_back_is_no_neighbour(ended: str, make_layer: Callable, make_cache: Callable) -> None:
    """Not of the one that follows the query that came in its place in a step that was not counted."""
    layer = make_layer()
    cache = make_cache(layer.config, 1)
    with observe(layer, every=3) as observer:
        layer(tokens(1, 30), cache=cache)
        for _ in range(2):
            step(layer, cache, tokens(1, 1), [1])
        kept = observer.layers[0].statistics.state[1].clone()
        if ended == "truncate":
            cache.truncate(0, 31)
        else:
            cache.free(0)
            observer.layers[0]._seen["prefill"] = 2
            layer(tokens(1, 31), cache=cache)
        for _ in range(2):  # the first of which is not counted
            step(layer, cache, tokens(1, 1), [1])
        counted = observer.layers[0].statistics.state[1] - kept
    assert counted[SUMS.index("steps")] == 1
    assert counted[SUMS.index("neighbours")] == 0


# --- parity


@torch.no_grad()
def test_parity_of_the_reference_itself(make_layer: Callable, make_cache: Callable) -> None:
    """It is computed in other parts, so in another order of sums: fp64 roundings of outputs of about 1."""
    layer = make_layer()
    cache = make_cache(layer.config, 2)
    with observe(layer, parity_every=1, parity_rows=5) as observer:
        layer(tokens(80), layout=VarlenLayout.from_lengths([70, 10]))
        layer(tokens(80), layout=VarlenLayout.from_lengths([77, 3]), cache=cache)
        step(layer, cache, tokens(2, 3), [3, 1])
    got = numbers_of(observer)
    assert got["parity_steps"] == 3
    assert got["parity_mae"] < 1e-13


@pytest.mark.parametrize("decoded", [False, True], ids=["prefill", "decode"])
@torch.no_grad()
def test_parity_finds_a_fault(
    decoded: bool, make_layer: Callable, make_cache: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter too much wherever nobody asked for a backend, and more in padding, which does not count."""
    combine, decode = ops.combine, ops.decode_attention

    def wrong(*args: Any, backend: str | None = None, **options: Any) -> Any:
        return combine(*args, backend=backend, **options) + (0.25 if backend is None else 0.0)

    def wrong_step(*args: Any, backend: str | None = None, **options: Any) -> Any:
        out, indices = decode(*args, backend=backend, **options)
        there = torch.arange(out.shape[1]) < args[8][:, None]
        fault = torch.where(there, 0.25, 9.0)[..., None, None]
        return out + (fault if backend is None else 0.0), indices

    monkeypatch.setattr(ops, "combine", wrong)
    monkeypatch.setattr(ops, "decode_attention", wrong_step)
    layer = make_layer()
    cache = make_cache(layer.config, 2)
    with observe(layer, parity_every=1) as observer:
        if decoded:
            step(layer, cache, tokens(2, 2), [2, 1])
        else:
            layer(tokens(2, 70))
    assert numbers_of(observer)["parity_mae"] == pytest.approx(0.25, rel=1e-12)


@torch.no_grad()
def test_parity_of_a_prefill_is_of_the_blocks_that_were_selected(
    make_layer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another selection is another output, and no fault of the attention."""
    layer, x = make_layer(), tokens(1, 90)
    expected, select = layer(x), ops.select_blocks

    def fewer(*args: Any, backend: str | None = None, **options: Any) -> Tensor:
        indices = select(*args, backend=backend, **options)
        return indices.index_fill(-1, torch.tensor([0]), -1) if backend is None else indices

    monkeypatch.setattr(ops, "select_blocks", fewer)
    with observe(layer, parity_every=1) as observer:
        assert not torch.allclose(layer(x), expected)
    assert numbers_of(observer)["parity_mae"] < 1e-13


@torch.no_grad()
def test_how_often_and_where_parity_is_looked_at(make_layer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, looked = make_layer(), []
    original = nsa.parity.nsa_attention
    monkeypatch.setattr(nsa.parity, "nsa_attention", lambda *a, **o: looked.append(a[8]) or original(*a, **o))
    with observe(layer, parity_every=3, parity_rows=4) as observer:
        for _ in range(7):
            layer(tokens(21), layout=VarlenLayout.from_lengths([10, 2, 0, 9]))
    assert numbers_of(observer)["parity_steps"] == len(looked) == 3
    for layout in looked:
        assert layout.cu_seqlens_q.diff().tolist() == [4, 2, 0, 4]
        assert layout.cu_seqlens_k.diff().tolist() == [10, 2, 0, 9]


@torch.no_grad()
def test_routes_are_of_the_last_problem(
    make_layer: Callable, make_cache: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whichever kind that step was."""
    layer = make_layer()
    cache = make_cache(layer.config, 1)
    widths: dict[str, int] = {}

    def planned(problem: Any) -> SimpleNamespace:
        widths[problem.op] = problem.max_seqlen_q
        return SimpleNamespace(backend="sdpa")

    monkeypatch.setattr(layer_observer, "plan_for", planned)
    with observe(layer) as observer:
        for width in (30, 2, 50, 1):  # 2 and 1 continue the cache: decode
            layer(tokens(1, width), cache=cache if width < 50 else None)
            observer.layers[0].routes()
            assert widths["window_attention"] == width


def test_routes_can_be_read_while_another_thread_is_noting(make_layer: Callable) -> None:
    """As of a scrape."""

    class Growing(dict[str, Any]):
        def items(self) -> Iterator[Any]:  # type: ignore[override]
            for found in super().items():
                yield found
                self["window_attention"] = found[1]

        def keys(self) -> Iterator[str]:  # type: ignore[override]
            return (op for op, _ in self.items())

    layer = make_layer()
    with observe(layer) as observer:
        layer(tokens(1, 10))
        (watched,) = observer.layers
        notes = watched._problems["prefill"]
        watched._problems["prefill"] = Growing(combine=notes["combine"])
        assert watched.routes() == {"combine": "sdpa"}


def test_a_model_without_a_device_has_no_numbers_yet(make_layer: Callable) -> None:
    with observe(make_layer().to("meta")) as observer:
        assert numbers_of(observer) == {"steps": 0, "queries": 0, "nonfinite": 0, "parity_steps": 0}


# --- the layer is still the layer


def gradients(layer: NSAAttention, x: Tensor, again: Callable | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    options = {} if again is None else {"context_fn": again}
    out = checkpoint(layer, x, use_reentrant=False, **options) if again else layer(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))]


def test_gradients_are_bitwise_the_same(variant: dict, make_layer: Callable) -> None:
    layer, x = make_layer(**variant), tokens(2, 70)
    expected = gradients(layer, x)
    with observe(layer, parity_every=1):
        got = gradients(layer, x)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_recomputation_is_not_counted_again(make_layer: Callable) -> None:
    layer, x = make_layer(), tokens(2, 70)
    expected = gradients(layer, x)
    with observe(layer) as observer:
        got = gradients(layer, x, reuse_block_indices)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert numbers_of(observer)["steps"] == 1
    assert numbers_of(observer)["queries"] == 140


@torch.no_grad()
def test_decode_steps_are_bitwise_the_same(make_layer: Callable, make_cache: Callable, contents: Callable) -> None:
    layer = make_layer()
    caches = [make_cache(layer.config, 2) for _ in range(2)]
    x, steps = tokens(2, 40), [tokens(2, 3) for _ in range(20)]

    def run(cache: NSACache) -> list[Tensor]:
        return [layer(x, cache=cache), *(step(layer, cache, y, [n % 4, 1]) for n, y in enumerate(steps))]

    expected = run(caches[0])
    with observe(layer, parity_every=1):
        got = run(caches[1])
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    for one, other in zip(contents(caches[1]), contents(caches[0]), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_goes_on_after_inference_mode(make_layer: Callable, make_cache: Callable, seen: Seen) -> None:
    layer = make_layer()
    cache = make_cache(layer.config, 1)
    with observe(layer, parity_every=1) as observer:
        with torch.inference_mode():
            layer(tokens(1, 20), cache=cache)
            step(layer, cache, tokens(1, 1), [1])
        layer(tokens(1, 20)).sum().backward()
        with torch.no_grad():
            step(layer, cache, tokens(1, 1), [1])
    assert numbers_of(observer)["queries"] == 42


def test_autocast(make_config: Callable, seen: Seen) -> None:
    layer = NSAAttention(make_config())
    with observe(layer, parity_every=1) as observer, torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 50, HIDDEN))
    got, expected = numbers_of(observer), seen.expected(layer.config.blocks)
    assert got.pop("parity_mae") < 0.01
    assert_numbers(got, expected | {"parity_steps": 1})


# --- the switch


def test_close_leaves_the_layer_as_it_was(make_layer: Callable) -> None:
    layer = make_layer()
    state = set(layer.state_dict())
    observer = observe(layer)
    assert layer.observer is observer.layers[0]
    assert set(layer.state_dict()) == state
    layer(tokens(1, 10))
    before = observer.snapshot()
    observer.close()
    observer.close()
    assert layer.observer is None
    layer(tokens(1, 10))
    assert observer.snapshot() == before
    observe(layer).close()


def test_an_exception_ends_the_block_and_the_observation(make_layer: Callable) -> None:
    layer = make_layer()
    with pytest.raises(ZeroDivisionError), observe(layer) as observer:
        raise ZeroDivisionError
    assert observer.closed
    assert layer.observer is None


class Model(nn.Module):
    def __init__(self, make_layer: Callable) -> None:
        super().__init__()
        self.first = make_layer()
        self.others = nn.ModuleList([make_layer(shared_kv=True), nn.Linear(2, 2), make_layer()])
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.others[0], self.others[2]):
            x = x + layer(x)
        return x


def test_the_layers_of_a_model_are_numbered(make_layer: Callable) -> None:
    model = Model(make_layer)
    with observe(model) as observer:
        model(tokens(1, 20))
    numbers = observer.snapshot()
    assert [numbers[f"layer.{n}.module"] for n in range(3)] == ["first", "others.0", "others.2"]
    assert [numbers[f"layer.{n}.queries"] for n in range(3)] == [20, 20, 20]
    assert "layer.3.module" not in numbers
    operations = {"compress_mean", "compressed_attention", "select_blocks", "selected_attention", "window_attention"}
    assert {name for name in numbers if name.startswith("layer.1.route.")} == {
        f"layer.1.route.{op}" for op in (*operations, "combine")
    }


def test_two_models_at_once(make_layer: Callable) -> None:
    one, other = make_layer(), make_layer()
    with observe(one) as first, observe(other) as second:
        one(tokens(1, 20))
        other(tokens(1, 30))
        other(tokens(1, 30))
    assert (numbers_of(first)["queries"], numbers_of(second)["queries"]) == (20, 60)


def test_observing_twice(make_layer: Callable) -> None:
    model = Model(make_layer)
    with observe(model.others[0]) as observer:
        with pytest.raises(ValueError, match=r"^model: expected layers that nobody observes, got \['others.0'\]; "):
            observe(model)
        assert model.first.observer is None
        assert model.others[0].observer is observer.layers[0]
    observe(model).close()


def test_reset_counts_from_nothing(make_layer: Callable) -> None:
    layer = make_layer()
    with observe(layer, parity_every=2) as observer:
        layer(tokens(1, 20))
        state = observer.layers[0].statistics.state
        observer.reset()
        assert numbers_of(observer) == {"steps": 0, "queries": 0, "nonfinite": 0, "parity_steps": 0}
        assert observer.snapshot().keys() == {
            *(f"layer.0.{name}" for name in ("module", "steps", "queries", "nonfinite", "parity_steps")),
            *("failures", "closed"),
        }
        layer(tokens(1, 30))
    assert numbers_of(observer)["queries"] == 30
    assert numbers_of(observer)["parity_steps"] == 1
    assert observer.layers[0].statistics.state is state, "graphs hold it"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_of_an_observed_layer_is_not_observed(copied: Callable, make_layer: Callable) -> None:
    layer = make_layer()
    with observe(layer) as observer:
        other = copied(layer)
        assert other.observer is None
        other(tokens(1, 20))
        assert numbers_of(observer)["queries"] == 0
        assert layer.observer is observer.layers[0]


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"model": 3}, TypeError, "^model: expected a torch.nn.Module, got int$"),
        ({"model": nn.Linear(1, 1)}, ValueError, "^model: expected one with an NSAAttention, got Linear without$"),
        ({"parity_every": -1}, ValueError, "^parity_every: expected at least 0, got -1$"),
        ({"parity_every": 1.5}, TypeError, "^parity_every: expected an int, got 1.5 of type float$"),
        ({"parity_rows": 0}, ValueError, "^parity_rows: expected at least 1, got 0$"),
        ({"ranges": 1}, TypeError, "^ranges: expected a bool, got 1 of type int$"),
        ({"log_every": -1}, ValueError, "^log_every: expected at least 0, got -1$"),
        ({"log_seconds": "3s"}, TypeError, "^log_seconds: expected a number, got '3s' of type str$"),
        ({"clock": 3}, TypeError, "^clock: expected a function, got int$"),
    ],
)
def test_arguments_that_do_not_fit(wrong: dict, error: type[Exception], message: str, make_layer: Callable) -> None:
    layer = make_layer()
    arguments = {"model": layer} | wrong
    with pytest.raises(error, match=message):
        observe(arguments.pop("model"), **arguments)
    assert layer.observer is None


def test_a_wrong_flag_is_said_at_once(make_layer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_LOG_EVERY", "often")
    with pytest.raises(ValueError, match=r"^NSA_LOG_EVERY: expected times"):
        observe(make_layer())


# --- whatever happens, numbers are numbers

STEPS = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), max_size=5)


@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@torch.no_grad()
def test_an_observer_follows_its_layer(moved: bool, make_config: Callable) -> None:
    """From another device, where it was observed before it was there."""
    layer = NSAAttention(make_config())
    state = layer.state_dict()
    if moved:
        layer = layer.to("meta")
    with observe(layer) as observer:
        layer.to_empty(device="cpu").load_state_dict({name: torch.randn_like(x) for name, x in state.items()})
        layer(torch.randn(1, 30, HIDDEN))
        numbers = observer.snapshot()
    assert numbers["layer.0.queries"] == 30
    assert numbers["layer.0.route.compress_mean"] == "sdpa"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 40), min_size=2, max_size=2), steps=STEPS, poison=st.booleans())
@torch.no_grad()
def test_every_number_is_finite(
    lengths: list[int], steps: list[list[int]], poison: bool, make_layer: Callable, make_cache: Callable
) -> None:
    layer = make_layer()
    cache = make_cache(layer.config, 2)
    with observe(layer, parity_every=2) as observer:
        x = tokens(sum(lengths))
        if poison and len(x):
            x[0] = torch.inf
        layer(x, layout=VarlenLayout.from_lengths(lengths), cache=cache)
        for counts in steps:
            step(layer, cache, tokens(2, max(1, *counts)), counts)
        for name, value in observer.snapshot().items():
            assert isinstance(value, str) or (type(value) in (int, float) and math.isfinite(value)), name
        assert numbers_of(observer)["queries"] == sum(cache.lengths)


# --- graphs: without a GPU, their Python


@torch.no_grad()
def test_steps_that_a_graph_is_made_of_are_no_steps(
    make_layer: Callable, make_cache: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, other = make_layer(), make_layer()
    cache = make_cache(layer.config, 1)
    with observe(layer, parity_every=1) as observer, observe(other):
        with making_a_graph() as found:
            for _ in range(3):
                step(layer, cache, tokens(1, 1), [0])  # warm-ups
            assert found == []
            monkeypatch.setattr(layer_observer, "capturing", lambda device: True)
            step(layer, cache, tokens(1, 1), [1])
        assert [recorded.observer for recorded in found] == [observer.layers[0]]
        nothing = {"steps": 0, "queries": 0, "nonfinite": 0, "parity_steps": 0}
        assert numbers_of(observer) == nothing
        found[0].count()  # as behind a replay
        assert {**nothing, "steps": 1, "queries": 1}.items() <= numbers_of(observer).items()


class Graph:
    """A graph that only counts its replays."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@torch.no_grad()
def test_replays_are_counted_as_often_as_asked(
    make_layer: Callable, make_cache: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Graph] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    layer = make_layer()
    cache = make_cache(layer.config, 1)
    observer = observe(layer, every=5)
    with making_a_graph() as found, monkeypatch.context() as capture:
        step(layer, cache, tokens(1, 1), [0])
        capture.setattr(layer_observer, "capturing", lambda device: True)
        step(layer, cache, tokens(1, 1), [1])
    replays = decode_graph.ObservedReplays(found)
    counted = []
    for _ in range(12):
        before = made[0].replays
        replays.replayed()
        counted.append(made[0].replays - before)
    assert counted == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    observer.close()
    replays.replayed()
    assert made[0].replays == sum(counted)


@torch.no_grad()
def test_observers_of_one_graph_count_each_for_itself(
    make_layer: Callable, make_cache: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Graph] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    model = nn.ModuleList(make_layer() for _ in range(3))
    observers = [observe(model[:2], every=5), observe(model[2])]
    caches = [make_cache(layer.config, 1) for layer in model]
    with making_a_graph() as found, monkeypatch.context() as capture:
        for layer, cache in zip(model, caches, strict=True):
            step(layer, cache, tokens(1, 1), [0])
        capture.setattr(layer_observer, "capturing", lambda device: True)
        for layer, cache in zip(model, caches, strict=True):
            step(layer, cache, tokens(1, 1), [1])
    replays = decode_graph.ObservedReplays(found)
    for _ in range(10):
        replays.replayed()
    assert [graph.replays for graph in made] == [4, 10]
    observers[0].close()
    for _ in range(10):
        replays.replayed()
    assert [graph.replays for graph in made] == [4, 20]


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@torch.no_grad()
def test_of_so_many_steps_the_first_two_are_counted(every: int, make_layer: Callable, make_cache: Callable) -> None:
    layer = make_layer()
    cache = make_cache(layer.config, 1)
    with observe(layer, every=every) as observer:
        for _ in range(3):
            layer(tokens(1, 40)[:, :4])
        layer(tokens(1, 40), cache=cache)
        for _ in range(10):
            step(layer, cache, tokens(1, 1), [1])
        numbers = numbers_of(observer)
    prefills = [4, 4, 4, 40]
    of_prefills = [length for number, length in enumerate(prefills) if number % every < 2]
    of_steps = [number for number in range(10) if number % every < 2]
    assert numbers["queries"] == sum(of_prefills) + len(of_steps)
    assert numbers["steps"] == len(of_prefills) + len(of_steps)
    if every == 7:  # steps 0, 1, 7, 8: only 1 and 8 stand behind a step that was counted
        lengths = [length - 1 for length in of_prefills]
        assert observer.layers[0].statistics.state[1, SUMS.index("neighbours")] == 2 * (sum(lengths) + 2)


@torch.no_grad()
def test_lines_are_of_counted_steps(
    make_layer: Callable, make_cache: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nsa")
    layer = make_layer()
    cache = make_cache(layer.config, 1)
    with observe(layer, every=4, log_every=1):
        for _ in range(9):
            step(layer, cache, tokens(1, 1), [1])
    assert [message.split(" reads")[0] for message in caplog.messages] == [
        f"nsa decode layer=0 S={length}" for length in (1, 2, 5, 6, 9)
    ]


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield torch.device("cuda")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@torch.no_grad()
def test_nobody_waits_on_a_gpu(
    gpu: torch.device, fresh_routes: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prefill, chunk and decode steps, with parity and lines, under the debug mode that raises where a host waits."""
    monkeypatch.setenv("NSA_CHECK_FINITE", "flag")
    caplog.set_level("INFO", "nsa")
    config = NSAConfig(128, num_heads=8, num_kv_heads=2, head_dim=32, topk=4, window_size=96)
    layer = NSAAttention(config).to(gpu, torch.bfloat16)
    cache = NSACache(config, 2, 1024, device=gpu, dtype=torch.bfloat16)
    x = torch.randn(2, 300, 128, device=gpu, dtype=torch.bfloat16)
    with observe(layer, parity_every=2, log_every=1) as observer:
        for warm in (True, False):
            torch.cuda.set_sync_debug_mode("default" if warm else "error")
            layer(x)
            layer(x[:, :50], cache=cache)
            for _ in range(8):
                cache.reserve(1)
                layer.decode(x[:, :1], cache)
                cache.advance(1)
        torch.cuda.set_sync_debug_mode("default")
        numbers = numbers_of(observer)
        torch.cuda.synchronize()
        cache.reserve(1)
        layer.decode(x[:, :1], cache)
        cache.advance(1)
    assert numbers["queries"] == 2 * (600 + 100 + 16)
    assert numbers["parity_mae"] < 0.01
    assert numbers["parity_steps"] == 10
    assert any("nsa decode layer=0 S=" in message for message in caplog.messages)


@pytest.mark.gpu
@torch.no_grad()
def test_a_replay_counts_and_ticks(
    gpu: torch.device, fresh_routes: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NSA_CHECK_FINITE", "flag")
    caplog.set_level("INFO", "nsa")
    config = NSAConfig(128, num_heads=8, num_kv_heads=2, head_dim=32, topk=4, window_size=96)
    layer, other = (NSAAttention(config).to(gpu, torch.bfloat16) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    caches = [NSACache(config, 2, 1024, device=gpu, dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(2, 1, 128, device=gpu, dtype=torch.bfloat16)
    with observe(layer, log_every=4) as captured, observe(other) as plain:
        graph = nsa.DecodeGraph(lambda x, counts: layer.decode(x, caches[0], counts), [caches[0]], x)
        assert numbers_of(captured)["steps"] == 0
        torch.cuda.set_sync_debug_mode("error")
        for number in range(100):
            graph.replay(x, [1, number % 2])
            caches[1].reserve([1, number % 2])
            counts = torch.tensor([1, number % 2], dtype=torch.int32, pin_memory=True).to(gpu, non_blocking=True)
            other.decode(x, caches[1], counts)
            caches[1].advance([1, number % 2])
        torch.cuda.set_sync_debug_mode("default")
        got, expected = numbers_of(captured), numbers_of(plain)
        assert got["queries"] == 150
        assert_numbers(got, expected)
        torch.cuda.synchronize()
        before = len(caplog.messages)
        for _ in range(8):  # one of four is due, and its copy is there with the next
            graph.replay(x)
            torch.cuda.synchronize()
        assert len(caplog.messages) > before
    graph.replay(x)
    assert numbers_of(captured)["queries"] == 150 + 8 * 2, "closed: nobody counts"
