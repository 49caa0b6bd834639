"""Which rows of packed tensors a call reads and writes: as views where they are evenly spaced, by index where not.

Shapes: T packed rows, H heads, D their size; b sequences of n rows, R phases.

Folding: `phases` neighbouring rows are one row of a call, which has each of them as heads of its own. A call may take
some of the phases only (`chosen`): R of them.

`Dense` and `Packed` have the same methods. `queries` reads x [T, H, ...] for a call, and `put` writes what came of it,
of the same shape but for the last dim, back into such a tensor. `keys` reads x [T, h, D], repeated to fit the heads of
queries with so many phases, and `add` adds gradients of what it gave to such a tensor, in that one's dtype.

```
rows    0 1 2 3 4 5 6 7        phases=4, chosen=1:3      row 0: heads of rows 1 and 2
                                                         row 1: heads of rows 5 and 6
```
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Dense:
    """Rows [start, stop) of each of `batch` sequences of one length, the first of which is number `first`.

    Views throughout. Phases are R times as many heads over keys that are repeated, or, if `apart` (a single sequence
    only), a batch of R that lie interleaved, over one and the same keys, which are not copied.
    """

    first: int
    batch: int
    seqlen: int
    start: int
    stop: int
    phases: int = 1
    apart: bool = False

    @property
    def copied(self) -> bool:
        """Never."""
        return False

    def __len__(self) -> int:
        return self.batch * (self.stop - self.start) // self.phases

    def _view(self, x: Tensor) -> Tensor:
        """[b, n * phases, ...]"""
        if self.batch * self.seqlen < x.shape[0]:
            x = x[self.first * self.seqlen : (self.first + self.batch) * self.seqlen]
        rows = x.view(self.batch, self.seqlen, *x.shape[1:])
        return rows if self.stop - self.start == self.seqlen else rows[:, self.start : self.stop]

    def _folded(self, x: Tensor, chosen: slice) -> Tensor:
        """[b, n, R, H, ...]"""
        return self._view(x).unflatten(1, (-1, self.phases))[:, :, chosen]

    def queries(self, x: Tensor, chosen: slice = ALL) -> Tensor:
        """[b, n, H, ...]; with phases [b, n, R * H, ...], apart [R, n, H, ...]."""
        if self.phases == 1:
            return self._view(x)
        folded = self._folded(x, chosen)
        return folded[0].transpose(0, 1) if self.apart else folded.flatten(2, 3)

    def put(self, x: Tensor, values: Tensor, chosen: slice = ALL) -> None:
        """Values as `queries` gives rows: into x."""
        if self.phases == 1:
            self._view(x).copy_(values)
            return
        folded = self._folded(x, chosen)
        if self.apart:
            folded[0].copy_(values.transpose(0, 1))
        else:
            folded.copy_(values.unflatten(2, folded.shape[2:4]))

    def keys(self, x: Tensor, copies: int = 1) -> Tensor:
        """[b, n, h, D]; with copies [b, n, R * h, D], apart [R, n, h, D]."""
        rows = self._view(x)
        if copies == 1:
            return rows
        if self.apart:
            return rows.expand(copies, -1, -1, -1)
        return rows[:, :, None].expand(-1, -1, copies, -1, -1).flatten(2, 3)

    def add(self, x: Tensor, grads: Tensor, copies: int = 1) -> None:
        """Gradients of what `keys` gives: onto x."""
        rows = self._view(x)
        if copies == 1:
            rows += grads
        elif self.apart:
            rows[0] += grads.sum(0, dtype=x.dtype)
        else:
            rows += grads.unflatten(2, (copies, -1)).sum(2, dtype=x.dtype)

    def fill(self, x: Tensor, value: float) -> None:
        """A number into these rows of x [T, ...]."""
        self._view(x).fill_(value)


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows by number, one after another: a slice of them, or an index int64 [n, phases] in which none is twice."""

    index: Tensor | slice

    @property
    def phases(self) -> int:
        """Packed rows that are one row of the call."""
        return 1 if isinstance(self.index, slice) else self.index.shape[1]

    @property
    def copied(self) -> bool:
        """Unless they are a slice."""
        return not isinstance(self.index, slice)

    def __len__(self) -> int:
        return self.index.stop - self.index.start if isinstance(self.index, slice) else self.index.shape[0]

    def queries(self, x: Tensor, chosen: slice = ALL) -> Tensor:
        """[n, H, ...], with phases [n, R * H, ...]."""
        if isinstance(self.index, slice):
            return x[self.index]
        index = self.index[:, chosen]
        return x.index_select(0, index.flatten()).unflatten(0, index.shape).flatten(1, 2)

    def put(self, x: Tensor, values: Tensor, chosen: slice = ALL) -> None:
        """Values as `queries` gives rows: into x."""
        if isinstance(self.index, slice):
            x[self.index] = values
            return
        index = self.index[:, chosen]
        rows = values.to(x.dtype).unflatten(1, (index.shape[1], -1)).flatten(0, 1)
        x.index_copy_(0, index.flatten(), rows)

    def keys(self, x: Tensor, copies: int = 1) -> Tensor:
        """[n, h, D], with copies [n, R * h, D]."""
        rows = x[self.index] if isinstance(self.index, slice) else x.index_select(0, self.index.flatten())
        return rows if copies == 1 else rows[:, None].expand(-1, copies, -1, -1).flatten(1, 2)

    def add(self, x: Tensor, grads: Tensor, copies: int = 1) -> None:
        """Gradients of what `keys` gives: onto x."""
        rows = grads if copies == 1 else grads.unflatten(1, (copies, -1)).sum(1, dtype=x.dtype)
        if isinstance(self.index, slice):
            x[self.index] += rows
        else:
            x.index_add_(0, self.index.flatten(), rows.to(x.dtype))

    def fill(self, x: Tensor, value: float) -> None:
        """A number into these rows of x [T, ...]."""
        if isinstance(self.index, slice):
            x[self.index] = value
        else:
            x.index_fill_(0, self.index.flatten(), value)


@dataclass(frozen=True, eq=False)
class Masked:
    """Rows that a mask bool [T] names: to fill only, where no one knows on the host which they are."""

    mask: Tensor

    def fill(self, x: Tensor, value: float) -> None:
        """A number into these rows of x [T, ...]."""
        x.masked_fill_(self.mask.view(-1, *(1,) * (x.ndim - 1)), value)


Rows = Dense | Packed


def chunks(phases: int, count: int) -> list[slice]:
    """`phases` in `count` slices of nearly one size.

    Example:
        >>> chunks(16, 3)
        [slice(0, 5, None), slice(5, 10, None), slice(10, 16, None)]
    """
    ends = [phases * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
