"""Cuts a ragged batch into pieces for dense matmuls, none of which holds a row of two sequences' product.

A `Tile` is a run of one sequence's queries with the span of its keys that they may see. A `Batch` is several short
sequences side by side, each against its own keys. Both look alike to who computes: queries [b, R], keys [b, n], with
b = 1 for a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nsa_varlen.arguments import KV
from nsa_varlen.buckets import Bucket
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.keeping import outside_inference
from nsa_varlen.kv_rows import sequence_rows
from nsa_varlen.layout import VarlenLayout

# Keys of a batch at most: it copies them. With 8 heads of 128, 256 MB of fp32.
BATCH_KEYS = 1 << 16

Position = TypeVar("Position", int, Tensor)
# position of a query -> the keys [low, high) of its sequence that it sees; both ascend with the position
Visible = Callable[[Position], tuple[Position, Position]]


class Tile(NamedTuple):
    """Packed queries [q0, q1) of one sequence, all of which see a key.

    Some of them see the sequence's keys [k0, k1), all of them [all0, all1); where all0 >= all1, no key is seen by all.
    `first_key` is the packed row of the sequence's key 0.
    """

    sequence: int
    first_key: int
    q0: int
    q1: int
    k0: int
    k1: int
    all0: int
    all1: int

    @property
    def rows(self) -> int:
        """Queries R of each sequence."""
        return self.q1 - self.q0

    @property
    def total(self) -> int:
        """Packed queries held."""
        return self.q1 - self.q0

    def steps(self, logits: int) -> Iterator[tuple[int, int]]:
        """Key ranges that cover the span, each of at most `logits` logits per head."""
        keys = max(1, logits // self.rows)
        for k0 in range(self.k0, self.k1, keys):
            yield k0, min(k0 + keys, self.k1)

    def ragged(self, k0: int, k1: int) -> Iterator[tuple[int, int]]:
        """The parts of keys [k0, k1) that not every query sees."""
        all0, all1 = (self.all0, self.all1) if self.all0 < self.all1 else (self.k1, self.k1)
        for start, end in ((k0, min(k1, all0)), (max(k0, all1), k1)):
            if start < end:
                yield start, end

    def queries(self, x: Tensor) -> Tensor:
        """Packed [Tq, ...] -> [1, R, ...]."""
        return x[None, self.q0 : self.q1]

    def put_queries(self, values: Tensor, out: Tensor) -> None:
        """Write [1, R, ...] into packed `out`."""
        out[self.q0 : self.q1] = values[0]

    def keys(self, x: KV, k0: int, k1: int) -> Tensor:
        """Keys [k0, k1) of packed or paged rows: [1, k1 - k0, H, D]."""
        return sequence_rows(x, self.sequence, self.first_key, k0, k1)[None]

    def add_keys(self, values: Tensor, k0: int, k1: int, out: Tensor) -> None:
        """Add [1, k1 - k0, H, D] to packed `out`."""
        out[self.first_key + k0 : self.first_key + k1] += values[0]


@dataclass(frozen=True)
class Batch:
    """A bucket of short sequences, computed in one step; a padded query sees nothing, a padded key is never seen.

    `visible` says which keys the queries see.
    """

    bucket: Bucket
    visible: Visible

    @property
    def rows(self) -> int:
        """Queries R of each sequence, padding included."""
        return self.bucket.max_seqlen_q

    @property
    def total(self) -> int:
        """Packed queries held."""
        return self.bucket.queries.total

    @property
    def k1(self) -> int:
        """End of the longest sequence's keys."""
        return self.bucket.max_seqlen_k

    @property
    def k0(self) -> int:
        """First key: that of the sequence."""
        return 0

    def steps(self, logits: int) -> Iterator[tuple[int, int]]:
        """All keys at once."""
        yield 0, self.k1

    def ragged(self, k0: int, k1: int) -> Iterator[tuple[int, int]]:
        """Any key may be hidden from some query."""
        yield k0, k1

    def queries(self, x: Tensor) -> Tensor:
        """Packed [Tq, ...] -> [b, R, ...], zeros in the padding."""
        return self.bucket.queries.gather(x)

    def put_queries(self, values: Tensor, out: Tensor) -> None:
        """Write the real rows of [b, R, ...] into packed `out`."""
        self.bucket.queries.scatter(values, out)

    def keys(self, x: KV, k0: int, k1: int) -> Tensor:
        """All keys: [b, n, H, D], zeros in the padding and where no query looks."""
        keys = self.bucket.keys.gather(x)
        return keys if self._unseen is None else keys.masked_fill(self._unseen, 0.0)

    @cached_property
    @outside_inference
    def _unseen(self) -> Tensor | None:
        """Keys before the first that a sequence's first query sees: bool [b, n, 1, 1]. None: there are none.

        Nobody sees them, and their rows may hold anything, NaN too, which no weight of 0 hides: those of a window's
        first page were perhaps never written. What a tile spans, some query of it sees.
        """
        if self.bucket.causal or self.visible(self.k1 - 1)[0] == 0:
            return None
        low, _ = self.visible(self.bucket.positions[:, :1])
        return (torch.arange(self.k1, device=low.device) < low)[..., None, None]

    def add_keys(self, values: Tensor, k0: int, k1: int, out: Tensor) -> None:
        """Write the real rows of [b, n, H, D] into packed `out`: nobody else has a share in these keys."""
        self.bucket.keys.scatter(values, out)


def plan(
    layout: VarlenLayout,
    blocks: BlockGeometry | None,
    visible: Visible,
    rows: int,
    short_keys: int,
    short_products: int,
    logits: int,
) -> list[Tile | Batch]:
    """Pieces that hold every query that sees a key, once each.

    Args:
        blocks: the keys are their compressed blocks, or the raw tokens for None.
        visible: keys that a position sees.
        rows: queries of a tile at most.
        short_keys, short_products: sequences with at most as many keys, and products of queries and keys, and with
            queries for one tile at most, may share a batch.
        logits: of one head, in one step.
    """
    host = layout.host
    first_seeing = 0 if blocks is None else blocks.kernel_size - 1
    first_keys = (host.cu_seqlens_k if blocks is None else host.compressed(blocks).cu_seqlens).tolist()
    spans = [
        (start, end, end_k - start_k)
        for (start, end), (start_k, end_k) in zip(
            pairwise(host.cu_seqlens_q.tolist()), pairwise(host.cu_seqlens_k.tolist()), strict=True
        )
    ]

    def tiles(sequence: int) -> Iterator[Tile]:
        start, end, num_keys = spans[sequence]
        shift = num_keys - end  # position of packed query i is i + shift
        for q0 in range(max(start, first_seeing - shift), end, rows):
            q1 = min(q0 + rows, end)
            low, all_high = visible(q0 + shift)
            all_low, high = visible(q1 - 1 + shift)
            yield Tile(sequence, first_keys[sequence], q0, q1, low, high, all_low, all_high)

    pieces: list[Tile | Batch] = []
    alone = set(range(layout.batch_size))
    lengths = [end - start for start, end in pairwise(first_keys)]
    if sum(0 < length <= short_keys for length in lengths) > 1:  # otherwise nobody needs to make buckets
        for bucket in layout.buckets(blocks):
            queries, keys = bucket.max_seqlen_q, bucket.max_seqlen_k
            short = queries <= rows and keys <= short_keys and queries * keys <= short_products
            if len(bucket.sequences) > 1 and short:
                together = max(1, min(logits // (queries * keys), BATCH_KEYS // keys))
                pieces.extend(Batch(part, visible) for part in bucket.split(together))
                alone.difference_update(bucket.sequences)
    return pieces + [tile for sequence in sorted(alone) for tile in tiles(sequence)]
