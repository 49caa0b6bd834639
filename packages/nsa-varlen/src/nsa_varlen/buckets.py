"""Sequences of similar length as dense, right-padded batches, for whatever has no ragged form."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.keeping import outside_inference
from nsa_varlen.paged import PagedKV
from nsa_varlen.transfer import to_device

if TYPE_CHECKING:
    from nsa_varlen.layout import VarlenLayout

# Lengths n of one class: 2^(c-1) < n <= 2^c. The first class is for 0.
CLASS_ENDS = torch.tensor([0, *(1 << c for c in range(31))], device="cpu")
# Rows of a bucket's table, one column per sequence.
SEQUENCE, FIRST_QUERY, QUERIES, FIRST_KEY, KEYS, FIRST_POSITION = range(6)


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Runs of packed rows, one for each of b sequences, as a right-padded batch [b, width].

    ```
    first=[0, 5], lengths=[2, 3], width=3        packed rows 0 1 .
                                                             5 6 7
    ```

    Fields:
        sequence, first, lengths: int64 [b] on the device: number of each sequence, packed row of its run's first row,
            rows of the run.
        width: of the batch. total: rows that are real, a host int.
        start: packed row where the batch begins if it is one run without padding, otherwise None.
    """

    sequence: Tensor
    first: Tensor
    lengths: Tensor
    width: int
    total: int
    start: int | None

    @cached_property
    @outside_inference
    def rows(self) -> Tensor:
        """Packed row of each place: int64 [b, width], -1 for padding."""
        place = torch.arange(self.width, device=self.first.device)
        return torch.where(place < self.lengths[:, None], self.first[:, None] + place, -1)

    @cached_property
    @outside_inference
    def real(self) -> tuple[Tensor, Tensor]:
        """Of each real row, int64 [total]: its place in the flattened batch and its packed row."""
        member, within = _runs(self.lengths, self.total)
        return member * self.width + within, self.first[member] + within

    @cached_property
    @outside_inference
    def padding(self) -> Tensor:
        """Places of padding in the flattened batch: int64 [b * width - total]."""
        member, within = _runs(self.width - self.lengths, len(self.lengths) * self.width - self.total)
        return member * self.width + self.lengths[member] + within

    @cached_property
    @outside_inference
    def _within(self) -> Tensor:
        """Which row of its own run to read for each place: int64 [b, width], in the padding the last."""
        return torch.minimum(torch.arange(self.width, device=self.lengths.device), self.lengths[:, None] - 1)

    def gather(self, x: Tensor | PagedKV) -> Tensor:
        """Packed rows [T, ...] (or rows in pages) as a batch [b, width, ...]: zeros in the padding. Differentiable.

        A view of `x` where that is possible.
        """
        batch = len(self.lengths), self.width
        if isinstance(x, PagedKV):
            found = x.rows(self.sequence[:, None], self._within).flatten(0, 1)
        elif self.start is not None:
            found = x[self.start : self.start + self.total]
        else:
            found = x.index_select(0, (self.first[:, None] + self._within).flatten())
        if self.total < batch[0] * batch[1]:
            found.index_fill_(0, self.padding, 0)
        return found.unflatten(0, batch)

    def scatter(self, values: Tensor, out: Tensor) -> Tensor:
        """Write the real rows of a batch [b, width, ...] into packed `out` [T, ...], in its dtype, and return it.

        Differentiable in `values`.
        """
        flat = values.to(out.dtype).flatten(0, 1)
        if self.start is not None:
            out[self.start : self.start + self.total] = flat
            return out
        place, row = self.real
        return out.index_copy_(0, row, flat if self.total == len(flat) else flat.index_select(0, place))


def _runs(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(run, number within the run) of each element of runs laid end to end: int64 [total] each."""
    numbers = torch.arange(len(lengths), device=lengths.device)
    run = torch.repeat_interleave(numbers, lengths, output_size=total)
    return run, torch.arange(total, device=lengths.device) - (lengths.cumsum(0) - lengths)[run]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Some sequences of a ragged batch as one dense batch: queries [b, Sq] over keys [b, Sk], padded on the right.

    A bucket holds the queries that see a key, so that no real row of its softmax is empty; the others' result is
    known (0, with LSE -inf). Sequences without such a query are in no bucket.

    Position p of a query sees the first `p + 1` keys or, where the keys are compressed blocks, the first
    `num_compressed(p + 1)`. Padded keys come after every key that a query of their sequence sees.

    ```
    q_len = k_len = 2 and 3        keys 0 1 2             causal: the ordinary is_causal=True call on the padded
    sequence 0, query 0, 1              x . |  x x |      batch is exact, as it stands
    sequence 1, query 0, 1, 2           x . .  x x .  x x x
    ```

    Fields:
        sequences: their numbers in the layout, host ints.
        max_seqlen_q, max_seqlen_k: padded lengths Sq and Sk: those of the longest sequence here.
        causal: query i sees keys 0..i in every sequence: as many queries as keys, and the keys are raw tokens.
    """

    sequences: tuple[int, ...]
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    _table: Tensor  # int64 [6, b] on the host
    _device: torch.device
    _blocks: BlockGeometry | None  # of the compressed keys

    @cached_property
    @outside_inference
    def _columns(self) -> Tensor:
        return to_device(self._table, self._device)

    @cached_property
    @outside_inference
    def queries(self) -> PaddedRows:
        """Which packed queries the batch holds."""
        return self._padded(FIRST_QUERY, QUERIES, self.max_seqlen_q)

    @cached_property
    @outside_inference
    def keys(self) -> PaddedRows:
        """Which packed keys (or compressed blocks) it holds: all of each sequence."""
        return self._padded(FIRST_KEY, KEYS, self.max_seqlen_k)

    def _padded(self, first: int, lengths: int, width: int) -> PaddedRows:
        total = int(self._table[lengths].sum())
        starts = self._table[first]
        side_by_side = starts[0] + width * torch.arange(len(starts), device="cpu")
        whole = total == width * len(starts) and torch.equal(starts, side_by_side)
        columns = self._columns
        start = int(starts[0]) if whole else None
        return PaddedRows(columns[SEQUENCE], columns[first], columns[lengths], width, total, start)

    @property
    def q_rows(self) -> Tensor:
        """Packed row of each query: int64 [b, Sq], -1 for padding."""
        return self.queries.rows

    @property
    def k_rows(self) -> Tensor:
        """Packed row of each key, or compressed block: int64 [b, Sk], -1 for padding."""
        return self.keys.rows

    @cached_property
    @outside_inference
    def positions(self) -> Tensor:
        """Position of each query in its sequence: int64 [b, Sq], -1 for padding (which so sees nothing)."""
        place = torch.arange(self.max_seqlen_q, device=self._device)
        columns = self._columns
        return torch.where(place < columns[QUERIES][:, None], columns[FIRST_POSITION][:, None] + place, -1)

    def visible(self, window_size: int | None = None, queries: slice | None = None) -> Tensor:
        """Which keys each query sees: bool [b, Sq, Sk]; with a window, of raw keys the last `window_size` of those.

        Rows of padding are all False. `queries` asks for some of the Sq rows only.

        Example:
            >>> from nsa_varlen import VarlenLayout
            >>> (bucket,) = VarlenLayout.from_lengths([1, 1], [3, 4]).buckets()
            >>> bucket.visible().int().tolist(), bucket.visible(window_size=2).int().tolist()
            ([[[1, 1, 1, 0]], [[1, 1, 1, 1]]], [[[0, 1, 1, 0]], [[0, 0, 1, 1]]])
        """
        end = (self.positions if queries is None else self.positions[:, queries]) + 1
        if self._blocks is not None:
            end = self._blocks.num_compressed(end)
        key = torch.arange(self.max_seqlen_k, device=self._device)
        seen = key < end[..., None]
        return seen if window_size is None else seen & (key >= end[..., None] - window_size)

    def split(self, sequences: int) -> "tuple[Bucket, ...]":
        """This bucket in parts of at most `sequences` sequences, with the padded lengths of the whole."""
        parts = range(0, len(self.sequences), sequences)
        if len(parts) == 1:
            return (self,)
        return tuple(
            Bucket(
                self.sequences[i : i + sequences],
                self.max_seqlen_q,
                self.max_seqlen_k,
                self.causal,
                self._table[:, i : i + sequences],
                self._device,
                self._blocks,
            )
            for i in parts
        )


def make_buckets(layout: "VarlenLayout", blocks: BlockGeometry | None) -> tuple[Bucket, ...]:
    """The buckets of `VarlenLayout.buckets`, which says what they are."""
    host = layout.host
    cu_q, cu_k = host.cu_seqlens_q.long(), host.cu_seqlens_k.long()
    keys, first_seeing = cu_k, 0
    if blocks is not None:
        keys, first_seeing = host.compressed(blocks).cu_seqlens.long(), blocks.kernel_size - 1
    # Queries end where the raw keys end: the last k_len - first_seeing of a sequence see a key.
    seeing = torch.minimum(cu_q.diff(), cu_k.diff() - first_seeing).clamp_min_(0)
    num_keys = keys.diff()
    causal = (seeing == num_keys) & (blocks is None)
    kind = torch.bucketize(seeing, CLASS_ENDS) * len(CLASS_ENDS) + torch.bucketize(num_keys, CLASS_ENDS)
    kind, order = (kind * 2 + causal).masked_fill_(seeing == 0, -1).sort(stable=True)
    numbers = torch.arange(len(seeing), device="cpu")
    table = torch.stack((numbers, cu_q[1:] - seeing, seeing, keys[:-1], num_keys, cu_k.diff() - seeing))[:, order]
    kinds, counts = torch.unique_consecutive(kind, return_counts=True)
    found = []
    for value, columns in zip(kinds.tolist(), table.split(counts.tolist(), dim=1), strict=True):
        if value >= 0:
            longest_q, longest_k = int(columns[QUERIES].max()), int(columns[KEYS].max())
            sequences = tuple(columns[SEQUENCE].tolist())
            found.append(Bucket(sequences, longest_q, longest_k, bool(value % 2), columns, layout.device, blocks))
    return tuple(found)
