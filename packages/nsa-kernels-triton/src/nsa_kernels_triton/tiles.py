"""How many programs a packed batch takes, and how a head is cut: the host's side of `kernels.tiles` and `pieces`."""

from functools import cache

from torch import Tensor

LOG2_E = 1.4426950408889634  # exponentials are taken in base 2


def count_tiles(total: int, batch_size: int, size: int) -> int:
    """Numbers that tiles of `size` rows of a packed batch may have, whatever its offsets: no device is read.

    Example:
        >>> count_tiles(total=300, batch_size=2, size=128)
        4
    """
    return total // size + batch_size


def pieces(dim: int) -> tuple[int, int]:
    """Widths of the one or two pieces, powers of two from 16, that hold `dim` columns: (width, 0) or (first, second).

    Example:
        >>> [pieces(dim) for dim in (8, 64, 96, 120, 192)]
        [(16, 0), (64, 0), (64, 32), (128, 0), (128, 64)]
    """
    first = max(16, 1 << (dim.bit_length() - 1))
    if first >= dim:
        return first, 0
    second = max(16, 1 << (dim - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


SWIZZLED = 64  # columns of half precision that shared memory arranges alike, whatever more a row has


@cache
def pieces_alike(head_dim: int, v_head_dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """`pieces` of rows of k and of v, the narrower padded until its pieces lie in shared memory as those beside them.

    For tiles of k and v that take turns in one place. Where they lie there differently, ptxas 12.8 reads one of them
    from a register that it never set: docs/triton-forward.md.

    Example:
        >>> pieces_alike(96, 80), pieces_alike(192, 128)
        (((64, 32), (64, 32)), ((128, 64), (128, 0)))
    """
    widest = max(head_dim, v_head_dim)

    def fits(widths: tuple[int, int]) -> bool:
        both = ((a, b) for a, b in zip(widths, pieces(widest), strict=True) if a and b)
        return all(min(a, SWIZZLED) == min(b, SWIZZLED) for a, b in both)

    k, v = (next(filter(fits, map(pieces, range(dim, widest + 1)))) for dim in (head_dim, v_head_dim))
    return k, v


def row_bytes(q: Tensor, v: Tensor) -> int:
    """`padded_bytes` of q [T, H, Dk] and v [T, H, Dv]."""
    return padded_bytes(q.shape[2], v.shape[2], q.element_size())


def padded_bytes(head_dim: int, v_head_dim: int, itemsize: int) -> int:
    """Bytes of one row of a head, padded as `pieces` says: of q and k or of v, whichever is wider."""
    return max(sum(pieces(dim)) for dim in (head_dim, v_head_dim)) * itemsize


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`, 1 for none."""
    return 1 << max(0, count - 1).bit_length()


def evenly(total: int, most: int) -> int:
    """How many of `total` to take at a time, at most `most` and at least one, so that the turns are much the same.

    Example:
        >>> evenly(1025, 513), evenly(16, 7), evenly(5, 0)
        (513, 6, 1)
    """
    return -(-total // -(-total // max(1, most)))
