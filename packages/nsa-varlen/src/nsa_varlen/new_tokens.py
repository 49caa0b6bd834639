"""Rows of the newest tokens of paged sequences that are still to be stored: what `decode_attention` appends."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PooledTokens:
    """Raw tokens of the compressed branch whose blocks are weighted sums of their l tokens.

    Block i is sum over j < l of weight[h, j] * x[i*d + j], summed in fp32 (fp64 of fp64) and rounded once; a rotated
    key is then turned by `rotation[:, i]` in the same precision and rounded again.

    Fields:
        k: [B, N, Hk, Dk], the new tokens before compression.
        v: [B, N, Hk, Dv], likewise.
        k_tail, v_tail: [B, R, Hk, Dk] and [B, R, Hk, Dv], rings of the tokens before and, once stored, of the new ones:
            position p is row p % R. R is at least kernel_size - 1 + N.
        k_weights, v_weights: [Hk, kernel_size] of any floating dtype; None is the mean.
        rotation: fp32 (fp64 of fp64) [2, blocks, Dk / 2], cosines and sines by which the key of each compressed block
            is rotated, of at least as many blocks as k_cmp's table has room for; None leaves keys as they are.
        interleaved: pairs (2i, 2i + 1) are rotated instead of (i, i + Dk/2).
    """

    k: Tensor
    v: Tensor
    k_tail: Tensor
    v_tail: Tensor
    k_weights: Tensor | None = None
    v_weights: Tensor | None = None
    rotation: Tensor | None = None
    interleaved: bool = False


@dataclass(frozen=True, eq=False)
class CompletedBlocks:
    """Compressed blocks that somebody else made.

    Fields:
        k: [B, E, Hk, Dk], the blocks that N tokens may complete, E = (N - 1) // d + 1. Block e of a sequence is number
            num_compressed(tokens before) + e; those beyond num_compressed(tokens) are anything.
        v: [B, E, Hk, Dv], likewise.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The N newest tokens of every sequence, of which the first counts[b] are tokens and the others padding.

    `decode_attention` stores them, and the compressed blocks that they complete, before it attends: the token in row i
    of sequence b at position lengths[b] - counts[b] + i, where the lengths of slc and win count the new tokens already.
    Padding, and rows where a sequence has no page, are not stored. The lengths of k_cmp and v_cmp are written: they
    become num_compressed(lengths). The same call again stores the same.

    Nothing is checked here; the operation raises TypeError and ValueError for what does not fit its other arguments.

    Fields:
        k_slc, k_win: [B, N, Hk, Dk]. If slc's pages serve the window too, rows of both must be equal.
        v_slc, v_win: [B, N, Hk, Dv], likewise.
        cmp: what the compressed branch gets.

    Example:
        >>> import torch
        >>> from nsa_varlen import BlockGeometry, PagedKV, reference
        >>> table, counts = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        >>> def pages(length):
        ...     return PagedKV(torch.zeros(1, 64, 1, 2), table, torch.tensor([length], dtype=torch.int32))
        >>> cmp, slc, win = pages(0), pages(32), pages(32)  # 31 tokens, all 0, and a new one
        >>> x, ring = torch.full((1, 1, 1, 2), 32.0), torch.zeros(1, 32, 1, 2)
        >>> new = NewTokens(x, x, x, x, PooledTokens(x, x, ring, ring))
        >>> q, gates = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 3)
        >>> out, _ = reference.decode_attention(
        ...     q, cmp, cmp, slc, slc, win, win, gates, counts, BlockGeometry(), new=new
        ... )
        >>> slc.pages[0, 31].tolist(), cmp.lengths.tolist(), cmp.pages[0, 0].tolist()
        ([[32.0, 32.0]], [1], [[1.0, 1.0]])
    """

    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    cmp: PooledTokens | CompletedBlocks

    def tensors(self) -> Iterator[Tensor]:
        """What a result depends on and is wholly the caller's: rows, weights and rotation; neither rings nor pages."""
        yield from (self.k_slc, self.v_slc, self.k_win, self.v_win, self.cmp.k, self.cmp.v)
        if isinstance(self.cmp, PooledTokens):
            yield from (x for x in (self.cmp.k_weights, self.cmp.v_weights, self.cmp.rotation) if x is not None)

    def rings(self) -> tuple[Tensor, ...]:
        """Those of raw tokens, if there are any: rows that nobody has written may hold anything."""
        return (self.cmp.k_tail, self.cmp.v_tail) if isinstance(self.cmp, PooledTokens) else ()
