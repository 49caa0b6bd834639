"""One stream of keys and values in pages: allocation and writing, nothing about attention."""

import torch
from nsa_varlen import PagedKV
from nsa_varlen.paged import page_slots
from torch import Tensor


class PagedStream:
    """Keys [.., H, Dk] and values [.., H, Dv] of a batch of sequences, in pages taken from one pool.

    Row p of sequence b lies in page `block_table[b, p // page_size]`. Which sequence holds how many rows is its
    owner's business: every call says it.
    """

    def __init__(
        self,
        batch_size: int,
        max_rows: int,
        page_size: int,
        num_heads: int,
        dims: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        pages_per_sequence = -(-max_rows // page_size)
        num_pages = batch_size * pages_per_sequence
        self.page_size = page_size
        self.k_pages, self.v_pages = (
            torch.empty(num_pages, page_size, num_heads, dim, device=device, dtype=dtype) for dim in dims
        )
        self.block_table = torch.full((batch_size, pages_per_sequence), -1, device=device, dtype=torch.int32)
        self._owned: list[list[int]] = [[] for _ in range(batch_size)]
        self._free = list(range(num_pages - 1, -1, -1))

    def reserve(self, rows: list[int]) -> None:
        """Give each sequence pages for `rows[b]` rows. The pool always suffices up to `max_rows` each."""
        for sequence, (owned, count) in enumerate(zip(self._owned, rows, strict=True)):
            needed = -(-count // self.page_size) - len(owned)
            if needed > 0:
                pages = [self._free.pop() for _ in range(needed)]
                fresh = torch.tensor(pages, dtype=torch.int32, device="cpu").to(self.block_table.device)
                self.block_table[sequence, len(owned) : len(owned) + needed] = fresh
                owned.extend(pages)

    def held(self) -> list[int]:
        """Rows that each sequence's pages can hold."""
        return [len(owned) * self.page_size for owned in self._owned]

    def release(self, rows: list[int]) -> None:
        """Return the pages that `rows[b]` rows do not need to the pool."""
        for sequence, (owned, count) in enumerate(zip(self._owned, rows, strict=True)):
            keep = -(-count // self.page_size)
            if len(owned) > keep:
                self._free.extend(reversed(owned[keep:]))
                self.block_table[sequence, keep : len(owned)] = -1
                del owned[keep:]

    def write(self, k: Tensor, v: Tensor, sequence: Tensor, position: Tensor) -> None:
        """Store packed rows k [T, H, Dk], v [T, H, Dv] at (sequence, position), int64 [T] each."""
        slots = page_slots(self.block_table, self.page_size, sequence, position)
        self.k_pages.flatten(0, 1)[slots] = k
        self.v_pages.flatten(0, 1)[slots] = v

    def views(self, lengths: Tensor) -> tuple[PagedKV, PagedKV]:
        """Keys and values as the operations take them; `lengths` int32 [B] rows per sequence."""
        return PagedKV(self.k_pages, self.block_table, lengths), PagedKV(self.v_pages, self.block_table, lengths)
