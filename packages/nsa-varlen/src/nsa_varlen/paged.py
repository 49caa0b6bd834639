"""Keys or values that live in pages of a cache."""

from dataclasses import dataclass

import torch
from torch import Tensor


def page_slots(block_table: Tensor, page_size: int, sequence: Tensor, position: Tensor) -> Tensor:
    """Row number, among the rows of all pages, of position `position` of sequence `sequence`: int64.

    Example:
        >>> page_slots(torch.tensor([[2, 0]]), 4, torch.tensor(0), torch.tensor([0, 5])).tolist()
        [8, 1]
    """
    page = block_table[sequence, torch.div(position, page_size, rounding_mode="floor")].long()
    return page * page_size + position % page_size


@dataclass(frozen=True, eq=False)
class PagedKV:
    """One stream of keys, or of values, stored in pages; stands for the packed tensor of the same rows.

    Row p of sequence b is `pages[block_table[b, p // page_size], p % page_size]`. A row that no query sees may hold
    anything, NaN too: perhaps nobody wrote it. Who loads it nevertheless has to hide it, and a weight of 0 does not.

    Fields:
        pages: [num_pages, page_size, H, D].
        block_table: int32 [B, max_pages], page numbers; -1 where a sequence has no page.
        lengths: int32 [B], rows of each sequence.
        k_scale, v_scale: reserved for fp8 dequantisation; backends that do not implement them refuse.

    Raises:
        TypeError: pages, block_table or lengths are no tensors, or the latter not int32.
        ValueError: shapes or devices disagree.

    Example:
        >>> pages = torch.arange(8.0).reshape(4, 2, 1, 1)
        >>> table = torch.tensor([[2, 0]], dtype=torch.int32)
        >>> kv = PagedKV(pages, table, torch.tensor([3], dtype=torch.int32))
        >>> kv.rows(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])).flatten().tolist()
        [4.0, 5.0, 0.0]
    """

    pages: Tensor
    block_table: Tensor
    lengths: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("pages", "block_table", "lengths"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(getattr(self, name)).__name__}")
        if self.pages.ndim != 4:
            raise ValueError(f"pages: expected shape [num_pages, page_size, H, D], got {list(self.pages.shape)}")
        for name, tensor, ndim in (("block_table", self.block_table, 2), ("lengths", self.lengths, 1)):
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name}: expected dtype torch.int32, got {tensor.dtype}")
            if tensor.ndim != ndim:
                raise ValueError(f"{name}: expected {ndim} dimensions, got shape {list(tensor.shape)}")
            if tensor.device != self.pages.device:
                raise ValueError(f"{name}: expected device {self.pages.device} of pages, got {tensor.device}")
        if self.block_table.shape[0] != self.lengths.shape[0]:
            raise ValueError(
                f"lengths: expected {self.block_table.shape[0]} sequences as in block_table, "
                f"got {self.lengths.shape[0]}"
            )

    @property
    def num_heads(self) -> int:
        """Heads of the stream."""
        return self.pages.shape[2]

    @property
    def head_dim(self) -> int:
        """Size of one head's row."""
        return self.pages.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the pages."""
        return self.pages.dtype

    @property
    def device(self) -> torch.device:
        """Device of the pages."""
        return self.pages.device

    @property
    def page_size(self) -> int:
        """Rows a page holds."""
        return self.pages.shape[1]

    def slots(self, sequence: Tensor, position: Tensor) -> Tensor:
        """Row numbers in `pages.flatten(0, 1)` of given positions: int64, shaped as the (broadcast) arguments.

        Negative where the sequence has no page.
        """
        return page_slots(self.block_table, self.page_size, sequence, position)

    def rows(self, sequence: Tensor, position: Tensor) -> Tensor:
        """The stored rows at given (sequence, position): [..., H, D]. Zeros where the sequence has no page."""
        slots = self.slots(sequence, position)
        # By page and row: flattening pages that are a view of a larger pool would copy them all.
        found = slots.clamp_min(0)
        rows = self.pages[torch.div(found, self.page_size, rounding_mode="floor"), found % self.page_size]
        return rows.masked_fill_((slots < 0)[..., None, None], 0.0)

    def span(self, sequence: int, start: int, end: int) -> Tensor:
        """Rows [start, end) of one sequence: [end - start, H, D]. Zeros where it has no page.

        On a CPU, a view if their pages lie side by side.
        """
        first, last = start // self.page_size, -(-end // self.page_size)
        table = self.block_table[sequence, first:last]
        numbers = table.tolist() if self.device.type == "cpu" else []
        if numbers and numbers[0] >= 0 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            pages = self.pages[numbers[0] : numbers[0] + len(numbers)]
        else:
            pages = self.pages.index_select(0, table.clamp_min(0))
            pages.masked_fill_((table < 0)[:, None, None, None], 0.0)
        return pages.flatten(0, 1)[start - first * self.page_size : end - first * self.page_size]
