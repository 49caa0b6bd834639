"""Every ragged batch of short sequences: is a packed batch the concatenation of what each sequence gives alone?

A kind of sequence is (q_len, k_len), 0 <= q_len <= k_len <= 20: 231 of them. Each has random data of its own, twice
over, so that neighbours of one kind differ too, and what the oracle makes of it alone. A batch of any members must
then give their expected results and gradients one after the other. That checks offsets and isolation at once, without
a dense mask over the batch, so thousands of sequences fit in one call.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain, combinations_with_replacement, product
from typing import Any, NamedTuple

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, masks, pack, reference, unpack
from nsa_varlen.testing import BACKENDS, Inputs, Results, certified_inputs, rounding_bounds, run_ops
from torch import Tensor

LONGEST = 20
Kind = tuple[int, int]
KINDS = [(q_len, k_len) for k_len in range(LONGEST + 1) for q_len in range(k_len + 1)]


class Case(NamedTuple):
    """A geometry with the heads that it is tried on."""

    blocks: BlockGeometry
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int

    @property
    def sizes(self) -> dict[str, int]:
        """Heads as `random_inputs` takes them."""
        return {name: size for name, size in self._asdict().items() if name != "blocks"}


# l-d-l'-n-w, and the group size. Every one leaves blocks out at 20 tokens: a choice is made.
CASES = {
    "4-2-4-3-3-g2": Case(BlockGeometry(4, 2, 4, 3, 0, 2, 3), 4, 2, 4, 3),
    "2-2-6-3-7-g3": Case(BlockGeometry(2, 2, 6, 3, 1, 1, 7), 3, 1, 5, 1),
    "2-1-2-3-1-g1": Case(BlockGeometry(2, 1, 2, 3, 1, 1, 1), 1, 1, 3, 2),
    "4-2-8-2-5-g3": Case(BlockGeometry(4, 2, 8, 2, 0, 1, 5), 3, 1, 2, 5),
    "4-4-4-4-20-g2": Case(BlockGeometry(4, 4, 4, 4, 1, 2, 20), 2, 1, 6, 4),
}
FIRST_TIER = ("4-2-4-3-3-g2", "2-2-6-3-7-g3")
EVERY_CASE = [pytest.param(name, marks=() if name in FIRST_TIER else pytest.mark.slow) for name in CASES]
# Several query heads to a kv head, and two kv heads.
GROUPED = {
    name: case._replace(heads=2 * case.heads // case.kv_heads, kv_heads=2)
    for name, case in CASES.items()
    if case.heads > case.kv_heads
}
PER_HEAD = ("lse_cmp", "lse_slc", "lse_win")  # [Hq, Tq]; all else begins with the row


class Expected(NamedTuple):
    """Sequences with what must come out of them: gradients are those of q, k, v and gates for `grad_out`."""

    inputs: Inputs
    grad_out: Tensor
    results: Results
    gradients: Inputs


@pytest.fixture(params=[name for name in BACKENDS if name != "oracle"])
def backend(request: pytest.FixtureRequest) -> Any:
    return BACKENDS[request.param]


def forward_backward(
    backend: Any, inputs: Inputs, grad_out: Tensor, layout: VarlenLayout, blocks: BlockGeometry
) -> tuple[Results, Inputs]:
    leaves = inputs.leaves()
    results = run_ops(backend, leaves, layout, blocks)
    results.out.backward(grad_out)
    return Results(*(x.detach() for x in results)), Inputs(*(x.grad for x in leaves))


@cache
def alone(case: Case, kind: Kind, twin: int) -> Expected:
    """One sequence by the oracle, with inputs whose choices no rounding can change."""
    layout = VarlenLayout.from_lengths([kind[0]], [kind[1]])
    seed = 1000 * (2 * KINDS.index(kind) + twin)
    inputs, _ = certified_inputs(layout, case.blocks, first_seed=seed, **case.sizes)
    generator = torch.Generator().manual_seed(seed + 999)
    grad_out = torch.randn(kind[0], case.heads, case.v_head_dim, generator=generator, dtype=torch.float64)
    return Expected(inputs, grad_out, *forward_backward(reference, inputs, grad_out, layout, case.blocks))


def together(case: Case, kinds: Sequence[Kind]) -> tuple[VarlenLayout, Expected]:
    """The batch of these kinds, expected to be its members one after the other."""
    members = [alone(case, kind, place % 2) for place, kind in enumerate(kinds)]

    def joined(parts: Iterable[tuple[Tensor, ...]], names: Sequence[str]) -> list[Tensor]:
        columns = zip(names, zip(*parts, strict=True), strict=True)
        return [torch.cat(xs, -1 if name in PER_HEAD else 0) for name, xs in columns]

    layout = VarlenLayout.from_lengths([q_len for q_len, _ in kinds], [k_len for _, k_len in kinds])
    return layout, Expected(
        Inputs(*joined((m.inputs for m in members), Inputs._fields)),
        torch.cat([m.grad_out for m in members]),
        Results(*joined((m.results for m in members), Results._fields)),
        Inputs(*joined((m.gradients for m in members), Inputs._fields)),
    )


def check(backend: Any, case: Case, kinds: Sequence[Kind]) -> None:
    """One call of every operation and one backward over the batch of these kinds."""
    layout, expected = together(case, kinds)
    bounds = rounding_bounds(expected.inputs, expected.grad_out, layout, case.blocks)
    results, gradients = forward_backward(backend, expected.inputs, expected.grad_out, layout, case.blocks)
    note = f"(q_len, k_len) {list(kinds[:4])}{'...' if len(kinds) > 4 else ''}"
    assert torch.equal(results.block_indices, expected.results.block_indices), f"block_indices of {note}"
    for name, got, wanted in zip(Results._fields, results, expected.results, strict=True):
        close(got, wanted, bounds.lse if name in PER_HEAD else bounds.values, f"{name} of {note}")
    for name, got, wanted in zip(Inputs._fields, gradients, expected.gradients, strict=True):
        close(got, wanted, bounds.gradients, f"gradient of {name} of {note}")


def close(got: Tensor, wanted: Tensor, atol: float, note: str) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=atol, msg=lambda m: f"{note}: {m}")


def pair_kinds(first: int, second: int) -> list[Kind]:
    """Lengths of two sequences' keys to kinds: a fixed rule that gives either place every kind, over all pairs."""
    return [(second % (first + 1), first), (first % (second + 1), second)]


PAIRS = [pair_kinds(*lengths) for lengths in product(range(LONGEST + 1), repeat=2)]


def multiset_kinds(number: int, lengths: tuple[int, ...]) -> list[Kind]:
    """The `number`-th multiset's kinds: prefill, decode and what lies between in turn, from a turning first place."""
    kinds = []
    for place, k_len in enumerate(lengths):
        q_lens = (k_len, min(1, k_len), (number // 3 + place) % (k_len + 1))
        kinds.append((q_lens[(number + place) % 3], k_len))
    turn = number % len(kinds)
    return kinds[turn:] + kinds[:turn]


MULTISETS = [
    multiset_kinds(number, lengths)
    for number, lengths in enumerate(
        chain.from_iterable(combinations_with_replacement(range(LONGEST + 1), size) for size in range(1, 5))
    )
]
SAMPLE = MULTISETS[::61]


def test_the_rules_reach_every_kind() -> None:
    assert len(KINDS) == 231
    assert len(PAIRS) == 21 * 21
    assert {first for first, _ in PAIRS} == {second for _, second in PAIRS} == set(KINDS)
    assert len(MULTISETS) == 12_649
    assert len({tuple(sorted(k_len for _, k_len in kinds)) for kinds in MULTISETS}) == len(MULTISETS)
    assert set(chain(*MULTISETS)) == set(KINDS)
    sampled = set(chain(*SAMPLE))
    for k_len in range(1, LONGEST + 1):
        assert {(k_len, k_len), (1, k_len)} <= sampled
        assert any(1 < q_len < k_len for q_len, k in sampled if k == k_len) or k_len < 3


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_a_choice_to_make(name: str) -> None:
    """At least one block, not forced, is left out and one is taken."""
    blocks = CASES[name].blocks
    candidate, forced = masks.candidate_blocks(VarlenLayout.from_lengths([1], [LONGEST]), blocks)
    assert int(forced.sum()) < blocks.topk < int(candidate.sum())


@pytest.mark.parametrize("name", EVERY_CASE)
def test_every_kind_in_a_call_of_its_own(backend: Any, name: str) -> None:
    for kind in KINDS:
        check(backend, CASES[name], [kind])


@pytest.mark.parametrize("name", EVERY_CASE)
def test_every_pair_of_lengths_many_to_a_call(backend: Any, name: str) -> None:
    for start in range(0, len(PAIRS), 63):
        check(backend, CASES[name], list(chain(*PAIRS[start : start + 63])))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_pair_of_lengths_in_a_call_of_its_own(backend: Any, name: str) -> None:
    for kinds in PAIRS:
        check(backend, CASES[name], kinds)


@pytest.mark.parametrize("name", FIRST_TIER)
def test_every_61st_multiset_of_lengths(backend: Any, name: str) -> None:
    check(backend, CASES[name], list(chain(*SAMPLE)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_multiset_of_up_to_four_lengths(backend: Any, name: str) -> None:
    for start in range(0, len(MULTISETS), 256):
        check(backend, CASES[name], list(chain(*MULTISETS[start : start + 256])))


PADDINGS = ("left", "right", "interior")


def padding_mask(kind: str, lengths: list[int], seed: int) -> Tensor:
    """Where tokens are real: every row has at least two places of padding."""
    width = max(lengths) + 2
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for row, length in zip(mask, lengths, strict=True):
        scattered = torch.randperm(width, generator=generator)
        places = {"left": torch.arange(width - length, width), "right": torch.arange(length), "interior": scattered}
        row[places[kind][:length]] = True
    return mask


def padded(x: Tensor, mask: Tensor, fill: float = torch.nan) -> Tensor:
    """Packed rows at the real places of a batch [B, S, ...], `fill` elsewhere."""
    batch = x.new_full((*mask.shape, *x.shape[1:]), fill)
    batch[mask] = x
    return batch


def check_padded(backend: Any, case: Case, kinds: list[Kind], padding: str, seed: int) -> None:
    """The same members as padded batches, one of queries and one of keys; what padding holds is NaN."""
    layout, expected = together(case, kinds)
    bounds = rounding_bounds(expected.inputs, expected.grad_out, layout, case.blocks)
    lengths = zip(*kinds, strict=True)
    q_mask, k_mask = (padding_mask(padding, list(side), seed + number) for number, side in enumerate(lengths))
    sides = Inputs(q_mask, k_mask, k_mask, q_mask)
    leaves = Inputs(*(padded(x, mask).requires_grad_() for x, mask in zip(expected.inputs, sides, strict=True)))
    packed, layouts, pad_indices = zip(*(pack(x, mask) for x, mask in zip(leaves, sides, strict=True)), strict=True)
    layout = VarlenLayout.from_cu_seqlens(layouts[0].cu_seqlens_q, layouts[1].cu_seqlens_q)
    results = run_ops(backend, Inputs(*packed), layout, case.blocks)
    assert torch.equal(results.block_indices, expected.results.block_indices)
    out = unpack(results.out, pad_indices[0])
    close(out.detach(), padded(expected.results.out, q_mask, 0.0), bounds.values, f"{padding} {kinds}")
    assert not out[~q_mask].any()
    out.backward(padded(expected.grad_out, q_mask))
    for name, leaf, wanted, mask in zip(Inputs._fields, leaves, expected.gradients, sides, strict=True):
        close(leaf.grad[mask], wanted, bounds.gradients, f"gradient of {name} of {padding} {kinds}")
        assert not leaf.grad[~mask].any(), f"gradient of {name} in the padding of {padding} {kinds}"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", FIRST_TIER)
def test_padding_anywhere_has_no_influence(backend: Any, name: str, padding: str) -> None:
    for seed, kinds in enumerate(SAMPLE[::8]):
        check_padded(backend, CASES[name], kinds, padding, 2 * seed)
    check_padded(backend, CASES[name], list(chain(*SAMPLE[::4])), padding, 1)


@pytest.mark.slow
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CASES)
def test_padding_anywhere_has_no_influence_on_every_61st_multiset(backend: Any, name: str, padding: str) -> None:
    for seed, kinds in enumerate(SAMPLE):
        check_padded(backend, CASES[name], kinds, padding, 2 * seed)


def grouped_batch(case: Case) -> tuple[VarlenLayout, Inputs, Tensor]:
    """Some hundreds of rows with their certified indices."""
    layout, expected = together(case, list(chain(*SAMPLE[::10])))
    assert len(expected.results.block_indices) > 100
    return layout, expected.inputs, expected.results.block_indices


def choose(backend: Any, case: Case, layout: VarlenLayout, q: Tensor, k: Tensor, order: Tensor | None = None) -> Tensor:
    """Block indices; with `order`, heads of q and of the LSE alike are permuted before the choice."""
    k_cmp = backend.compress_mean(k, layout, case.blocks)
    _, lse = backend.compressed_attention(q, k_cmp, k_cmp, layout, case.blocks)
    order = torch.arange(case.heads) if order is None else order
    return backend.select_blocks(q[:, order], k_cmp, lse[order], layout, case.blocks)


@pytest.mark.parametrize("name", GROUPED)
def test_the_order_of_heads_in_a_group_changes_no_choice(backend: Any, name: str) -> None:
    case = GROUPED[name]
    layout, inputs, expected = grouped_batch(case)
    group = case.heads // case.kv_heads
    within = torch.arange(case.heads).unflatten(0, (case.kv_heads, group))
    for shift in range(group):
        order = within.roll(shift, 1).flatten()
        assert torch.equal(choose(backend, case, layout, inputs.q, inputs.k, order), expected)


def ranked(score: list[float], position: int, blocks: BlockGeometry) -> list[int]:
    """Eq. 11 for one query by sorting: the forced blocks, then the highest scores."""
    current = position // blocks.block_size
    candidates = sorted(
        range(current + 1),
        key=lambda j: (not (j < blocks.init_blocks or j > current - blocks.local_blocks), -score[j], j),
    )
    chosen = sorted(candidates[: blocks.topk])
    return chosen + [-1] * (blocks.topk - len(chosen))


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_chooses_by_the_sum_of_its_heads_scores(backend: Any, name: str) -> None:
    """Eq. 10, each head scored alone by the oracle."""
    case = GROUPED[name]
    layout, inputs, _ = grouped_batch(case)
    k_cmp = reference.compress_mean(inputs.k, layout, case.blocks)
    chosen = choose(backend, case, layout, inputs.q, inputs.k)
    for kv_head, heads in enumerate(torch.arange(case.heads).chunk(case.kv_heads)):
        keys = k_cmp[:, kv_head : kv_head + 1]
        total = torch.zeros(())
        for head in heads.tolist():
            q = inputs.q[:, head : head + 1]
            _, lse = reference.compressed_attention(q, keys, keys, layout, case.blocks)
            total = total + reference.block_scores(q, keys, lse, layout, case.blocks)[:, 0]
        rows = zip(total.tolist(), layout.positions().tolist(), strict=True)
        assert chosen[:, kv_head].tolist() == [ranked(score, position, case.blocks) for score, position in rows]


@pytest.mark.parametrize("name", GROUPED)
def test_groups_choose_without_one_another(backend: Any, name: str) -> None:
    case = GROUPED[name]
    layout, inputs, expected = grouped_batch(case)
    heads = torch.arange(case.heads) // (case.heads // case.kv_heads)
    for kv_head in range(case.kv_heads):
        edited = torch.where((heads == kv_head)[:, None], -3 * inputs.q, inputs.q)
        chosen = choose(backend, case, layout, edited, inputs.k)
        others = [head for head in range(case.kv_heads) if head != kv_head]
        assert torch.equal(chosen[:, others], expected[:, others])
        assert not torch.equal(chosen[:, kv_head], expected[:, kv_head])
