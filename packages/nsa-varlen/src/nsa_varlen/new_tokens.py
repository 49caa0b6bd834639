"""Rows of the newest tokens of paged sequences that are still to be stored: what `decode_attention` appends."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PooledTokens:
    """Raw tokens of the compressed branch whose blocks are weighted sums of their l tokens.

    Block i is sum over j < l of weight[h, j] * x[i*d + j], summed in fp32 (fp64 of fp64) and rounded once; a rotated key
    is then turned by `rotation[:, i]` in the same precision and rounded again.

    Fields:
        k: [B, N, Hk, Dk], v: [B, N, Hk, Dv], the new tokens before compression.
        k_tail, v_tail: [B, R, Hk, Dk] and [B, R, Hk, Dv], rings of the tokens before and, once stored, of the new ones:
            position p is row p % R. R is at least kernel_size - 1 + N.
        k_weights, v_weights: [Hk, kernel_size] of any floating dtype; None is the mean.
        rotation: fp32 [2, blocks, Dk / 2], cosines and sines by which the key of each compressed block is rotated; None
            leaves keys as they are.
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
        k: [B, E, Hk, Dk], v: [B, E, Hk, Dv], the blocks that N tokens may complete, E = (N - 1) // d + 1. Block e of a
            sequence is number num_compressed(tokens before) + e; those beyond num_compressed(tokens) are anything.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The N newest tokens of every sequence, of which the first counts[b] are tokens and the others padding.

    Fields:
        k_slc, k_win: [B, N, Hk, Dk], v_slc, v_win: [B, N, Hk, Dv].
        cmp: what the compressed branch gets.
    """

    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    cmp: PooledTokens | CompletedBlocks
