"""Activation checkpointing that does not select again: the recomputation takes the blocks that the forward chose."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:  # torch 2.4 has no policies; all but compiled checkpoints works without
    from torch.utils.checkpoint import CheckpointPolicy


def reuse_block_indices() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

    Within the first context every selection (`ops.select_blocks`, so every `nsa_attention` and layer) notes the indices
    that it returns; within the second, the recomputation, selections take those notes in order and compute nothing. The
    notes are int32 [Tq, Hk, topk] a selection, which live as long as the graph. Without this a checkpoint works too:
    selection is deterministic, so the recomputation selects the same blocks once more.

    Checkpoints may be nested. In a checkpoint that torch.compile traces the same is said to its partitioner: outputs of
    operators called `select_blocks` (those of backend `triton` are operators) are saved, not computed again. Compiled
    code inside a checkpoint that is not traced itself selects again.

    Raises:
        RuntimeError: the recomputation selects more or less often than the forward did, or for tensors of other sizes.

    Example:
        >>> from nsa import NSAAttention, NSAConfig
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = NSAAttention(NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16))
        >>> x = torch.randn(2, 100, 64, requires_grad=True)
        >>> checkpoint(layer, x, use_reentrant=False, context_fn=reuse_block_indices).sum().backward()
        >>> x.grad.shape
        torch.Size([2, 100, 64])
    """
    if torch._guards.TracingContext.try_get() is not None:  # torch.compile wants modes, and calls this while it traces
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        forward, again = create_selective_checkpoint_contexts(_save_selections)
        return forward, again
    notes: list[Tensor] = []
    return _Noting(notes), _Reusing(notes)


def selected_once(select: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The block indices [Tq, Hk, topk] of `shape` that `select` computes, or those noted where they are reused."""
    context = None if torch.compiler.is_compiling() else _context.get()
    return select() if context is None else context.take(select, shape)


class _Context:
    """What selections go through while it is entered, for one checkpoint. It may be entered again after its end."""

    def __init__(self, notes: list[Tensor]) -> None:
        self.notes = notes
        self._tokens: list[Token[_Context | None]] = []
        self._around: _Context | None = None

    def __enter__(self) -> Self:
        self._around = _context.get()
        self._tokens.append(_context.set(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        _context.reset(self._tokens.pop())
        self._around = None

    def take(self, select: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """The indices of the next selection."""
        raise NotImplementedError


# Of each thread its own: on a GPU the recomputation runs in a thread of autograd's.
_context: ContextVar[_Context | None] = ContextVar("context", default=None)


class _Noting(_Context):
    """The forward. Inside the recomputation of a checkpoint around it the indices come from there."""

    def take(self, select: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        indices = select() if self._around is None else self._around.take(select, shape)
        self.notes.append(indices.detach())
        return indices


class _Reusing(_Context):
    """The recomputation."""

    def __enter__(self) -> Self:
        self._taken = 0
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        super().__exit__(kind, *error)
        # An exception is how torch ends a recomputation as soon as it has what the backward asked for.
        if kind is None and self._taken != len(self.notes):
            raise RuntimeError(
                f"reuse_block_indices: expected the recomputation to select {len(self.notes)} times, as the forward "
                f"did, got {self._taken}"
            )

    def take(self, select: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        if self._taken == len(self.notes):
            raise RuntimeError(
                f"reuse_block_indices: expected the recomputation to select {len(self.notes)} times, as the forward "
                "did, got one more"
            )
        indices = self.notes[self._taken]
        if indices.shape != shape:
            raise RuntimeError(
                f"reuse_block_indices: expected selection {self._taken} of the recomputation to be of shape "
                f"{list(indices.shape)}, as in the forward, got {list(shape)}"
            )
        self._taken += 1
        return indices


def _save_selections(context: Any, operator: Any, *args: Any, **kwargs: Any) -> "CheckpointPolicy":
    from torch.utils.checkpoint import CheckpointPolicy

    schema = getattr(operator, "_schema", None)
    selects = schema is not None and schema.name.endswith("::select_blocks")
    return CheckpointPolicy.MUST_SAVE if selects else CheckpointPolicy.PREFER_RECOMPUTE
