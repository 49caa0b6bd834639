"""The window and the compressed branch as calls of a kernel: which rows each call reads, and what they see.

Compressed attention is causal attention in disguise. Row i of the fold is the d queries from position l-1 + d*i on; all
of them see blocks 0..i. They become d times the heads, and the rows an ordinary causal batch over the blocks. Queries
of a row that is not whole (the first of a sequence that goes on from a prefix, the last of most) have calls of their
own, without a mask: less than d queries, which all see the same blocks. A decode step has no whole row (unless d = 1).

```
l=4, d=2, one sequence     blocks 0 1 2 3
positions 0..2   blind            . . . .
          3, 4   row 0            x . . .
          5, 6   row 1            x x . .          whole rows 0, 1, 2: two phases, causal over blocks 0..2
          7, 8   row 2            x x x .
          9      tail             x x x x          one query over blocks 0..3
```
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from nsa_varlen import BlockGeometry, VarlenLayout
from nsa_varlen.transfer import to_device
from torch import Tensor

from nsa_fa2.kernel import MAX_SEQUENCES, Segments
from nsa_fa2.rows import Dense, Masked, Packed, Rows


@dataclass(frozen=True, eq=False)
class Part:
    """One call of a kernel, or one for each chunk of its queries' phases.

    Fields:
        queries, keys: rows of q, out and lse, and of k and v.
        segments: of a packed call; None for a dense one.
        causal, window: as `Kernel` has them.
    """

    queries: Rows
    keys: Rows
    segments: Segments | None
    causal: bool
    window: int | None = None


@dataclass(frozen=True, eq=False)
class Branch:
    """A whole branch of a batch.

    Fields:
        parts: between them they have every query that sees something once.
        blind: the queries that see nothing: out = 0, lse = -inf. None: there are none.
        whole: there is one part, and it takes every row in order: what its call gives is the result.
    """

    parts: tuple[Part, ...]
    blind: Dense | Packed | Masked | None
    whole: bool = False


def is_uniform(layout: VarlenLayout) -> bool:
    """Whether all sequences have the same number of queries, and of keys: told from the layout's numbers alone.

    Example:
        >>> is_uniform(VarlenLayout.from_lengths([3, 3], [7, 7])), is_uniform(VarlenLayout.from_lengths([3, 2]))
        (True, False)
    """
    q, k = layout.batch_size * layout.max_seqlen_q, layout.batch_size * layout.max_seqlen_k
    return (layout.total_q, layout.total_k) == (q, k)


def window_branch(layout: VarlenLayout, blocks: BlockGeometry) -> Branch:
    """Positions (t - w, t]: one call, and one more for every MAX_SEQUENCES sequences, whose lengths are then read."""

    def build() -> Branch:
        if layout.total_q == 0 or layout.total_k == 0:
            return Branch((), Packed(slice(0, layout.total_q)))
        window = blocks.window_size if blocks.window_size < layout.max_seqlen_k else None
        if is_uniform(layout):
            return _uniform_window(layout, window)
        same = layout.cu_seqlens_q is layout.cu_seqlens_k  # then no query stands before its sequence's first key
        blind = None if same else Masked(layout.positions() < 0)
        if layout.batch_size <= MAX_SEQUENCES:
            queries, keys = Packed(slice(0, layout.total_q)), Packed(slice(0, layout.total_k))
            return Branch((Part(queries, keys, Segments.of(layout), True, window),), blind, whole=True)
        host = layout.host
        first_q, first_k = host.cu_seqlens_q[:-1].long(), host.cu_seqlens_k[:-1].long()
        sizes = host.cu_seqlens_q.long().diff(), host.cu_seqlens_k.long().diff()
        return Branch(tuple(_packed(layout, first_q, sizes[0], first_k, sizes[1], True, window)), blind)

    return layout.derive(("nsa_fa2", "win", blocks.window_size), build)


def _uniform_window(layout: VarlenLayout, window: int | None) -> Branch:
    size_q, size_k = layout.max_seqlen_q, layout.max_seqlen_k
    batches = _batches(layout.batch_size)
    parts = tuple(
        Part(Dense(*batch, size_q, 0, size_q), Dense(*batch, size_k, 0, size_k), None, True, window)
        for batch in batches
    )
    blind = Dense(0, layout.batch_size, size_q, 0, size_q - size_k) if size_q > size_k else None
    return Branch(parts, blind, whole=len(parts) == 1)


def compressed_branch(layout: VarlenLayout, blocks: BlockGeometry, *, apart: bool = True) -> Branch:
    """The visible compressed blocks: whole rows of the fold, and the queries before and after them.

    Reads a layout's offsets once if they live on a device only; see `VarlenLayout`. `apart`: of a single sequence the
    phases are a batch, see `Dense`.
    """

    def build() -> Branch:
        if layout.total_q == 0 or layout.compressed(blocks).total == 0:
            return Branch((), Packed(slice(0, layout.total_q)))
        return _uniform_compressed(layout, blocks, apart) if is_uniform(layout) else _ragged_compressed(layout, blocks)

    return layout.derive(("nsa_fa2", "cmp", blocks.kernel_size, blocks.kernel_stride, apart), build)


class Spans(NamedTuple):
    """How the queries of each sequence fall apart, int64 [B] each.

    In this order: `blind` of them see no block, `head` stand in a row of the fold that begins before them, `rows` rows
    are whole, `tail` stand in one that ends after them. `head_keys`, `row_keys`, `tail_keys` blocks are seen by the
    head, by the last whole row, by the tail.
    """

    blind: Tensor
    head: Tensor
    rows: Tensor
    tail: Tensor
    head_keys: Tensor
    row_keys: Tensor
    tail_keys: Tensor

    @classmethod
    def of(cls, q_len: Tensor, k_len: Tensor, blocks: BlockGeometry) -> "Spans":
        """Of sequences with so many queries and raw keys.

        Example:
            >>> geometry = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4)
            >>> [x.item() for x in Spans.of(torch.tensor([6]), torch.tensor([10]), geometry)]  # positions 4 to 9
            [0, 1, 2, 1, 1, 3, 4]
        """
        d = blocks.kernel_stride
        # Places in the fold, d to a row: position l-1 is place 0.
        end = (k_len - (blocks.kernel_size - 1)).clamp_min(0)
        start = (k_len - q_len - (blocks.kernel_size - 1)).clamp_min(0).minimum(end)
        first, last = (start + d - 1) // d, end // d  # whole rows [first, last); first = last + 1 where none begins
        head = torch.minimum(first * d, end) - start
        return cls(
            blind=q_len - (end - start),
            head=head,
            rows=(last - first).clamp_min(0),
            tail=torch.where(first > last, 0, end - last * d),
            head_keys=first,
            row_keys=last,
            tail_keys=last + 1,
        )


def _uniform_compressed(layout: VarlenLayout, blocks: BlockGeometry, apart: bool) -> Branch:
    q_len, k_len = (torch.tensor([size], device="cpu") for size in (layout.max_seqlen_q, layout.max_seqlen_k))
    blind, head, rows, _, *num_keys = (int(x) for x in Spans.of(q_len, k_len, blocks))
    num_cmp, d = blocks.num_compressed(layout.max_seqlen_k), blocks.kernel_stride
    ends = (blind, blind + head, blind + head + rows * d, layout.max_seqlen_q)
    apart = apart and layout.batch_size == 1
    parts = []
    for batch in _batches(layout.batch_size):
        for (start, stop), seen, folded in zip(pairwise(ends), num_keys, (False, True, False), strict=True):
            if stop > start:
                queries = Dense(*batch, layout.max_seqlen_q, start, stop, d if folded else 1, apart)
                parts.append(Part(queries, Dense(*batch, num_cmp, 0, seen, apart=apart), None, causal=folded))
    hidden = Dense(0, layout.batch_size, layout.max_seqlen_q, 0, blind) if blind else None
    return Branch(tuple(parts), hidden)


def _ragged_compressed(layout: VarlenLayout, blocks: BlockGeometry) -> Branch:
    host = layout.host
    cu_q = host.cu_seqlens_q.long()
    first_k = host.compressed(blocks).cu_seqlens[:-1].long()
    spans = Spans.of(cu_q.diff(), host.cu_seqlens_k.long().diff(), blocks)
    head = cu_q[:-1] + spans.blind
    row = head + spans.head
    tail = row + spans.rows * blocks.kernel_stride
    parts = _packed(layout, row, spans.rows, first_k, spans.row_keys, True, phases=blocks.kernel_stride)
    if bool(((spans.head > 0) & (spans.tail > 0)).any()):
        parts += _packed(layout, head, spans.head, first_k, spans.head_keys, False)
        parts += _packed(layout, tail, spans.tail, first_k, spans.tail_keys, False)
    else:  # a decode step, above all: one call
        first = torch.where(spans.head > 0, head, tail)
        num_keys = torch.where(spans.head > 0, spans.head_keys, spans.tail_keys)
        parts += _packed(layout, first, spans.head + spans.tail, first_k, num_keys, False)
    blind = _runs(cu_q[:-1], spans.blind, layout.device) if bool(spans.blind.any()) else None
    return Branch(tuple(parts), blind)


def _packed(
    layout: VarlenLayout,
    first_q: Tensor,
    num_q: Tensor,
    first_k: Tensor,
    num_k: Tensor,
    causal: bool,
    window: int | None = None,
    phases: int = 1,
) -> list[Part]:
    """Packed calls over rows [first_k, first_k + num_k) of the sequences that have a query in it.

    `num_q` counts rows of the call, of `phases` queries each. All int64 [B] on the host.
    """
    sequences = (num_q > 0).nonzero().flatten()
    parts = []
    for chosen in sequences.split(MAX_SEQUENCES) if len(sequences) else ():
        q, k = num_q[chosen], num_k[chosen]
        segments = Segments.of(VarlenLayout.from_lengths(q.tolist(), k.tolist(), layout.device))
        queries = _runs(first_q[chosen], q * phases, layout.device, phases)
        parts.append(Part(queries, _runs(first_k[chosen], k, layout.device), segments, causal, window))
    return parts


def _runs(first: Tensor, lengths: Tensor, device: torch.device, phases: int = 1) -> Packed:
    """Rows [first, first + length) of each sequence, one run after another: int64 [B] each on the host."""
    ends = first + lengths
    if phases == 1 and torch.equal(first[1:], ends[:-1]):
        return Packed(slice(int(first[0]), int(ends[-1])))
    runs = VarlenLayout.from_lengths(lengths.tolist(), device=device)
    rows = to_device(first, device)[runs.sequence_of_keys()] + runs.key_positions()
    return Packed(rows.unflatten(0, (-1, phases)))


def _batches(size: int) -> list[tuple[int, int]]:
    """(first, number) of sequences, at most MAX_SEQUENCES at a time."""
    return [(first, min(MAX_SEQUENCES, size - first)) for first in range(0, size, MAX_SEQUENCES)]
