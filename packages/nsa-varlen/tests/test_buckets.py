"""Are buckets the batch they come from, padded little, and read by nobody before it is needed?"""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_varlen import BlockGeometry, VarlenLayout, masks
from nsa_varlen.testing import to_pages

BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=3)
LENGTHS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), max_size=8)
EVERY = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def ragged(lengths: list[tuple[int, int]]) -> VarlenLayout:
    return VarlenLayout.from_lengths([q for q, _ in lengths], [k for _, k in lengths])


def mask_of(layout: VarlenLayout, blocks: BlockGeometry | None) -> torch.Tensor:
    return masks.causal_mask(layout) if blocks is None else masks.compressed_mask(layout, blocks)


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["raw", "compressed"])
@EVERY
@given(lengths=LENGTHS)
def test_each_query_that_sees_a_key_is_in_one_bucket_and_sees_there_what_it_sees_here(
    blocks: BlockGeometry | None, lengths: list[tuple[int, int]]
) -> None:
    layout = ragged(lengths)
    mask = mask_of(layout, blocks)
    seen = torch.zeros_like(mask)
    rows: list[int] = []
    for bucket in layout.buckets(blocks):
        for sequence, q_rows, k_rows, positions, visible in zip(
            bucket.sequences, bucket.q_rows, bucket.k_rows, bucket.positions, bucket.visible(), strict=True
        ):
            real, keys = q_rows >= 0, k_rows >= 0
            rows += q_rows[real].tolist()
            assert (layout.sequence_of_queries()[q_rows[real]] == sequence).all()
            assert torch.equal(positions[real], layout.positions()[q_rows[real]])
            assert (positions[~real] == -1).all()
            assert not visible[~real].any()
            assert not visible[:, ~keys].any()
            seen[q_rows[real][:, None], k_rows[keys]] = visible[real][:, keys]
    assert sorted(rows) == mask.any(1).nonzero().flatten().tolist()
    assert torch.equal(seen, mask)


@EVERY
@given(LENGTHS, st.integers(1, 30))
def test_the_window_of_a_bucket_is_that_of_the_layout(lengths: list[tuple[int, int]], window_size: int) -> None:
    layout, blocks = ragged(lengths), BlockGeometry(window_size=window_size)
    seen = torch.zeros(layout.total_q, layout.total_k, dtype=torch.bool)
    for bucket in layout.buckets():
        for q_rows, k_rows, visible in zip(bucket.q_rows, bucket.k_rows, bucket.visible(window_size), strict=True):
            real, keys = q_rows >= 0, k_rows >= 0
            seen[q_rows[real][:, None], k_rows[keys]] = visible[real][:, keys]
    assert torch.equal(seen, masks.window_mask(layout, blocks))


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["raw", "compressed"])
@EVERY
@given(lengths=LENGTHS)
def test_padding_is_bounded_and_on_the_right(blocks: BlockGeometry | None, lengths: list[tuple[int, int]]) -> None:
    layout = ragged(lengths)
    work = padded = 0
    for bucket in layout.buckets(blocks):
        for rows, width in ((bucket.q_rows, bucket.max_seqlen_q), (bucket.k_rows, bucket.max_seqlen_k)):
            assert rows.shape == (len(bucket.sequences), width)
            counts = (rows >= 0).sum(1)
            assert int(counts.max()) == width
            assert width < 2 * int(counts.min())
            assert torch.equal(rows >= 0, torch.arange(width) < counts[:, None])
        assert bucket.sequences == tuple(sorted(bucket.sequences))
        work += int(((bucket.q_rows >= 0).sum(1) * (bucket.k_rows >= 0).sum(1)).sum())
        padded += bucket.q_rows.numel() * bucket.max_seqlen_k
    assert padded < 4 * work or padded == work == 0
    assert max(Counter(s for b in layout.buckets(blocks) for s in b.sequences).values(), default=0) <= 1


@EVERY
@given(LENGTHS)
def test_in_a_causal_bucket_query_i_sees_keys_0_to_i(lengths: list[tuple[int, int]]) -> None:
    layout = ragged(lengths)
    for bucket in layout.buckets():
        sizes = [(min(lengths[s]), lengths[s][1]) for s in bucket.sequences]
        assert bucket.causal == all(q == k for q, k in sizes) == any(q == k for q, k in sizes)
        if bucket.causal:
            square = torch.ones(bucket.max_seqlen_q, bucket.max_seqlen_k, dtype=torch.bool).tril()
            real = (bucket.q_rows >= 0)[..., None]
            assert torch.equal(bucket.visible(), square & real)
    assert not any(bucket.causal for bucket in layout.buckets(BLOCKS))


@pytest.mark.parametrize("lengths", [[(5, 5), (3, 3), (9, 9)], [(4, 4)] * 3, [(1, 6), (1, 7)]], ids=str)
def test_gathering_and_scattering_undo_each_other_gradients_included(lengths: list[tuple[int, int]]) -> None:
    layout = ragged(lengths)
    x = torch.randn(layout.total_q, 2, 3, dtype=torch.float64, requires_grad=True)
    out = torch.zeros_like(x)
    for bucket in layout.buckets():
        batch = bucket.queries.gather(x)
        assert batch.shape == (len(bucket.sequences), bucket.max_seqlen_q, 2, 3)
        assert not batch[bucket.q_rows < 0].any()
        assert torch.equal(batch[bucket.q_rows >= 0], x[bucket.q_rows[bucket.q_rows >= 0]])
        out = bucket.queries.scatter(batch * 2, out)
    assert torch.equal(out, 2 * x)
    direction = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
    out.backward(direction)
    assert torch.equal(x.grad, 2 * direction)


def test_padding_takes_nothing_from_the_batch_nor_gives_it_anything() -> None:
    layout = ragged([(3, 3), (4, 4)])
    (bucket,) = layout.buckets()
    x = torch.full((7, 1), torch.nan)
    x[3:] = 1
    assert bucket.keys.gather(x)[0, 3].item() == 0
    values = torch.full((2, 4, 1), torch.inf)
    values[0, :3] = values[1] = 2
    assert torch.equal(bucket.queries.scatter(values, torch.zeros(7, 1)), torch.full((7, 1), 2.0))
    half = bucket.queries.scatter(values, torch.zeros(7, 1, dtype=torch.bfloat16))
    assert torch.equal(half, torch.full((7, 1), 2.0, dtype=torch.bfloat16))


def test_a_batch_of_equal_lengths_is_a_view() -> None:
    layout = ragged([(1, 6)] * 4)
    (bucket,) = layout.buckets()
    k = torch.randn(24, 2, 3)
    assert bucket.keys.gather(k).data_ptr() == k.data_ptr()
    assert torch.equal(bucket.keys.gather(k), k.unflatten(0, (4, 6)))


def test_rows_come_from_pages_too() -> None:
    layout, k = ragged([(2, 9), (3, 12), (1, 1)]), torch.randn(22, 2, 3)
    paged = to_pages(k, [9, 12, 1], 4)
    for bucket in layout.buckets():
        assert torch.equal(bucket.keys.gather(paged), bucket.keys.gather(k))


def test_a_split_bucket_is_the_same_batch_in_parts() -> None:
    layout = ragged([(5, 5), (7, 7), (8, 8), (6, 6), (5, 5)])
    (bucket,) = layout.buckets()
    parts = bucket.split(2)
    assert [part.sequences for part in parts] == [(0, 1), (2, 3), (4,)]
    for name in ("q_rows", "k_rows", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(bucket, name))
    assert torch.equal(torch.cat([part.visible() for part in parts]), bucket.visible())
    assert bucket.split(5) == (bucket,)
    x = torch.randn(31, 2)
    assert torch.equal(torch.cat([part.queries.gather(x) for part in parts]), bucket.queries.gather(x))


def test_buckets_are_kept_and_known_without_reading_the_device() -> None:
    layout = ragged([(3, 3), (2, 9), (0, 4)]).to("meta")
    assert layout.buckets() is layout.buckets()
    assert layout.buckets(BLOCKS) is layout.buckets(BlockGeometry(kernel_size=4, kernel_stride=2))
    assert layout.buckets(BLOCKS) is not layout.buckets()
    for blocks in (None, BLOCKS):
        for bucket in layout.buckets(blocks):
            tensors = (bucket.q_rows, bucket.k_rows, bucket.positions, bucket.visible())
            assert {x.device.type for x in tensors} == {"meta"}
            assert bucket.keys.gather(torch.empty(16, 2, device="meta")).shape[1] == bucket.max_seqlen_k
    assert ragged([]).buckets() == ragged([(0, 3), (2, 0)]).buckets() == ()
    with pytest.raises(TypeError, match=r"blocks: expected a BlockGeometry or None, got int"):
        layout.buckets(4)
