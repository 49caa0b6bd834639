"""Does a paged stream find its rows, and does it refuse what does not fit?"""

import pytest
import torch
from nsa_varlen import PagedKV, VarlenLayout
from nsa_varlen.testing import to_pages

LENGTHS = (7, 0, 12, 1)


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
def test_rows_come_back_from_shuffled_pages(page_size: int) -> None:
    layout, x = VarlenLayout.from_lengths(LENGTHS), torch.randn(20, 2, 3)
    paged = to_pages(x, LENGTHS, page_size)
    assert torch.equal(paged.rows(layout.sequence_of_keys(), layout.key_positions()), x)
    slots = paged.slots(layout.sequence_of_keys(), layout.key_positions())
    assert slots.dtype == torch.int64
    assert len(set(slots.tolist())) == 20


def test_rows_take_any_shape_of_index() -> None:
    x = torch.randn(20, 2, 3)
    paged = to_pages(x, LENGTHS, 4)
    rows = paged.rows(torch.tensor([[0], [2]]), torch.tensor([[0, 5], [11, 3]]))
    assert torch.equal(rows, x[torch.tensor([[0, 5], [18, 10]])])


def test_rows_without_a_page_are_zeros() -> None:
    """What another owner left in the pool must not be read, not even to be multiplied by 0."""
    paged = to_pages(torch.randn(20, 2, 3), LENGTHS, 4)
    paged.pages[paged.block_table[2, 0]] = torch.nan
    paged.block_table[2, 0] = -1
    rows = paged.rows(torch.tensor([2, 2, 1]), torch.tensor([0, 3, 0]))
    assert not rows.any()
    assert (paged.slots(torch.tensor([2, 2, 2]), torch.tensor([0, 3, 4])) < 0).tolist() == [True, True, False]


@pytest.mark.parametrize("table", [[-1, 0, 1], [0, -1, 1], [-1, 0, -1], [1, 0, -1]])
def test_a_span_without_a_page_is_zeros(table: list[int]) -> None:
    paged = PagedKV(torch.randn(2, 4, 2, 3), torch.tensor([table], dtype=torch.int32), torch.tensor([12]).int())
    rows = paged.rows(torch.zeros(10, dtype=torch.int64), torch.arange(1, 11))
    assert torch.equal(paged.span(0, 1, 11), rows)


def test_properties_describe_the_stream() -> None:
    paged = to_pages(torch.randn(20, 2, 3, dtype=torch.float16), LENGTHS, 4)
    assert (paged.num_heads, paged.head_dim, paged.page_size) == (2, 3, 4)
    assert (paged.dtype, paged.device) == (torch.float16, torch.device("cpu"))


PAGES = torch.zeros(4, 2, 1, 3)
TABLE = torch.zeros(2, 2, dtype=torch.int32)
ROWS = torch.tensor([3, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((PAGES[0], TABLE, ROWS), ValueError, r"pages: expected shape .*got \[2, 1, 3\]"),
        ((PAGES, TABLE.long(), ROWS), TypeError, r"block_table: expected dtype torch\.int32, got torch\.int64"),
        ((PAGES, TABLE, ROWS.long()), TypeError, r"lengths: expected dtype torch\.int32, got torch\.int64"),
        ((PAGES, TABLE[0], ROWS), ValueError, r"block_table: expected 2 dimensions, got shape \[2\]"),
        ((PAGES, TABLE, ROWS[None]), ValueError, r"lengths: expected 1 dimensions, got shape \[1, 2\]"),
        ((PAGES, TABLE, ROWS[:1]), ValueError, r"lengths: expected 2 sequences as in block_table, got 1"),
        (([0.0], TABLE, ROWS), TypeError, r"pages: expected a tensor, got list"),
        ((PAGES, TABLE, [3, 1]), TypeError, r"lengths: expected a tensor, got list"),
        ((PAGES, TABLE.to("meta"), ROWS), ValueError, r"block_table: expected device cpu of pages, got meta"),
        ((PAGES, TABLE, ROWS.to("meta")), ValueError, r"lengths: expected device cpu of pages, got meta"),
    ],
)
def test_refuses(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PagedKV(*arguments)
