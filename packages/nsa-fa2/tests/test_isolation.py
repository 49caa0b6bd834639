"""Does what nobody sees stay out, even if it is NaN, infinite or the largest number?

Promised is: no row of another sequence is in a product with a query's; selected attention keeps to the keys that it
lists. Within a sequence, a kernel may multiply rows that its mask hides by a weight of 0.
"""

import pytest
import torch
from nsa_fa2 import attention, selected
from nsa_fa2.gathering import ByBlock, ByRow
from nsa_fa2.testing import Case, plain_backend
from nsa_varlen import BlockGeometry, VarlenLayout, masks
from nsa_varlen.testing import poisoned_empty
from torch import Tensor

CMP, SLC, WIN = OPS = ["compressed_attention", "selected_attention", "window_attention"]
BLOCKS = BlockGeometry(6, 3, 6, 3, window_size=8)
# Queries and keys of each sequence, and the sequences that are poisoned, one at a time.
BATCHES = {
    "ragged": ([5, 0, 9, 1, 2, 4, 3], [5, 16, 9, 21, 0, 17, 1], [0, 5]),
    "uniform": ([4] * 3, [14] * 3, [0, 2]),
    "decode": ([1] * 5, [9, 30, 12, 3, 31], [1, 4]),
    "decode-uniform": ([1] * 3, [20] * 3, [0, 2]),
}
POISON = [torch.nan, -torch.inf, torch.finfo(torch.float64).max]


@pytest.fixture(params=["many-calls-by-row", "few-calls-by-block"])
def _every_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of selected blocks there are two ways to gather them."""
    gather = ByBlock
    if request.param == "many-calls-by-row":
        gather = ByRow
        monkeypatch.setattr(attention, "WORKSPACE", 60_000)
    monkeypatch.setattr(selected, "gatherer", lambda k, v, block_indices, *rest: gather(k, v, *rest))


def results(case: Case) -> dict[str, Tensor]:
    """By name, one row a query or key."""
    with poisoned_empty():
        got = case.run(plain_backend())
    return got | {"lse": got["lse"].T}


def offsets(case: Case, name: str) -> Tensor:
    layout = case.rest[-2]
    if name not in ("k", "v", "dk", "dv"):
        return layout.cu_seqlens_q
    return layout.compressed(BLOCKS).cu_seqlens if case.op == CMP else layout.cu_seqlens_k


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", BATCHES)
def test_what_a_sequence_holds_changes_no_bit_of_another(batch: str, op: str) -> None:
    q_lens, k_lens, victims = BATCHES[batch]
    case = Case.random(op, VarlenLayout.from_lengths(q_lens, k_lens), BLOCKS)
    clean, changed = results(case), 0
    assert all(x.isfinite().all() for name, x in clean.items() if name != "lse")
    for victim in victims:
        for value in POISON:
            for name in ("q", "k", "v", "grad_out"):
                poisoned = getattr(case, name).clone()
                poisoned[slice(*offsets(case, name)[victim : victim + 2].tolist())] = value
                for result, x in results(case._replace(**{name: poisoned})).items():
                    own = slice(*offsets(case, result)[victim : victim + 2].tolist())
                    others = torch.ones(len(x), dtype=torch.bool)
                    others[own] = False
                    assert torch.equal(x[others], clean[result][others]), (name, value, result)
                    changed += not torch.equal(x[own], clean[result][own])
    assert changed > 0


@pytest.mark.usefixtures("_every_way")
@pytest.mark.parametrize("batch", BATCHES)
def test_selected_attention_does_not_read_what_it_does_not_list(batch: str) -> None:
    """Later keys of the query's own block least of all: they are poisoned where no query of the sequence sees them."""
    q_lens, k_lens, _ = BATCHES[batch]
    layout = VarlenLayout.from_lengths(q_lens, k_lens)
    case = Case.random(SLC, layout, BLOCKS, entries=2)
    visible = masks.selected_mask(case.rest[0], layout, BLOCKS).any(0)  # [Hk, Tk]
    assert not visible.all()
    clean = results(case)
    for value in POISON:
        for name in ("k", "v"):
            poisoned = torch.where(visible.T[..., None], getattr(case, name), value)
            for result, x in results(case._replace(**{name: poisoned})).items():
                assert torch.equal(x, clean[result]), (name, value, result)
    for result in ("dk", "dv"):
        assert not clean[result][~visible.T].any()


def test_selected_attention_hides_its_own_blocks_future_from_each_query() -> None:
    """The query at position t, whose block goes on: what it gives and its own gradient do not depend on later keys."""
    layout = VarlenLayout.from_lengths([12])
    indices = torch.tensor([1, 0], dtype=torch.int32).expand(12, 2, 2)
    case = Case.random(SLC, layout, BLOCKS, block_indices=indices)
    clean = results(case)
    for position in range(11):
        for name in ("k", "v"):
            poisoned = getattr(case, name).clone()
            poisoned[position + 1 :] = torch.nan
            got = results(case._replace(**{name: poisoned}))
            for result in ("out", "lse", "dq"):
                assert torch.equal(got[result][: position + 1], clean[result][: position + 1]), (name, position)
                assert got[result][position + 1 :].isnan().any() or (name, result) == ("v", "lse")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "lengths",
    [([], []), ([0], [0]), ([0, 0], [9, 30]), ([2, 3], [0, 0]), ([4], [0]), ([9, 1], [5, 1])],
    ids=["no-sequence", "nothing", "no-queries", "no-keys", "one-without-keys", "few-keys"],
)
def test_batches_without_anything_to_see(lengths: tuple[list[int], list[int]], op: str) -> None:
    case = Case.random(op, VarlenLayout.from_lengths(*lengths), BLOCKS, v_head_dim=5)
    case.assert_oracles(plain_backend())
    got = results(case)
    blind = got["lse"].isinf().all(1)
    assert (got["lse"][blind] == -torch.inf).all()
    assert not got["out"][blind].any()
    assert not got["dq"][blind].any()
    assert blind.all() or lengths == ([9, 1], [5, 1])


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_a_row_that_sees_nothing_goes_nowhere(op: str) -> None:
    """Not even NaN where a kernel has no such rows; of a window they are rows beside the others."""
    layout = VarlenLayout.from_lengths([9, 20, 3], [4, 17, 0])
    case = Case.random(op, layout, BLOCKS, block_indices=blocks_of_own(layout) if op == SLC else None)
    clean = results(case)
    blind = clean["lse"].isinf().all(1)
    assert 0 < blind.sum() < len(blind)
    for value in [1e30] if op == WIN else POISON:
        grad_out = torch.where(blind[:, None, None], value, case.grad_out)
        for name, x in results(case._replace(grad_out=grad_out)).items():
            assert torch.equal(x, clean[name]), (name, value)


def blocks_of_own(layout: VarlenLayout) -> Tensor:
    return (layout.positions() // BLOCKS.block_size).int()[:, None, None].expand(-1, 2, 1)
