"""Where each sequence of a packed batch begins and ends: the one owner of cu_seqlens and positions."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from nsa_varlen.buckets import Bucket, make_buckets
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.transfer import to_device

Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class CompressedLayout:
    """Offsets of each sequence's compressed blocks in a packed [Tc, H, D] tensor.

    It has no positions of its own: block i of a sequence begins at raw position i*d, which
    `VarlenLayout.compressed_starts` gives.

    Fields:
        cu_seqlens: int32 [B+1], offsets into the Tc packed blocks.
        max_seqlen: most blocks of one sequence.
        total: Tc.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    total: int


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """A ragged batch, packed: B sequences of queries over B sequences of keys, bottom-right aligned.

    Query i of a sequence with q_len queries and k_len keys sits at position k_len - q_len + i. Whole prefill
    (q_len = k_len), chunked or prefix-cached prefill and decode (q_len < k_len) are one case:

    ```
    q_len=2, k_len=5        key  0 1 2 3 4
    query 0, position 3          x x x x .
    query 1, position 4          x x x x x
    ```

    With q_len > k_len the first positions are negative; those queries see no key.

    Whatever a layout derives (positions, compressed layouts, a backend's tiles) it computes once and keeps: the
    tensors that its methods return are shared, not to be written to.

    Fields:
        cu_seqlens_q, cu_seqlens_k: int32 [B+1], ascending from 0 to total_q and total_k, on one device.
        max_seqlen_q, max_seqlen_k: longest sequence, host ints.
        total_q, total_k: packed rows of q and of k/v, host ints.

    Synchronisation: no builder reads a device where the caller has given the host numbers. `from_lengths` never does;
    the other builders read the offsets once if a number is missing. The contents of cu_seqlens are checked where they
    can be read for nothing (on the CPU) or are read anyway. What needs every length on the host (`host`, `compressed`,
    `buckets`, `block_spans`) reads the offsets once, on the first use of any of them, of a layout whose offsets live on
    a device only: one built there by the constructor, or from offsets and all the numbers.

    Raises:
        TypeError: cu_seqlens are not int32 tensors, or a count is not an int.
        ValueError: wrong shapes, devices, an offset that decreases, or ends that are not total_q and total_k.

    Example:
        >>> layout = VarlenLayout.from_lengths([2, 3], [5, 3])
        >>> layout.positions().tolist()
        [3, 4, 0, 1, 2]
        >>> layout.cu_seqlens_k.tolist(), layout.max_seqlen_k
        ([0, 5, 8], 5)
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    total_q: int
    total_k: int
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_seqlen_q", "max_seqlen_k", "total_q", "total_k"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        _check_offset_tensors(self.cu_seqlens_q, self.cu_seqlens_k)
        if self.cu_seqlens_q.device.type == "cpu" and not torch.compiler.is_compiling():
            for side in "qk":
                total, longest = getattr(self, f"total_{side}"), getattr(self, f"max_seqlen_{side}")
                _check_offsets(f"cu_seqlens_{side}", getattr(self, f"cu_seqlens_{side}").tolist(), total, longest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}  # what a backend derived may hold functions, which do not pickle

    @classmethod
    def from_lengths(
        cls, q: Sequence[int], k: Sequence[int] | None = None, device: torch.device | str | None = None
    ) -> Self:
        """From host lengths: `q` queries and `k` keys per sequence (`k=None`: as many keys as queries).

        Raises:
            TypeError: a length is not an int.
            ValueError: a length is negative, or q and k differ in number.
        """
        k = q if k is None else k
        for name, lengths in (("q", q), ("k", k)):
            if not isinstance(lengths, Sequence):
                raise TypeError(f"{name}: expected a sequence of ints, got {type(lengths).__name__}")
            for length in lengths:
                if type(length) is not int:
                    raise TypeError(f"{name}: expected ints, got {length!r} of type {type(length).__name__}")
                if length < 0:
                    raise ValueError(f"{name}: expected lengths of at least 0, got {length}")
        if len(q) != len(k):
            raise ValueError(f"k: expected {len(q)} lengths, as many as q, got {len(k)}")
        ends = [list(accumulate(lengths, initial=0)) for lengths in (q, k)]
        cu_q = torch.tensor(ends[0], dtype=torch.int32, device="cpu")
        cu_k = cu_q if k is q else torch.tensor(ends[1], dtype=torch.int32, device="cpu")
        host = cls(cu_q, cu_k, max([0, *q]), max([0, *k]), ends[0][-1], ends[1][-1])  # Dynamo knows no max(default=)
        return host if device is None else host.to(device)

    @classmethod
    def from_shape(cls, batch_size: int, length: int, device: torch.device | str | None = None) -> Self:
        """`batch_size` sequences of `length` tokens each, as a batch [B, S, ...] has them without padding.

        Its offsets are computed where they are needed, on the host and on the device: nothing is copied or read, and
        torch.compile traces it with symbolic sizes.

        Raises:
            TypeError: a size is not an int.
            ValueError: a size is negative.

        Example:
            >>> VarlenLayout.from_shape(3, 2).cu_seqlens_q.tolist()
            [0, 2, 4, 6]
        """
        for name, size in (("batch_size", batch_size), ("length", length)):
            if type(size) is not int:
                raise TypeError(f"{name}: expected an int, got {size!r} of type {type(size).__name__}")
            if size < 0:
                raise ValueError(f"{name}: expected at least 0, got {size}")
        longest, total = length if batch_size else 0, batch_size * length
        numbers = longest, longest, total, total
        cu_seqlens = _even_offsets(batch_size, length, "cpu" if device is None else device)
        layout = cls(cu_seqlens, cu_seqlens, *numbers)
        if layout.device.type != "cpu" and not torch.compiler.is_compiling():
            host = _even_offsets(batch_size, length, "cpu")
            layout._derived["host"] = cls(host, host, *numbers)
        return layout

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_q: Tensor,
        cu_k: Tensor | None = None,
        *,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        total_q: int | None = None,
        total_k: int | None = None,
    ) -> Self:
        """From int32 offsets [B+1]; `cu_k=None`: the same keys as queries, whose numbers then serve the keys too.

        With a number missing the offsets are read: one synchronisation. With all of them nothing on a device is read
        here, and nothing there checked; on the CPU, contents always are.

        Raises:
            TypeError, ValueError: as the constructor.

        Example:
            >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
            >>> VarlenLayout.from_cu_seqlens(cu_seqlens).max_seqlen_k
            3
            >>> unread = VarlenLayout.from_cu_seqlens(cu_seqlens.to("meta"), max_seqlen_q=3, total_q=5)
            >>> unread.total_k
            5
        """
        if cu_k is None:
            cu_k = cu_q
            max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
            total_k = total_q if total_k is None else total_k
        if max_seqlen_q is not None and max_seqlen_k is not None and total_q is not None and total_k is not None:
            return cls(cu_q, cu_k, max_seqlen_q, max_seqlen_k, total_q, total_k)
        _check_offset_tensors(cu_q, cu_k)
        if cu_q.device.type == "cpu":
            host_q, host_k = cu_q, cu_k
        else:
            host_q, host_k = torch.stack((cu_q, cu_k)).cpu().unbind()
        counts = (
            _longest(host_q) if max_seqlen_q is None else max_seqlen_q,
            _longest(host_k) if max_seqlen_k is None else max_seqlen_k,
            int(host_q[-1]) if total_q is None else total_q,
            int(host_k[-1]) if total_k is None else total_k,
        )
        host = cls(host_q, host_k, *counts)
        if cu_q.device.type == "cpu":
            return host
        layout = cls(cu_q, cu_k, *counts)
        layout._derived["host"] = host
        return layout

    @classmethod
    def from_padding_mask(cls, mask: Tensor, *, max_seqlen: int | None = None, total: int | None = None) -> Self:
        """From a bool mask [B, S], True where a token is real; padding may lie left, right or inside.

        `max_seqlen` and `total` are the most real tokens of a sequence and of all; see `from_cu_seqlens` for what they
        save.

        Raises:
            TypeError: the mask is not a bool tensor, or a number not an int.
            ValueError: it is not 2-D, or, where it is read, a number is not the mask's.

        Example:
            >>> VarlenLayout.from_padding_mask(torch.tensor([[False, True], [True, True]])).cu_seqlens_q.tolist()
            [0, 1, 3]
        """
        check_padding_mask(mask)
        ends = mask.sum(1).cumsum(0, dtype=torch.int32)
        return cls.from_cu_seqlens(torch.nn.functional.pad(ends, (1, 0)), max_seqlen_q=max_seqlen, total_q=total)

    @property
    def batch_size(self) -> int:
        """Number of sequences, empty ones included."""
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Device of the offsets."""
        return self.cu_seqlens_q.device

    @property
    def host(self) -> "VarlenLayout":
        """This layout on the CPU. For a directly built device layout the first use synchronises once."""
        if self.device.type == "cpu":
            return self
        return self.derive("host", lambda: self._moved(torch.device("cpu")))

    def to(self, device: torch.device | str) -> Self:
        """The same layout on `device`, keeping its host copy. From the host to a GPU without waiting for the copy."""
        device = torch.device(device)
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        moved = self._moved(device)
        if device.type != "cpu":
            moved._derived["host"] = self.host
        return moved

    def pin_memory(self) -> Self:
        """The same layout in pinned host memory, from which `to` copies at once; a DataLoader with pin_memory calls it.

        Raises:
            ValueError: the layout is not on the CPU.
        """
        if self.device.type != "cpu":
            raise ValueError(f"layout: expected one on the CPU to pin, got {self.device}")
        return self._mapped(Tensor.pin_memory)

    def _moved(self, device: torch.device) -> Self:
        return self._mapped(lambda x: to_device(x, device))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        cu_q = function(self.cu_seqlens_q)
        cu_k = cu_q if self.cu_seqlens_k is self.cu_seqlens_q else function(self.cu_seqlens_k)
        return type(self)(cu_q, cu_k, self.max_seqlen_q, self.max_seqlen_k, self.total_q, self.total_k)

    def derive(self, key: Hashable, build: Callable[[], Derived]) -> Derived:
        """`build()` on the first call with `key`, afterwards the same object: what follows from a layout is kept in it.

        `build` runs outside inference mode and without gradients: what it makes may serve in training later.

        Example:
            >>> layout = VarlenLayout.from_lengths([3])
            >>> layout.derive("tiles", lambda: [(0, 3)]) is layout.derive("tiles", list)
            True
        """
        if key not in self._derived:
            with torch.inference_mode(False), torch.no_grad():  # as `outside_inference`, which Dynamo cannot trace here
                self._derived[key] = build()
        value: Derived = self._derived[key]
        return value

    def is_whole(self) -> bool:
        """Whether each sequence has as many keys as queries: nothing came before them.

        Known for nothing where the offsets of both are one tensor, as the builders make them. Else read once, on first
        use, as for `host`.
        """
        if self.cu_seqlens_q is self.cu_seqlens_k:
            return True
        return self.derive("is_whole", lambda: torch.equal(self.host.cu_seqlens_q, self.host.cu_seqlens_k))

    def sequence_of_queries(self) -> Tensor:
        """Index of the sequence that each packed query belongs to: int64 [Tq]."""
        return self.derive("sequence_of_queries", lambda: _sequence_of_rows(self.cu_seqlens_q, self.total_q))

    def sequence_of_keys(self) -> Tensor:
        """Index of the sequence that each packed key belongs to: int64 [Tk]."""
        return self.derive("sequence_of_keys", lambda: _sequence_of_rows(self.cu_seqlens_k, self.total_k))

    def positions(self) -> Tensor:
        """Position of each packed query in its sequence, k_len - q_len + i: int64 [Tq]. Negative if q_len > k_len."""

        def build() -> Tensor:
            # The last query sits on the last key: packed row cu_q[b+1] - 1 has position k_len[b] - 1.
            shift = self.cu_seqlens_k.long().diff() - self.cu_seqlens_q[1:].long()
            return torch.arange(self.total_q, device=self.device) + shift[self.sequence_of_queries()]

        return self.derive("positions", build)

    def key_positions(self) -> Tensor:
        """Position of each packed key in its sequence: int64 [Tk]."""

        def build() -> Tensor:
            rows = torch.arange(self.total_k, device=self.device)
            return rows - self.cu_seqlens_k[:-1].long()[self.sequence_of_keys()]

        return self.derive("key_positions", build)

    def last_keys(self) -> Tensor:
        """Packed row of the key at each query's own position: int64 [Tq]. Not the sequence's where that is negative."""
        return self.derive(
            "last_keys", lambda: self.positions() + self.cu_seqlens_k[:-1].long()[self.sequence_of_queries()]
        )

    def block_offsets(self, blocks: BlockGeometry) -> Tensor:
        """Number of each sequence's selection block 0, all sequences' blocks counted in a row: int64 [B]."""

        def build() -> Tensor:
            counts = blocks.num_blocks(self.cu_seqlens_k.long().diff())
            return counts.cumsum(0) - counts

        return self.derive(("block_offsets", blocks.block_size), build)

    def block_spans(self, blocks: BlockGeometry) -> list[tuple[int, int]]:
        """Packed keys [first, end) of each selection block, in the order of `block_offsets`, on the host.

        Example:
            >>> blocks = BlockGeometry(kernel_size=4, kernel_stride=4, block_size=4)
            >>> VarlenLayout.from_lengths([3, 5]).block_spans(blocks)
            [(0, 3), (3, 7), (7, 8)]
        """

        def build() -> list[tuple[int, int]]:
            return [
                (start, min(start + blocks.block_size, end))
                for begin, end in pairwise(self.host.cu_seqlens_k.tolist())
                for start in range(begin, end, blocks.block_size)
            ]

        return self.derive(("block_spans", blocks.block_size), build)

    def compressed(self, blocks: BlockGeometry) -> CompressedLayout:
        """Layout of the compressed blocks of this layout's keys: num_cmp(k_len) per sequence.

        Reads the offsets once, on first use, where they live on a device only; see the class.
        """

        def build() -> CompressedLayout:
            if self.total_k == self.batch_size * self.max_seqlen_k:  # no sequence is longer, so all are as long
                count = blocks.num_compressed(self.max_seqlen_k)
                even = _even_offsets(self.batch_size, count, self.device)
                return CompressedLayout(even, count, self.batch_size * count)
            lengths = [blocks.num_compressed(end - start) for start, end in pairwise(self.host.cu_seqlens_k.tolist())]
            cu_seqlens = list(accumulate(lengths, initial=0))
            offsets = to_device(torch.tensor(cu_seqlens, dtype=torch.int32, device="cpu"), self.device)
            return CompressedLayout(offsets, max([0, *lengths]), cu_seqlens[-1])

        return self.derive(("compressed", blocks.kernel_size, blocks.kernel_stride), build)

    def buckets(self, blocks: BlockGeometry | None = None) -> tuple[Bucket, ...]:
        """This batch as dense ones: sequences of similar lengths together, right-padded. See `Bucket`.

        The keys are the raw tokens or, with `blocks`, the compressed blocks. A bucket's queries and keys are both
        rounded up to the same powers of two, and padded to the longest of them only: less than twice the rows on
        either side, less than 4 times the products of queries and keys. Sequences with as many queries as keys are
        never mixed with others, and order is kept within a bucket.

        Reads the offsets once, on first use, where they live on a device only; see the class.

        Raises:
            TypeError: blocks are no BlockGeometry.

        Example:
            >>> layout = VarlenLayout.from_lengths([7, 1, 5, 0], [7, 20, 5, 9])
            >>> [(bucket.sequences, bucket.q_rows.shape, bucket.causal) for bucket in layout.buckets()]
            [((1,), torch.Size([1, 1]), False), ((0, 2), torch.Size([2, 7]), True)]
        """
        if blocks is None:
            return self.derive("buckets", lambda: make_buckets(self, None))
        if not isinstance(blocks, BlockGeometry):
            raise TypeError(f"blocks: expected a BlockGeometry or None, got {type(blocks).__name__}")
        return self.derive(("buckets", blocks.kernel_size, blocks.kernel_stride), lambda: make_buckets(self, blocks))

    def sequence_of_compressed(self, blocks: BlockGeometry) -> Tensor:
        """Index of the sequence that each packed compressed block belongs to: int64 [Tc]."""

        def build() -> Tensor:
            compressed = self.compressed(blocks)
            return _sequence_of_rows(compressed.cu_seqlens, compressed.total)

        return self.derive(("sequence_of_compressed", blocks.kernel_size, blocks.kernel_stride), build)

    def compressed_starts(self, blocks: BlockGeometry) -> Tensor:
        """Position i*d at which each packed compressed block begins in its sequence: int64 [Tc]."""

        def build() -> Tensor:
            compressed = self.compressed(blocks)
            rows = torch.arange(compressed.total, device=self.device)
            number = rows - compressed.cu_seqlens.long()[self.sequence_of_compressed(blocks)]
            return number * blocks.kernel_stride

        return self.derive(("compressed_starts", blocks.kernel_size, blocks.kernel_stride), build)


def check_padding_mask(mask: Tensor, name: str = "mask") -> None:
    """Raise unless `mask` is a bool tensor [B, S]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor [B, S], got {got}")
    if mask.ndim != 2:
        raise ValueError(f"{name}: expected shape [B, S], got {list(mask.shape)}")


def _check_offset_tensors(cu_q: Tensor, cu_k: Tensor) -> None:
    """Raise unless both are int32 [B+1] on one device; contents are not read."""
    for name, cu_seqlens in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
            got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"{name}: expected an int32 tensor [B+1], got {got}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{name}: expected shape [B+1], got {list(cu_seqlens.shape)}")
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected as many sequences as cu_seqlens_q, {len(cu_q) - 1}, got {len(cu_k) - 1}"
        )
    if cu_q.device != cu_k.device:
        raise ValueError(f"cu_seqlens_k: expected the device of cu_seqlens_q, {cu_q.device}, got {cu_k.device}")


def _even_offsets(batch_size: int, length: int, device: torch.device | str) -> Tensor:
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length


def _longest(host_cu_seqlens: Tensor) -> int:
    """Longest sequence; 0 where there is none, or where offsets that are no offsets descend."""
    return max(0, int(host_cu_seqlens.diff().max())) if len(host_cu_seqlens) > 1 else 0


def _sequence_of_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    batch_size = cu_seqlens.shape[0] - 1
    sequences = torch.arange(batch_size, device=cu_seqlens.device)
    if batch_size == 1:
        return sequences.new_zeros(total)
    return torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=total)


def _check_offsets(name: str, offsets: list[int], total: int, longest: int) -> None:
    if offsets[0] != 0:
        raise ValueError(f"{name}: expected the first offset to be 0, got {offsets[0]}")
    lengths = [end - start for start, end in pairwise(offsets)]
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{name}: expected ascending offsets, got {offsets[index]} before {offsets[index + 1]}")
    side = name[-1]
    if offsets[-1] != total:
        raise ValueError(f"{name}: expected the last offset to be total_{side}={total}, got {offsets[-1]}")
    if max(lengths, default=0) != longest:
        raise ValueError(f"max_seqlen_{side}: expected {max(lengths, default=0)} from {name}, got {longest}")
