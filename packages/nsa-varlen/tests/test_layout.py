"""Does a layout say where each token of a ragged batch sits, and does it refuse to exist wrong?"""

import dataclasses
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.sdpa import BACKEND

BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=3)
LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def facts(layout: VarlenLayout) -> tuple:
    counts = (layout.max_seqlen_q, layout.max_seqlen_k, layout.total_q, layout.total_k)
    return layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist(), counts


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(LENGTHS)
def test_rows_sequences_and_positions_are_those_of_a_double_loop(lengths: list[tuple[int, int]]) -> None:
    layout = VarlenLayout.from_lengths([q for q, _ in lengths], [k for _, k in lengths])
    queries = [(b, k - q + i) for b, (q, k) in enumerate(lengths) for i in range(q)]
    keys = [(b, s) for b, (_, k) in enumerate(lengths) for s in range(k)]
    compressed = [(b, i * 2) for b, (_, k) in enumerate(lengths) for i in range(k) if i * 2 + 4 <= k]
    assert list(zip(layout.sequence_of_queries().tolist(), layout.positions().tolist(), strict=True)) == queries
    assert list(zip(layout.sequence_of_keys().tolist(), layout.key_positions().tolist(), strict=True)) == keys
    pairs = zip(layout.sequence_of_compressed(BLOCKS).tolist(), layout.compressed_starts(BLOCKS).tolist(), strict=True)
    assert list(pairs) == compressed
    assert layout.batch_size == len(lengths)
    first_keys = [sum(k for _, k in lengths[:b]) for b in range(len(lengths))]
    assert layout.last_keys().tolist() == [first_keys[b] + position for b, position in queries]
    spans = [
        (first_keys[b] + start, first_keys[b] + min(start + 4, k))
        for b, (_, k) in enumerate(lengths)
        for start in range(0, k, 4)
    ]
    assert layout.block_spans(BLOCKS) == spans
    assert layout.block_offsets(BLOCKS).tolist() == [
        sum(-(-k // 4) for _, k in lengths[:b]) for b in range(len(lengths))
    ]


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(LENGTHS)
def test_every_constructor_builds_the_same_layout(lengths: list[tuple[int, int]]) -> None:
    layout = VarlenLayout.from_lengths([q for q, _ in lengths], [k for _, k in lengths])
    again = VarlenLayout.from_cu_seqlens(layout.cu_seqlens_q, layout.cu_seqlens_k)
    direct = VarlenLayout(layout.cu_seqlens_q, layout.cu_seqlens_k, *facts(layout)[2])
    assert facts(again) == facts(direct) == facts(layout)
    assert layout.total_q == sum(q for q, _ in lengths)
    assert layout.max_seqlen_k == max((k for _, k in lengths), default=0)


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(LENGTHS)
def test_compressed_layout_counts_complete_blocks_of_the_keys(lengths: list[tuple[int, int]]) -> None:
    compressed = VarlenLayout.from_lengths([q for q, _ in lengths], [k for _, k in lengths]).compressed(BLOCKS)
    counts = [len([i for i in range(k) if i * 2 + 4 <= k]) for _, k in lengths]
    assert compressed.cu_seqlens.diff().tolist() == counts
    assert compressed.cu_seqlens.dtype == torch.int32
    assert (compressed.total, compressed.max_seqlen) == (sum(counts), max(counts, default=0))


def test_without_key_lengths_keys_are_the_queries() -> None:
    layout = VarlenLayout.from_lengths([3, 2])
    assert facts(layout) == ([0, 3, 5], [0, 3, 5], (3, 3, 5, 5))
    assert facts(VarlenLayout.from_cu_seqlens(offsets(0, 3, 5))) == facts(layout)


@pytest.mark.parametrize("shape", [(3, 7), (1, 3), (4, 0), (0, 5), (0, 0)])
def test_a_shape_gives_the_layout_of_its_lengths(shape: tuple[int, int]) -> None:
    layout, expected = VarlenLayout.from_shape(*shape), VarlenLayout.from_lengths([shape[1]] * shape[0])
    assert facts(layout) == facts(expected)
    assert layout.cu_seqlens_q.dtype == torch.int32
    assert layout.is_whole()


@pytest.mark.parametrize("shape", [(3, 7), (4, 0), (0, 5)])
def test_of_a_shape_nothing_is_read_or_copied(shape: tuple[int, int]) -> None:
    """Neither by the layout nor by its host copy and compressed blocks: on "meta" there is nothing to read."""
    layout = VarlenLayout.from_shape(*shape, device="meta")
    assert layout.host.cu_seqlens_q.tolist() == [i * shape[1] for i in range(shape[0] + 1)]
    compressed = layout.compressed(BLOCKS)
    expected = VarlenLayout.from_lengths([shape[1]] * shape[0]).compressed(BLOCKS)
    assert (compressed.cu_seqlens.device.type, compressed.total) == ("meta", expected.total)
    assert layout.host.compressed(BLOCKS).cu_seqlens.tolist() == expected.cu_seqlens.tolist()


@pytest.mark.parametrize(
    "shape, error, message",
    [
        ((2.0, 3), TypeError, r"batch_size: expected an int, got 2\.0 of type float"),
        ((2, True), TypeError, "length: expected an int, got True of type bool"),
        ((-1, 3), ValueError, "batch_size: expected at least 0, got -1"),
        ((1, -3), ValueError, "length: expected at least 0, got -3"),
    ],
)
def test_from_shape_refuses(shape: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VarlenLayout.from_shape(*shape)


def test_whole_is_a_layout_with_as_many_keys_as_queries() -> None:
    assert VarlenLayout.from_lengths([3, 2]).is_whole()
    assert VarlenLayout.from_lengths([3, 2], [3, 2]).is_whole(), "other tensors, the same numbers"
    assert not VarlenLayout.from_lengths([3, 2], [2, 3]).is_whole()
    with pytest.raises(NotImplementedError, match="meta"):
        VarlenLayout(offsets(0, 3).to("meta"), offsets(0, 3).to("meta"), 3, 3, 3, 3).is_whole()


def test_a_padding_mask_gives_its_row_sums() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    assert VarlenLayout.from_padding_mask(mask).cu_seqlens_q.tolist() == [0, 2, 4, 4]


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(LENGTHS, st.sets(st.sampled_from(["max_seqlen_q", "max_seqlen_k", "total_q", "total_k"])))
def test_given_numbers_and_read_ones_are_the_same(lengths: list[tuple[int, int]], given: set[str]) -> None:
    layout = VarlenLayout.from_lengths([q for q, _ in lengths], [k for _, k in lengths])
    numbers = {name: getattr(layout, name) for name in given}
    again = VarlenLayout.from_cu_seqlens(layout.cu_seqlens_q, layout.cu_seqlens_k, **numbers)
    assert facts(again) == facts(layout)


def test_with_all_numbers_given_nothing_is_read() -> None:
    """On the device "meta" there is nothing to read: what works there synchronises nowhere."""
    numbers = {"max_seqlen_q": 2, "max_seqlen_k": 7, "total_q": 3, "total_k": 9}
    cu_q, cu_k = offsets(0, 2, 3).to("meta"), offsets(0, 7, 9).to("meta")
    layout = VarlenLayout.from_cu_seqlens(cu_q, cu_k, **numbers)
    assert (layout.device.type, layout.total_q, layout.max_seqlen_k) == ("meta", 3, 7)
    assert (layout.cu_seqlens_q is cu_q, layout.cu_seqlens_k is cu_k) == (True, True)
    assert layout.positions().shape == (3,)
    for missing in numbers:
        with pytest.raises(NotImplementedError, match="meta"):
            VarlenLayout.from_cu_seqlens(cu_q, cu_k, **{n: x for n, x in numbers.items() if n != missing})


def test_without_keys_the_numbers_of_the_queries_are_theirs() -> None:
    layout = VarlenLayout.from_cu_seqlens(offsets(0, 2, 3).to("meta"), max_seqlen_q=2, total_q=3)
    assert (layout.max_seqlen_k, layout.total_k) == (2, 3)
    with pytest.raises(NotImplementedError, match="meta"):
        VarlenLayout.from_cu_seqlens(offsets(0, 2, 3).to("meta"), max_seqlen_q=2)


def test_a_padding_mask_with_its_numbers_is_not_read() -> None:
    mask = torch.ones(3, 4, dtype=torch.bool, device="meta")
    layout = VarlenLayout.from_padding_mask(mask, max_seqlen=4, total=12)
    assert (layout.batch_size, layout.max_seqlen_k, layout.total_q) == (3, 4, 12)
    for numbers in ({"max_seqlen": 4}, {"total": 12}):
        with pytest.raises(NotImplementedError, match="meta"):
            VarlenLayout.from_padding_mask(mask, **numbers)


def test_wrong_numbers_are_refused_where_they_can_be_checked() -> None:
    cu_seqlens, mask = offsets(0, 3, 5), torch.tensor([[True, False], [True, True]])
    for name, message in (("max_seqlen_q", "expected 3 .*got 4"), ("total_k", "expected the last .*total_k=4, got 5")):
        with pytest.raises(ValueError, match=message):
            VarlenLayout.from_cu_seqlens(cu_seqlens, **{name: 4})
    with pytest.raises(TypeError, match=r"total_q: expected an int, got 5\.0 of type float"):
        VarlenLayout.from_cu_seqlens(cu_seqlens, max_seqlen_q=3, total_q=5.0)
    with pytest.raises(ValueError, match=r"max_seqlen_q: expected 2 from cu_seqlens_q, got 1"):
        VarlenLayout.from_padding_mask(mask, max_seqlen=1)
    with pytest.raises(ValueError, match=r"expected the last offset to be total_q=4, got 3"):
        VarlenLayout.from_padding_mask(mask, max_seqlen=2, total=4)


def test_offsets_go_to_a_gpu_through_pinned_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the calls would be, with the device "meta" in the GPU's place; tests-integration/test_cuda.py makes them."""
    copied: list[tuple[bool, bool]] = []
    pinned: list[torch.Tensor] = []
    move = torch.Tensor.to

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x.clone())
        return pinned[-1]

    def to(x: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copied.append((any(x is y for y in pinned), non_blocking))
        return move(x, "meta")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    layout = VarlenLayout.from_lengths([3, 2], [4, 2], device="cuda")
    assert (layout.device.type, layout.host.cu_seqlens_k.tolist()) == ("meta", [0, 4, 6])
    assert copied == [(True, True)] * 2
    copied.clear()
    ready = VarlenLayout.from_lengths([3, 2]).pin_memory()
    assert any(ready.cu_seqlens_q is x for x in pinned)
    assert ready.cu_seqlens_k is ready.cu_seqlens_q
    ready.to("cuda")
    assert copied == [(True, True)]
    with pytest.raises(ValueError, match=r"layout: expected one on the CPU to pin, got meta"):
        layout.pin_memory()


def test_a_batch_without_sequences_is_empty() -> None:
    layout = VarlenLayout.from_lengths([])
    assert facts(layout) == ([0], [0], (0, 0, 0, 0))
    assert layout.positions().shape == layout.key_positions().shape == (0,)
    assert layout.compressed(BLOCKS).total == 0


def test_layouts_are_frozen_and_keep_their_host_copy() -> None:
    layout = VarlenLayout.from_lengths([3, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.total_q = 6  # type: ignore[misc]
    assert layout.host is layout
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert moved.host is layout


def test_a_layout_that_a_backend_used_can_be_pickled() -> None:
    layout, x = VarlenLayout.from_lengths([3, 5]), torch.randn(8, 1, 4)
    BACKEND.window_attention(x, x, x, layout, BlockGeometry())
    again = pickle.loads(pickle.dumps(layout))
    assert torch.equal(again.cu_seqlens_k, layout.cu_seqlens_k)
    assert torch.equal(again.positions(), layout.positions())


def test_a_layout_is_freed_with_its_last_reference() -> None:
    """Every decode step builds one: what it keeps must not wait for the cyclic garbage collector."""
    layout, x = VarlenLayout.from_lengths([3, 5]), torch.randn(8, 1, 4)
    BACKEND.window_attention(x, x, x, layout, BlockGeometry())
    BACKEND.select_blocks(x, x[:1], torch.zeros(1, 8), layout, BlockGeometry(kernel_size=4, kernel_stride=4, topk=3))
    gone = weakref.ref(layout)
    gc.disable()
    try:
        del layout
        assert gone() is None
    finally:
        gc.enable()


def test_a_compressed_layout_is_computed_once_per_block_size() -> None:
    layout = VarlenLayout.from_lengths([9])
    assert layout.compressed(BLOCKS) is layout.compressed(dataclasses.replace(BLOCKS, topk=5))
    assert layout.compressed(BLOCKS).total != layout.compressed(dataclasses.replace(BLOCKS, kernel_stride=1)).total


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((offsets(0, 3, 2, 5), None), ValueError, r"cu_seqlens_q: expected ascending offsets, got 3 before 2"),
        ((offsets(1, 3), None), ValueError, r"cu_seqlens_q: expected the first offset to be 0, got 1"),
        ((offsets(0, 3), offsets(0, 3, 4)), ValueError, r"cu_seqlens_k: expected as many sequences .* 1, got 2"),
        ((offsets(0, 3).long(), None), TypeError, r"cu_seqlens_q: expected an int32 tensor.*got torch\.int64"),
        ((offsets(0, 3), offsets(0, 3).float()), TypeError, r"cu_seqlens_k: expected an int32 .*got torch\.float32"),
        (([0, 3], None), TypeError, r"cu_seqlens_q: expected an int32 tensor.*got list"),
        ((offsets(), None), ValueError, r"cu_seqlens_q: expected shape \[B\+1\], got \[0\]"),
        ((offsets(0, 3)[None], None), ValueError, r"cu_seqlens_q: expected shape \[B\+1\], got \[1, 2\]"),
    ],
)
def test_from_cu_seqlens_refuses(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VarlenLayout.from_cu_seqlens(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"total_q": 6}, ValueError, r"cu_seqlens_q: expected the last offset to be total_q=6, got 5"),
        ({"total_k": 4}, ValueError, r"cu_seqlens_k: expected the last offset to be total_k=4, got 5"),
        ({"max_seqlen_q": 2}, ValueError, r"max_seqlen_q: expected 3 from cu_seqlens_q, got 2"),
        ({"max_seqlen_k": 4}, ValueError, r"max_seqlen_k: expected 3 from cu_seqlens_k, got 4"),
        ({"total_q": -1}, ValueError, r"total_q: expected at least 0, got -1"),
        ({"total_q": 5.0}, TypeError, r"total_q: expected an int, got 5\.0 of type float"),
        ({"max_seqlen_k": True}, TypeError, r"max_seqlen_k: expected an int, got True of type bool"),
        ({"cu_seqlens_q": offsets(0, 3, 5).long()}, TypeError, r"cu_seqlens_q: expected an int32 .*got torch\.int64"),
        ({"cu_seqlens_k": [0, 3, 5]}, TypeError, r"cu_seqlens_k: expected an int32 tensor.*got list"),
        ({"cu_seqlens_q": offsets()}, ValueError, r"cu_seqlens_q: expected shape \[B\+1\], got \[0\]"),
        ({"cu_seqlens_k": offsets(0, 5)}, ValueError, r"cu_seqlens_k: expected as many .*, 2, got 1"),
        (
            {"cu_seqlens_k": offsets(0, 3, 5).to("meta")},
            ValueError,
            r"cu_seqlens_k: expected the device.*cpu, got meta",
        ),
        ({"cu_seqlens_k": offsets(0, 6, 5)}, ValueError, r"cu_seqlens_k: expected ascending offsets, got 6 before 5"),
    ],
)
def test_the_constructor_refuses(change: dict, error: type[Exception], message: str) -> None:
    cu_seqlens = offsets(0, 3, 5)
    fields = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    fields |= {"max_seqlen_q": 3, "max_seqlen_k": 3, "total_q": 5, "total_k": 5}
    with pytest.raises(error, match=message):
        VarlenLayout(**(fields | change))


@pytest.mark.parametrize(
    ("q", "k", "error", "message"),
    [
        ([3, -1], None, ValueError, r"q: expected lengths of at least 0, got -1"),
        ([3], [-2], ValueError, r"k: expected lengths of at least 0, got -2"),
        ([3, 1], [3], ValueError, r"k: expected 2 lengths, as many as q, got 1"),
        ([3.0], None, TypeError, r"q: expected ints, got 3\.0 of type float"),
        ([3], [True], TypeError, r"k: expected ints, got True of type bool"),
    ],
)
def test_from_lengths_refuses(q: list, k: list | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VarlenLayout.from_lengths(q, k)


def test_from_padding_mask_refuses_what_is_no_mask() -> None:
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor \[B, S\], got torch\.int64"):
        VarlenLayout.from_padding_mask(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask: expected shape \[B, S\], got \[3\]"):
        VarlenLayout.from_padding_mask(torch.ones(3, dtype=torch.bool))
