"""The last raw tokens of the compressed branch, which blocks still to come are made of."""

from collections.abc import Sequence

import torch
from nsa_varlen import VarlenLayout
from nsa_varlen.keeping import outside_inference
from nsa_varlen.transfer import to_device
from torch import Tensor


class RawTail:
    """Rings of `size` keys and values a sequence: that of position p is row p % size, until p + size comes."""

    def __init__(
        self,
        batch_size: int,
        size: int,
        num_heads: int,
        dims: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.size = size
        make = outside_inference(torch.zeros)
        self.k, self.v = (make(batch_size, size, num_heads, dim, device=device, dtype=dtype) for dim in dims)
        self._end = [0] * batch_size

    def first(self, sequence: int) -> int:
        """The earliest position that is still there."""
        return max(0, self._end[sequence] - self.size)

    def read(self, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rows k [T, H, Dk], v [T, H, Dv] at (sequence, position), int64 [T] each."""
        return self.k[sequence, position % self.size], self.v[sequence, position % self.size]

    def write(self, k: Tensor, v: Tensor, lengths: Sequence[int], total: Sequence[int]) -> None:
        """Store packed rows: the `lengths[b]` last ones of sequence b's first `total[b]`, as many as a ring holds."""
        kept = [min(new, self.size) for new in lengths]
        layout = VarlenLayout.from_lengths(kept, list(total), self.k.device)
        ends = VarlenLayout.from_lengths(list(lengths), device=self.k.device).cu_seqlens_q[1:]
        totals = to_device(torch.tensor(list(total), device="cpu"), self.k.device)
        sequence, position = layout.sequence_of_queries(), layout.positions()
        row = (ends - totals)[sequence] + position
        place = position % self.size
        self.k[sequence, place] = k[row]
        self.v[sequence, place] = v[row]
        self.advance(total)

    def write_there(self, k: Tensor, v: Tensor, sequence: Tensor, position: Tensor, there: Tensor) -> None:
        """Store k [B, N, H, Dk], v [B, N, H, Dv] at (sequence, position) [B, N] where `there` is True; N <= size."""
        place, kept = position % self.size, there[..., None, None]
        self.k[sequence, place] = k.where(kept, self.k[sequence, place])
        self.v[sequence, place] = v.where(kept, self.v[sequence, place])

    def advance(self, total: Sequence[int]) -> None:
        """What the device wrote up to these lengths, the host knows too."""
        self._end = [end if end > length else length for end, length in zip(self._end, total, strict=True)]

    def take(self, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the rows of positions `first(sequence)` to `length`, in order; none if those are gone."""
        first = min(self.first(sequence), length)
        place = torch.arange(first, length, device=self.k.device) % self.size
        return self.k[sequence, place], self.v[sequence, place]

    def put(self, sequence: int, k: Tensor, v: Tensor, length: int) -> None:
        """Make rows k [n, H, Dk], v [n, H, Dv] the last ones before position `length` of a sequence."""
        kept = min(len(k), self.size)
        place = torch.arange(length - kept, length, device=self.k.device) % self.size
        self.k[sequence, place] = k[len(k) - kept :]
        self.v[sequence, place] = v[len(v) - kept :]
        # As if it had been written as far as makes the first of these rows the earliest that is left.
        self._end[sequence] = length if kept == length else length - kept + self.size

    def forget(self, sequence: int) -> None:
        """The sequence begins anew."""
        self._end[sequence] = 0
