"""Do keys and values in pages give the bits that packed ones give, with nothing read that no query reaches?"""

from itertools import product

import pytest
import torch
from nsa_fa2 import selected
from nsa_fa2.gathering import ByBlock, ByRow
from nsa_fa2.testing import Case, plain_backend
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import poisoned_empty, to_pages
from torch import Tensor

CMP, SLC, WIN = OPS = ["compressed_attention", "selected_attention", "window_attention"]
BLOCKS = BlockGeometry(6, 3, 6, 3, window_size=8)
BATCHES = {
    "prefill": ([29], [29]),
    "chunk": ([5], [31]),
    "uniform": ([3] * 4, [27] * 4),
    "ragged": ([9, 0, 20, 1, 4, 11, 5], [9, 6, 20, 30, 0, 31, 2]),
    "decode": ([1] * 5, [9, 30, 12, 3, 31]),
    "no-keys": ([2, 1], [0, 0]),
    "no-sequence": ([], []),
}


@pytest.fixture(params=[ByRow, ByBlock], ids=["by-row", "by-block"])
def _gathered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of selected blocks there are two ways to gather them."""
    monkeypatch.setattr(selected, "gatherer", lambda k, v, block_indices, *rest: request.param(k, v, *rest))


def case_of(op: str, batch: str) -> Case:
    return Case.random(op, VarlenLayout.from_lengths(*BATCHES[batch]), BLOCKS, v_head_dim=5)


def rows_of(case: Case) -> list[int]:
    layout = case.rest[-2]
    offsets = layout.compressed(BLOCKS).cu_seqlens if case.op == CMP else layout.cu_seqlens_k
    return offsets.diff().tolist()


def ask(case: Case, k: Tensor | PagedKV, v: Tensor | PagedKV, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with poisoned_empty():
        return getattr(plain_backend(), case.op)(case.q if q is None else q, k, v, *case.rest)


def assert_equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("_gathered")
@pytest.mark.parametrize("op", [CMP, SLC])
@pytest.mark.parametrize("batch", BATCHES)
def test_pages_give_the_bits_of_packed_rows(batch: str, op: str) -> None:
    """Shuffled pages, NaN where no row is; keys or values alone too."""
    case = case_of(op, batch)
    lengths = rows_of(case)
    expected = ask(case, case.k, case.v)
    for size in (1, 4, 64):
        paged = [to_pages(x, lengths, size, seed=seed) for seed, x in enumerate((case.k, case.v))]
        for k, v in list(product(*zip((case.k, case.v), paged, strict=True)))[1:]:
            assert_equal(ask(case, k, v), expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_pages_of_a_window_give_the_bits_of_packed_rows_that_it_reaches(batch: str) -> None:
    """The last q_len + w - 1 of each sequence, as a batch of their own: another number of keys may round otherwise."""
    case = case_of(WIN, batch)
    layout = case.rest[-2]
    q_lens, k_lens = (x.diff().tolist() for x in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    kept = [min(k_len, q_len + 7) for q_len, k_len in zip(q_lens, k_lens, strict=True)]
    ends = layout.cu_seqlens_k[1:].tolist()
    k, v = (
        torch.cat([x[:0], *(x[end - size : end] for end, size in zip(ends, kept, strict=True))])
        for x in (case.k, case.v)
    )
    reached = case._replace(k=k, v=v, rest=(VarlenLayout.from_lengths(q_lens, kept), BLOCKS))
    expected = ask(reached, k, v)
    case.assert_close(dict(zip(("out", "lse"), expected, strict=True)), case.run(plain_backend()))
    for size in (1, 4, 64):
        paged = [to_pages(x, k_lens, size, seed=seed) for seed, x in enumerate((case.k, case.v))]
        for k, v in list(product(*zip((case.k, case.v), paged, strict=True)))[1:]:
            assert_equal(ask(case, k, v), expected)


@pytest.mark.parametrize("batch", ["prefill", "chunk", "uniform", "ragged", "decode"])
def test_a_window_reads_the_pages_that_it_reaches_and_no_others(batch: str) -> None:
    """The others are missing in the table: as a cache frees them. Where they were is NaN."""
    case = case_of(WIN, batch)
    layout, size = case.rest[-2], 4
    q_lens, k_lens = (x.diff().tolist() for x in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    paged, lost = [], 0
    for x in (case.k, case.v):
        kv = to_pages(x, k_lens, size)
        pages, table = kv.pages.clone(), kv.block_table.clone()
        for sequence, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
            first = max(0, k_len - q_len - 7) // size if q_len else table.shape[1]
            for page in table[sequence, :first]:
                if page >= 0:
                    pages[page] = torch.nan
                    lost += 1
        left = [PagedKV(pages, table, kv.lengths)]
        hidden = table.clone()
        hidden[torch.isnan(pages[table.clamp_min(0)]).all((-1, -2)).all(-1)] = -1
        paged.append([*left, PagedKV(pages, hidden, kv.lengths)])
    assert lost > 0 or batch == "prefill"
    expected = ask(case, *(to_pages(x, k_lens, size) for x in (case.k, case.v)))
    for k, v in zip(*paged, strict=True):
        assert_equal(ask(case, k, v), expected)


@pytest.mark.usefixtures("_gathered")
@pytest.mark.parametrize("op", OPS)
def test_a_missing_page_is_zeros(op: str) -> None:
    layout = VarlenLayout.from_lengths([3, 2], [24, 24])
    case = Case.random(op, layout, BLOCKS)
    lengths = rows_of(case)
    k, v = (to_pages(x, lengths, 4) for x in (case.k, case.v))
    zeroed, holes = [], []
    for x, kv in ((case.k, k), (case.v, v)):
        own = x.clone()
        first = sum(lengths[:1]) + (lengths[1] - 1) // 4 * 4
        own[first : sum(lengths[:2])] = 0  # the second sequence's last page
        table = kv.block_table.clone()
        table[1, (lengths[1] - 1) // 4] = -1
        zeroed.append(own)
        holes.append(PagedKV(kv.pages, table, kv.lengths))
    expected = ask(case, *(to_pages(x, lengths, 4) for x in zeroed))
    assert_equal(ask(case, *holes), expected)
    assert not torch.equal(expected[0], ask(case, k, v)[0])


@pytest.mark.usefixtures("_gathered")
@pytest.mark.parametrize("op", OPS)
def test_pages_may_be_views_of_a_larger_pool(op: str) -> None:
    case = case_of(op, "ragged")
    lengths = rows_of(case)
    k, v = (to_pages(x, lengths, 4) for x in (case.k, case.v[..., :4]))
    pool = torch.full((2, *k.pages.shape[:3], 8), torch.nan, dtype=torch.float64)
    pool[0], pool[1, ..., :4] = k.pages, v.pages
    views = PagedKV(pool[0], k.block_table, k.lengths), PagedKV(pool[1, ..., :4], v.block_table, v.lengths)
    assert not views[1].pages.is_contiguous()
    assert_equal(ask(case, *views), ask(case, k, v))


@pytest.mark.usefixtures("_gathered")
@pytest.mark.parametrize("op", OPS)
def test_pages_agree_with_sdpa(op: str) -> None:
    """Which takes pages, as the oracle does not."""
    for batch in BATCHES:
        case = case_of(op, batch)
        k, v = (to_pages(x, rows_of(case), 4) for x in (case.k, case.v))
        expected = getattr(BACKEND, op)(case.q, k, v, *case.rest)
        names = "out", "lse"
        case.assert_close(
            *(dict(zip(names, x, strict=True)) for x in (ask(case, k, v), expected)), f"of {batch} in pages"
        )


@pytest.mark.parametrize("op", OPS)
def test_gradients_through_pages_are_refused_and_without_them_pages_are_taken(op: str) -> None:
    case = case_of(op, "ragged")
    k, v = (to_pages(x, rows_of(case), 4) for x in (case.k, case.v))
    expected = ask(case, k, v)
    learning = PagedKV(k.pages.clone().requires_grad_(), k.block_table, k.lengths)
    for q, keys in ((case.q.clone().requires_grad_(), k), (case.q, learning)):
        with pytest.raises(ValueError, match=rf"^{op} on backend plain: records no gradients through paged"):
            ask(case, keys, v, q)
        with torch.no_grad():
            assert_equal(ask(case, keys, v, q), expected)
        with torch.inference_mode():
            assert_equal(ask(case, keys, v, q), expected)
