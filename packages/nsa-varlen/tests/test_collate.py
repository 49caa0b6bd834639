"""Do token lists become the packed batch that they describe, in a DataLoader's workers too, and no label cross over?"""

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, collate_tokens
from nsa_varlen.collate import INTEGERS
from nsa_varlen.sdpa import BACKEND
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

IDS = [[11, 12, 13], [], [14], [15, 16]]


def lists(batch: Any) -> tuple:
    """Ids, labels, positions and offsets of a batch."""
    tensors = (batch["input_ids"], batch["labels"], batch["position_ids"], batch["layout"].cu_seqlens_q)
    return tuple(x.tolist() for x in tensors)


def test_token_lists_are_packed_in_order_and_each_first_label_is_ignored() -> None:
    batch = collate_tokens(IDS)
    assert list(batch) == ["input_ids", "labels", "position_ids", "layout"]
    assert lists(batch) == (
        [11, 12, 13, 14, 15, 16],
        [-100, 12, 13, -100, -100, 16],
        [0, 1, 2, 0, 0, 1],
        [0, 3, 3, 4, 6],
    )
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert (batch["layout"].total_k, batch["layout"].max_seqlen_k) == (6, 3)


def test_given_labels_keep_their_values_but_the_first() -> None:
    given, empty = {"input_ids": [1, 2, 3], "labels": [7, -100, 9]}, {"input_ids": (), "labels": []}
    batch = collate_tokens([given, {"input_ids": [4, 5]}, empty])
    assert lists(batch)[:2] == ([1, 2, 3, 4, 5], [-100, -100, 9, -100, 5])


def test_the_ignored_label_is_an_option() -> None:
    assert lists(partial(collate_tokens, ignore_index=-1)(IDS))[1] == [-1, 12, 13, -1, -1, 16]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_tensors_of_every_integer_dtype_are_read_and_left_alone(dtype: torch.dtype) -> None:
    tensors = [torch.tensor(ids, dtype=dtype) for ids in IDS]
    batch = collate_tokens([tensors[0], {"input_ids": tensors[1]}, tensors[2], tuple(IDS[3])])
    assert lists(batch) == lists(collate_tokens(IDS))
    assert [x.tolist() for x in tensors] == IDS


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16"])
def test_numpy_arrays_are_read_also_where_they_are_read_only(dtype: str) -> None:
    numpy = pytest.importorskip("numpy")
    tokens = numpy.array([5, 6, 7], dtype=dtype)
    tokens.flags.writeable = False
    batch = collate_tokens([tokens, {"input_ids": tokens[:1], "labels": tokens[:1]}])
    assert batch["input_ids"].tolist() == [5, 6, 7, 5]
    assert batch["labels"].tolist() == [-100, 6, 7, -100]
    with pytest.raises(TypeError, match=r"^examples\[0\]: expected an integer dtype, got torch.float64$"):
        collate_tokens([tokens.astype("float64")])


def test_a_lone_example_shares_no_memory_with_its_batch() -> None:
    ids, labels = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    batch = collate_tokens([{"input_ids": ids, "labels": labels}])
    for name in ("input_ids", "labels", "position_ids"):
        batch[name].fill_(-7)
    assert (ids.tolist(), labels.tolist()) == ([1, 2, 3], [4, 5, 6])
    assert batch["layout"].positions().tolist() == [0, 1, 2]


@pytest.mark.parametrize("examples", [[], [[]], [[], ()]], ids=["no-example", "one-empty", "two-empty"])
def test_a_batch_without_tokens_is_a_batch(examples: list) -> None:
    batch = collate_tokens(examples)
    assert lists(batch) == ([], [], [], [0] * (len(examples) + 1))
    assert batch["labels"].dtype == batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_collates_in_its_workers(workers: int) -> None:
    """Spawned, so that the function, its options and the layouts all pickle."""
    data = [[token] * (token % 5) for token in range(12)]
    loader = DataLoader(
        data,
        batch_size=4,
        num_workers=workers,
        collate_fn=partial(collate_tokens, ignore_index=-1),
        multiprocessing_context="spawn" if workers else None,
    )
    got = [lists(batch) for batch in loader]
    assert got == [lists(collate_tokens(data[i : i + 4], ignore_index=-1)) for i in (0, 4, 8)]


def test_a_layout_survives_pickling_with_what_was_derived_from_it() -> None:
    batch, blocks = collate_tokens(IDS), BlockGeometry(2, 1, 2, 3)
    q = torch.ones(6, 1, 2)
    before = BACKEND.window_attention(q, q, q, batch["layout"], blocks)  # leaves functions in the layout
    again = pickle.loads(pickle.dumps(batch))
    assert type(again["layout"]) is VarlenLayout
    assert lists(again) == lists(batch)
    after = BACKEND.window_attention(q, q, q, again["layout"], blocks)
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))


@pytest.mark.parametrize("given", [False, True], ids=["default-labels", "given-labels"])
def test_the_packed_next_token_loss_is_that_of_the_sequences_alone(given: bool) -> None:
    """Labels shifted by one over the packed row: no term asks one sequence's end for the next one's beginning."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 0, 3, 7]
    ids = [torch.randint(9, (length,), generator=generator) for length in lengths]
    labels = [(x + 1) % 9 for x in ids] if given else ids
    examples = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)] if given else ids
    table = torch.randn(9, 9, generator=generator, dtype=torch.float64)  # logits of the token after each token
    batch = collate_tokens(examples)
    packed = cross_entropy(table[batch["input_ids"]][:-1], batch["labels"][1:])
    terms = [cross_entropy(table[x[:-1]], y[1:], reduction="none") for x, y in zip(ids, labels, strict=True)]
    alone = torch.cat(terms)
    assert alone.numel() == 4 + 2 + 6
    # fp64: a dozen terms below 10, summed in two orders.
    torch.testing.assert_close(packed, alone.mean(), rtol=0, atol=1e-14)
    crossed = cross_entropy(table[batch["input_ids"]][:-1], torch.cat(labels)[1:])
    assert abs(float(crossed - packed)) > 1e-3


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ("abc", TypeError, r"examples: expected a list of examples, got str"),
        ({"input_ids": [1]}, TypeError, r"examples: expected a list of examples, got dict"),
        ([[1], "ab"], TypeError, r"examples\[1\]: expected a list, tuple, NumPy array or 1-D integer tensor, got str"),
        ([[1], 5], TypeError, r"examples\[1\]: expected a list.* got int"),
        ([[1, 2.0]], TypeError, r"examples\[0\]\[1\]: expected an int, got 2\.0 of type float"),
        ([[1], [True]], TypeError, r"examples\[1\]\[0\]: expected an int, got True of type bool"),
        ([[[1]]], TypeError, r"examples\[0\]\[0\]: expected an int, got \[1\] of type list"),
        ([torch.ones(2)], TypeError, r"examples\[0\]: expected an integer dtype, got torch\.float32"),
        ([torch.ones(2, dtype=torch.bool)], TypeError, r"examples\[0\]: expected an integer dtype, got torch\.bool"),
        ([torch.ones(2, 3).long()], ValueError, r"examples\[0\]: expected shape \[S\], got \[2, 3\]"),
        ([torch.tensor(1)], ValueError, r"examples\[0\]: expected shape \[S\], got \[\]"),
        (
            [torch.ones(2, dtype=torch.int64, device="meta")],
            ValueError,
            r"examples\[0\]: expected a tensor on the CPU, got one on meta",
        ),
        ([[1], {"labels": [1]}], ValueError, r'examples\[1\]: expected a mapping with "input_ids", got the keys'),
        ([{"input_ids": None}], TypeError, r'examples\[0\]\["input_ids"\]: expected a list.* got NoneType'),
        ([{"input_ids": [1], "labels": None}], TypeError, r'examples\[0\]\["labels"\]: expected a list.* got NoneType'),
        (
            [{"input_ids": [1], "labels": ["a"]}],
            TypeError,
            r"examples\[0\]\[\"labels\"\]\[0\]: expected an int, got 'a'",
        ),
        (
            [[1], {"input_ids": [1, 2], "labels": [1]}],
            ValueError,
            r'examples\[1\]\["labels"\]: expected 2 labels, as many as input_ids, got 1',
        ),
    ],
)
def test_collate_refuses(examples: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collate_tokens(examples)


@pytest.mark.parametrize("ignore_index", [None, 0.5, True])
def test_collate_refuses_an_ignored_label_that_is_no_int(ignore_index: Any) -> None:
    with pytest.raises(TypeError, match=r"ignore_index: expected an int, got"):
        collate_tokens([[1]], ignore_index=ignore_index)
