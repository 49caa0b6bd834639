"""Random ragged batches of up to 300 tokens a sequence: what must hold for any lengths, geometry and heads.

Bits are compared between two runs of one layout. Two batches of other shapes may round differently: their values lie
within `rounding_bounds`, and their choices agree unless scores are nearly tied.
"""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.testing import (
    BACKENDS,
    Bounds,
    Inputs,
    Results,
    random_inputs,
    rounding_bounds,
    run_ops,
    selection_margin,
)
from torch import Tensor

NAMES = [name for name in BACKENDS if name != "oracle"]
LONGEST = 300
PER_HEAD = ("lse_cmp", "lse_slc", "lse_win")  # [Hq, Tq]
PER_QUERY = ("o_cmp", "block_indices", "o_slc", "o_win", "out")  # [Tq, ...]; k_cmp, v_cmp have a row per block


class Problem(NamedTuple):
    """A batch: (q_len, k_len) of each sequence, geometry, heads, packed inputs and a gradient of the output."""

    lengths: list[tuple[int, int]]
    blocks: BlockGeometry
    inputs: Inputs
    grad_out: Tensor

    @property
    def layout(self) -> VarlenLayout:
        return VarlenLayout.from_lengths([q for q, _ in self.lengths], [k for _, k in self.lengths])

    @property
    def bounds(self) -> Bounds:
        return rounding_bounds(self.inputs, self.grad_out, self.layout, self.blocks)

    def sequences(self) -> "list[Problem]":
        """Each sequence as a batch of its own."""
        q_lens, k_lens = ([length[side] for length in self.lengths] for side in range(2))
        sides = (q_lens, k_lens, k_lens, q_lens)
        split = zip(*(x.split(side) for x, side in zip(self.inputs, sides, strict=True)), strict=True)
        parts = zip(self.lengths, split, self.grad_out.split(q_lens), strict=True)
        return [Problem([length], self.blocks, Inputs(*xs), grad) for length, xs, grad in parts]


def join(parts: list[Problem]) -> Problem:
    """Batches of one geometry, one after the other."""
    inputs = Inputs(*(torch.cat(xs) for xs in zip(*(part.inputs for part in parts), strict=True)))
    lengths = [length for part in parts for length in part.lengths]
    return Problem(lengths, parts[0].blocks, inputs, torch.cat([part.grad_out for part in parts]))


@st.composite
def sequence_lengths(draw: st.DrawFn) -> tuple[int, int]:
    """(q_len, k_len) of a whole prefill, a decode step or a chunk after a prefix."""
    k_len = draw(st.integers(0, LONGEST))
    q_len = {"prefill": k_len, "decode": min(1, k_len), "chunk": draw(st.integers(0, k_len))}
    return q_len[draw(st.sampled_from(sorted(q_len)))], k_len


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    stride, width = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    init, local, free = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 6))
    block, window = draw(st.integers(width, 6)), draw(st.integers(1, LONGEST + 20))
    blocks = BlockGeometry(width * stride, stride, block * stride, init + local + free, init, local, window)
    lengths = draw(st.lists(sequence_lengths(), min_size=1, max_size=6))
    layout = VarlenLayout.from_lengths([q for q, _ in lengths], [k for _, k in lengths])
    kv_heads, v_head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    heads = kv_heads * draw(st.integers(1, 5))
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": draw(st.integers(1, 17)), "v_head_dim": v_head_dim}
    seed = draw(st.integers(0, 1 << 20))
    grad_out = torch.randn(
        layout.total_q, heads, v_head_dim, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    return Problem(lengths, blocks, random_inputs(layout, seed=seed, **sizes), grad_out)


def forward_backward(backend: Any, problem: Problem, indices: Tensor | None = None) -> tuple[Results, Inputs]:
    leaves = problem.inputs.leaves()
    results = run_ops(backend, leaves, problem.layout, problem.blocks, block_indices=indices)
    results.out.backward(problem.grad_out)
    return Results(*(x.detach() for x in results)), Inputs(*(x.grad for x in leaves))


def close(got: Tensor, wanted: Tensor, atol: float, name: str) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_sound_choice(chosen: Tensor, exact: Tensor, alone: Problem) -> None:
    """`chosen` is the oracle's choice `exact`, or on a near-tie one whose scores have the same sum within the error."""
    (q, k, _, _), layout, blocks = alone.inputs, alone.layout, alone.blocks
    k_cmp = reference.compress_mean(k, layout, blocks)
    margin, error = selection_margin(q, k_cmp, layout, blocks)
    safe = margin > 2 * error
    assert torch.equal(chosen[safe], exact[safe])
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, layout, blocks)
    score = torch.nn.functional.pad(reference.block_scores(q, k_cmp, lse, layout, blocks), (0, 1))  # -1: nothing

    def listed(indices: Tensor) -> Tensor:
        member = torch.zeros_like(score, dtype=torch.bool)
        return member.scatter_(-1, torch.where(indices < 0, score.shape[-1] - 1, indices).long(), True)[..., :-1]

    candidate, forced = (mask[:, None] for mask in masks.candidate_blocks(layout, blocks))
    assert not (listed(chosen) & ~candidate).any()
    assert (listed(chosen) | ~forced).all()
    assert torch.equal((chosen >= 0).sum(-1), (exact >= 0).sum(-1))
    # A block is preferred to a better one only if both scores' errors close the gap: 2 errors for each exchange.
    lost = ((listed(exact).double() - listed(chosen).double()) * score[..., :-1]).sum(-1)
    # The sum in fp64: 11 scores of at most G * l/d = 20 each, 11 additions of up to 220 * 2^-53.
    assert (lost <= 2 * blocks.topk * error + 3e-13).all()


def check_each_alone(backend: Any, problem: Problem) -> None:
    """The backend over the batch gives what the oracle gives each sequence alone."""
    parts, layout = problem.sequences(), problem.layout
    exact = [forward_backward(reference, part) for part in parts]
    own = run_ops(backend, problem.inputs, layout, problem.blocks).block_indices
    q_lens = [q_len for q_len, _ in problem.lengths]
    for chosen, (results, _), part in zip(own.split(q_lens), exact, parts, strict=True):
        assert_sound_choice(chosen, results.block_indices, part)
    indices = torch.cat([results.block_indices for results, _ in exact])
    got, gradients = forward_backward(backend, problem, indices)
    bounds = problem.bounds
    for name, *columns in zip(Results._fields, got, *(results for results, _ in exact), strict=True):
        wanted = torch.cat(columns[1:], -1 if name in PER_HEAD else 0)
        close(columns[0], wanted, bounds.lse if name in PER_HEAD else bounds.values, name)
    for name, *columns in zip(Inputs._fields, gradients, *(gradient for _, gradient in exact), strict=True):
        close(columns[0], torch.cat(columns[1:]), bounds.gradients, f"gradient of {name}")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(problem=problems())
def test_a_packed_batch_is_each_sequence_alone(name: str, problem: Problem) -> None:
    check_each_alone(BACKENDS[name], problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(problem=problems())
def test_a_packed_batch_is_each_sequence_alone_at_length(name: str, problem: Problem) -> None:
    check_each_alone(BACKENDS[name], problem)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(problem=problems(), data=st.data())
def test_permuting_the_sequences_permutes_the_results(name: str, problem: Problem, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(problem.lengths))))
    q_lens = [q_len for q_len, _ in problem.lengths]
    k_lens = [k_len for _, k_len in problem.lengths]
    rows = torch.cat([torch.arange(problem.layout.total_q).split(q_lens)[place] for place in order])
    keys = torch.cat([torch.arange(problem.layout.total_k).split(k_lens)[place] for place in order])
    parts = problem.sequences()
    permuted = join([parts[place] for place in order])
    before, gradients_before = forward_backward(BACKENDS[name], problem)
    own = run_ops(BACKENDS[name], permuted.inputs, permuted.layout, problem.blocks).block_indices
    for chosen, expected, part in zip(
        own.split([q_lens[place] for place in order]),
        (before.block_indices.split(q_lens)[place] for place in order),
        (parts[place] for place in order),
        strict=True,
    ):
        k_cmp = reference.compress_mean(part.inputs.k, part.layout, part.blocks)
        margin, error = selection_margin(part.inputs.q, k_cmp, part.layout, part.blocks)
        safe = margin > 2 * error
        assert torch.equal(chosen[safe], expected[safe])
    after, gradients = forward_backward(BACKENDS[name], permuted, before.block_indices[rows])
    bounds = problem.bounds
    for field in PER_QUERY:
        close(getattr(after, field), getattr(before, field)[rows], bounds.values, field)
    for field in PER_HEAD:
        close(getattr(after, field), getattr(before, field)[:, rows], bounds.lse, field)
    for field, places in zip(Inputs._fields, (rows, keys, keys, rows), strict=True):
        close(getattr(gradients, field), getattr(gradients_before, field)[places], bounds.gradients, field)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(problem=problems(), data=st.data())
def test_editing_a_sequence_changes_no_bit_of_another(name: str, problem: Problem, data: st.DataObject) -> None:
    edited = data.draw(st.integers(0, len(problem.lengths) - 1))
    parts = problem.sequences()
    parts[edited] = parts[edited]._replace(
        inputs=Inputs(*(-7 * x + 1 for x in parts[edited].inputs)), grad_out=5 * parts[edited].grad_out
    )
    changed, layout = join(parts), problem.layout
    before, after = (forward_backward(BACKENDS[name], either) for either in (problem, changed))
    others = layout.sequence_of_queries() != edited
    for field in PER_QUERY:
        assert torch.equal(getattr(after[0], field)[others], getattr(before[0], field)[others]), field
    for field in PER_HEAD:
        assert torch.equal(getattr(after[0], field)[:, others], getattr(before[0], field)[:, others]), field
    other_keys = layout.sequence_of_keys() != edited
    for field, places in zip(Inputs._fields, (others, other_keys, other_keys, others), strict=True):
        assert torch.equal(getattr(after[1], field)[places], getattr(before[1], field)[places]), f"gradient of {field}"


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(problem=problems(), data=st.data())
def test_tokens_after_a_position_change_nothing_up_to_it(name: str, problem: Problem, data: st.DataObject) -> None:
    """In one sequence of the batch. Choices keep their bits; a matmul with fewer later rows may round otherwise."""
    edited = data.draw(st.integers(0, len(problem.lengths) - 1))
    last_kept = data.draw(st.integers(-1, problem.lengths[edited][1]))
    layout = problem.layout
    later_q = (layout.sequence_of_queries() == edited) & (layout.positions() > last_kept)
    later_k = (layout.sequence_of_keys() == edited) & (layout.key_positions() > last_kept)
    later = (later_q, later_k, later_k, later_q)
    inputs = Inputs(
        *(torch.where(places[:, None, None], 30 * x - 5, x) for x, places in zip(problem.inputs, later, strict=True))
    )
    before = run_ops(BACKENDS[name], problem.inputs, layout, problem.blocks)
    after = run_ops(BACKENDS[name], inputs, layout, problem.blocks)
    bounds = problem.bounds
    assert torch.equal(after.block_indices[~later_q], before.block_indices[~later_q])
    for field in PER_QUERY:
        close(getattr(after, field)[~later_q], getattr(before, field)[~later_q], bounds.values, field)
    for field in PER_HEAD:
        close(getattr(after, field)[:, ~later_q], getattr(before, field)[:, ~later_q], bounds.lse, field)
    if later_q.any():
        assert not torch.equal(after.o_win[later_q], before.o_win[later_q])
