"""Token lists to one packed batch: what a DataLoader's `collate_fn` does."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from nsa_varlen.layout import VarlenLayout

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8)
Tokens = Sequence[int] | Tensor  # or a NumPy array
Example = Tokens | Mapping[str, Tokens]


class TokenBatch(TypedDict):
    """What `collate_tokens` returns: a plain dict with these entries, T tokens of all sequences in order."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    layout: VarlenLayout


def collate_tokens(examples: Sequence[Example], *, ignore_index: int = -100) -> TokenBatch:
    """Pack token lists, without padding, into one batch of T tokens on the CPU.

    The label of each sequence's first token is `ignore_index`, whether labels are given or not. A causal language
    model shifts labels by one: row i is asked for label i + 1. In a packed row the last token of one sequence would
    then be asked for the first token of the next, which it cannot know. A sequence alone loses its first label to the
    shift anyway, so the packed loss is that of all sequences alone, averaged over their tokens:

    ```
    input_ids     a0   a1   a2   b0   b1
    labels         .   a1   a2    .   b1
    row i asks    a1   a2    .   b1            label i + 1
    ```

    It runs in DataLoader workers; options go through `functools.partial`.

    Args:
        examples: one per sequence, each a list, tuple, NumPy array or integer tensor [S] of token ids, or a mapping
            with "input_ids" and optionally "labels" of the same length, unshifted. Other entries are not read. S may
            be 0.
        ignore_index: the label that a loss leaves out, as `ignore_index` of `torch.nn.functional.cross_entropy`.

    Returns:
        A dict of input_ids, labels and position_ids, int64 [T] each, and the `VarlenLayout` that says where each
        sequence begins. Labels default to the token ids; positions count from 0 in each sequence.

    Raises:
        TypeError: an example, token or label of another type, or an ignore_index that is not an int.
        ValueError: a tensor that is not 1-D or not on the CPU, a mapping without "input_ids", or labels that are not
            as many as the token ids.

    Example:
        >>> batch = collate_tokens([[5, 6, 7], {"input_ids": [8, 9], "labels": [-100, 9]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([5, 6, 7, 8, 9], [-100, 6, 7, -100, 9])
        >>> batch["position_ids"].tolist(), batch["layout"].cu_seqlens_q.tolist()
        ([0, 1, 2, 0, 1], [0, 3, 5])
    """
    if not isinstance(examples, list | tuple):
        raise TypeError(f"examples: expected a list of examples, got {type(examples).__name__}")
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r} of type {type(ignore_index).__name__}")
    ids, labels = ([torch.empty(0, dtype=torch.int64, device="cpu")] for _ in range(2))
    for index, example in enumerate(examples):
        name = f"examples[{index}]"
        if not isinstance(example, Mapping):
            ids.append(_as_tensor(name, example))
            labels.append(ids[-1])
            continue
        if "input_ids" not in example:
            raise ValueError(f'{name}: expected a mapping with "input_ids", got the keys {list(example)}')
        ids.append(_as_tensor(f'{name}["input_ids"]', example["input_ids"]))
        labels.append(_as_tensor(f'{name}["labels"]', example["labels"]) if "labels" in example else ids[-1])
        if len(labels[-1]) != len(ids[-1]):
            raise ValueError(
                f'{name}["labels"]: expected {len(ids[-1])} labels, as many as input_ids, got {len(labels[-1])}'
            )
    layout = VarlenLayout.from_lengths([len(part) for part in ids[1:]])
    positions = layout.positions()
    return {
        "input_ids": torch.cat(ids),
        "labels": torch.cat(labels).masked_fill_(positions == 0, ignore_index),
        "position_ids": positions.clone(),  # the layout's own is shared with whoever asks it
        "layout": layout,
    }


def _as_tensor(name: str, tokens: object) -> Tensor:
    """Token ids or labels as int64 [S]."""
    if hasattr(tokens, "__array_interface__"):  # a NumPy array; a copy, for a memory-mapped one may be read-only
        tokens = torch.tensor(tokens, device="cpu")
    if isinstance(tokens, Tensor):
        if tokens.dtype not in INTEGERS:
            raise TypeError(f"{name}: expected an integer dtype, got {tokens.dtype}")
        if tokens.ndim != 1:
            raise ValueError(f"{name}: expected shape [S], got {list(tokens.shape)}")
        if tokens.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {tokens.device}")
        return tokens.long()
    if not isinstance(tokens, list | tuple):
        got = type(tokens).__name__
        raise TypeError(f"{name}: expected a list, tuple, NumPy array or 1-D integer tensor, got {got}")
    for place, token in enumerate(tokens):
        if type(token) is not int:
            raise TypeError(f"{name}[{place}]: expected an int, got {token!r} of type {type(token).__name__}")
    return torch.tensor(tokens, dtype=torch.int64, device="cpu")
