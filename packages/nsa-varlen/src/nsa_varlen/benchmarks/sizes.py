"""What attention has to compute and to move, counted from sizes alone."""

from nsa_varlen.geometry import BlockGeometry


def seen_compressed(tokens: int, blocks: BlockGeometry) -> int:
    """Pairs of a query and a compressed block that it sees, over one sequence: the sum of num_cmp(t) for t = 1..S.

    Example:
        >>> blocks = BlockGeometry()
        >>> seen_compressed(100, blocks) == sum(blocks.num_compressed(t) for t in range(1, 101))
        True
    """
    count = blocks.num_compressed(tokens)
    # Block i is seen by the queries from its last token on: S - (i d + l - 1) of them.
    return count * (tokens - blocks.kernel_size + 1) - blocks.kernel_stride * count * (count - 1) // 2


def seen_selected(tokens: int, blocks: BlockGeometry) -> int:
    """Pairs of a query and a key of its topk blocks, over one sequence.

    Example:
        >>> seen_selected(70, BlockGeometry()) == sum(range(1, 71))  # fewer blocks than topk: all keys
        True
    """
    full = min(tokens, blocks.topk * blocks.block_size)
    rest = tokens - full
    # Later queries see topk - 1 whole blocks, and of their own 1 to block_size keys.
    whole, part = divmod(rest, blocks.block_size)
    own = whole * blocks.block_size * (blocks.block_size + 1) // 2 + part * (part + 1) // 2
    return full * (full + 1) // 2 + rest * (blocks.topk - 1) * blocks.block_size + own


def seen_window(tokens: int, window: int) -> int:
    """Pairs of a query and a key of its window, over one sequence; a window of all tokens is causal attention.

    Example:
        >>> seen_window(5, 2), seen_window(5, 5)
        (9, 15)
    """
    short = min(tokens, window)
    return short * (short + 1) // 2 + (tokens - short) * window
