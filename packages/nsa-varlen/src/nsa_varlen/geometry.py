"""The sizes that define the three branches, and what follows from them alone."""

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class BlockGeometry:
    """Block sizes of Native Sparse Attention (arXiv 2502.11089, section 3.3), in tokens unless noted.

    ```
    kernel_size l, kernel_stride d    compressed block i covers [i*d, i*d + l)
    block_size l'                     selection block j covers [j*l', (j+1)*l')
    topk n (blocks)                   blocks that one query attends to, the forced ones included
    init_blocks, local_blocks         forced: the first, and the last up to the query's own
    window_size w                     positions (t - w, t]
    ```

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative or zero where it may not be, `kernel_stride` does not divide `kernel_size` or
            `block_size`, `kernel_size > block_size`, `local_blocks < 1`, or `topk < init_blocks + local_blocks`.

    Example:
        >>> blocks = BlockGeometry()
        >>> blocks.num_compressed(64), blocks.num_blocks(65), blocks.reads(65_536)
        (3, 2, 5631)
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int:
                raise TypeError(f"{field.name}: expected an int, got {value!r} of type {type(value).__name__}")
            least = 0 if field.name == "init_blocks" else 1
            if value < least:
                raise ValueError(f"{field.name}: expected at least {least}, got {value}")
        for name, value in (("kernel_size", self.kernel_size), ("block_size", self.block_size)):
            if value % self.kernel_stride:
                raise ValueError(
                    f"kernel_stride: expected a divisor of {name}, "
                    f"got {name}={value}, kernel_stride={self.kernel_stride}"
                )
        if self.kernel_size > self.block_size:
            raise ValueError(
                f"kernel_size: expected at most block_size, got kernel_size={self.kernel_size}, "
                f"block_size={self.block_size}"
            )
        if self.topk < self.init_blocks + self.local_blocks:
            raise ValueError(
                f"topk: expected at least init_blocks + local_blocks, got topk={self.topk}, "
                f"init_blocks={self.init_blocks}, local_blocks={self.local_blocks}"
            )

    def num_compressed(self, length: Count) -> Count:
        """Compressed blocks that `length` tokens complete: 0 if S < l, else (S - l)//d + 1. Takes ints or tensors.

        A query at position t sees `num_compressed(t + 1)` of them; lengths below zero count as zero.
        """
        if isinstance(length, Tensor):
            count = torch.div(length - self.kernel_size, self.kernel_stride, rounding_mode="floor") + 1
            return count.clamp_min(0)
        return max(0, (length - self.kernel_size) // self.kernel_stride + 1)

    def num_blocks(self, length: Count) -> Count:
        """Selection blocks that `length` tokens touch: ceil(S / l'). Takes ints or tensors."""
        if isinstance(length, Tensor):
            return torch.div(length + self.block_size - 1, self.block_size, rounding_mode="floor").clamp_min(0)
        return max(0, -(-length // self.block_size))

    def reads(self, length: int) -> int:
        """Token budget of one query over `length` keys: num_cmp(S) + n*l' + min(w, S). Monotone in S.

        This is the upper bound that the sizes promise; `nsa.reads.count_reads` counts what real indices read.
        """
        return self.num_compressed(length) + self.topk * self.block_size + min(self.window_size, length)
