"""Padded batches to packed rows and back."""

import torch
from torch import Tensor

from nsa_varlen.layout import VarlenLayout, check_padding_mask


def pack(
    x: Tensor, mask: Tensor, *, max_seqlen: int | None = None, total: int | None = None
) -> tuple[Tensor, VarlenLayout, Tensor]:
    """Drop the padding of a batch: x [B, S, ...] and a bool mask [B, S] (True = real) to packed rows [T, ...].

    Left, right and interior padding are all dropped; a sequence's real tokens stay in order and count as
    consecutive positions. Differentiable in `x`.

    `max_seqlen` and `total` are the most real tokens of a sequence and of all. With both, nothing on a device is read
    (and they are believed); without, counting the real tokens synchronises once.

    Returns:
        (packed [T, ...], layout, pad_index): `pad_index` int64 [B, S] is each token's packed row, -1 for padding;
        `unpack` takes it.

    Raises:
        TypeError: the mask is not bool, or a number not an int.
        ValueError: the mask's shape is not x's first two dimensions, its device differs, or, where it is read, a number
            is not the mask's.

    Example:
        >>> x = torch.arange(6.0).reshape(2, 3)
        >>> mask = torch.tensor([[False, True, True], [True, False, True]])
        >>> packed, layout, pad_index = pack(x, mask)
        >>> packed.tolist(), layout.cu_seqlens_q.tolist()
        ([1.0, 2.0, 3.0, 5.0], [0, 2, 4])
        >>> unpack(packed, pad_index).tolist()
        [[0.0, 1.0, 2.0], [3.0, 0.0, 5.0]]
    """
    check_mask_of(x, mask)
    layout = VarlenLayout.from_padding_mask(mask, max_seqlen=max_seqlen, total=total)
    # Real tokens first, in order: a stable sort of known length needs no reading, which x[mask] does.
    place = (~mask).byte().flatten().argsort(stable=True)[: layout.total_q]
    rows = torch.arange(layout.total_q, device=mask.device)
    pad_index = rows.new_full((mask.numel(),), -1).scatter_(0, place, rows).reshape(mask.shape)
    return x.flatten(0, 1).index_select(0, place), layout, pad_index


def check_mask_of(x: Tensor, mask: Tensor, name: str = "mask") -> None:
    """Raise unless `mask` is a bool tensor [B, S] of x [B, S, ...], on its device."""
    check_padding_mask(mask, name)
    if x.shape[:2] != mask.shape:
        raise ValueError(f"{name}: expected shape {list(x.shape[:2])} of x's batch and length, got {list(mask.shape)}")
    if x.device != mask.device:
        raise ValueError(f"{name}: expected device {x.device} of x, got {mask.device}")


def unpack(packed: Tensor, pad_index: Tensor) -> Tensor:
    """Undo `pack`: packed rows [T, ...] to [B, S, ...], zeros where `pad_index` [B, S] is -1. Differentiable.

    Raises:
        TypeError: not tensors, or pad_index is not int64.
        ValueError: it is not 2-D.
    """
    for name, x in (("packed", packed), ("pad_index", pad_index)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if pad_index.dtype != torch.int64:
        raise TypeError(f"pad_index: expected dtype torch.int64, got {pad_index.dtype}")
    if pad_index.ndim != 2:
        raise ValueError(f"pad_index: expected shape [B, S], got {list(pad_index.shape)}")
    flat, total = pad_index.flatten(), packed.shape[0]
    if total == 0:  # there is no row to read; writing none of them keeps the gradient's way
        padded = packed.new_zeros(len(flat), *packed.shape[1:]).index_copy(0, flat[:0], packed)
        return padded.unflatten(0, pad_index.shape)
    # Padding reads its row by turns: were it one row for all, the gradient would add them up there one after another.
    own = torch.arange(len(flat), device=flat.device) % total
    rows = packed.index_select(0, torch.where(flat < 0, own, flat))
    padding = (flat < 0).reshape(-1, *[1] * (packed.ndim - 1))
    return rows.masked_fill(padding, 0).unflatten(0, pad_index.shape)
