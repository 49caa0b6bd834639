"""Whether the installed flash-attn computes what it is asked for: it can be built for some head dims only.

Such a build says nothing. For a head dim that it has no kernel for it may leave in its output what memory held, or take
the kernel of the next larger one. That one can be right where a query's keys are one part, and wrong where flash-attn
splits them over the chip, for its scratch memory has the asked width. There are kernels of their own for windows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ROWS, HEADS, KV_HEADS = 24, 2, 1
KEYS = (ROWS, 600)  # flash-attn reads up to 256 keys at once: of the second number it makes parts
OFF = 0.1  # of outputs of unit scale: half precision stays below a tenth of it, what is wrong is as large as they are

# (q, k, v, scale, window) -> out: causal attention of the last positions, to the last `window` keys or to all.
Run = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]


def computes(run: Run, head_dim: int, dtype: torch.dtype, device: torch.device, *, windowed: bool) -> bool:
    """Whether it makes of a few random rows what plain torch makes of them, causally or with a window.

    Waits for the device. The process's own random numbers go on as if nothing had happened, and its memory is apart
    from that of the call where torch has pools for that.

    Example:
        >>> computes(lambda q, *_: torch.ones_like(q), 32, torch.float16, torch.device("cpu"), windowed=False)
        False
    """
    generator = torch.Generator(device).manual_seed(head_dim)
    with _memory_apart(device):
        return all(_agrees(run, keys, head_dim, dtype, generator, keys // 2 if windowed else None) for keys in KEYS)


def _agrees(
    run: Run, keys: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator, window: int | None
) -> bool:
    shapes = ((1, rows, heads, head_dim) for rows, heads in ((ROWS, HEADS), (keys, KV_HEADS), (keys, KV_HEADS)))
    q, k, v = (torch.randn(shape, generator=generator, device=generator.device).to(dtype) for shape in shapes)
    scale: float = head_dim**-0.5
    error = (run(q, k, v, scale, window).float() - _expected(q, k, v, scale, window)).abs().max()
    return bool(error <= OFF)  # not for NaN


def _memory_apart(device: torch.device) -> AbstractContextManager[None]:
    """What is allocated within has memory that nobody else has: torch 2.5 and newer can, in its own allocator."""
    if device.type != "cuda" or not hasattr(torch.cuda, "MemPool"):
        return nullcontext()
    if torch.cuda.get_allocator_backend() != "native":  # cudaMallocAsync has no such pools: making one raises
        return nullcontext()
    return torch.cuda.use_mem_pool(torch.cuda.MemPool(), device)


def _expected(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """[1, T, H, D], fp32."""
    key = torch.arange(k.shape[1], device=q.device)
    behind = key[-q.shape[1] :, None] - key
    seen = (behind >= 0) & (behind < (len(key) if window is None else window))
    k, v = (x.float().expand(-1, -1, HEADS, -1) for x in (k, v))  # of one kv head
    logits = torch.einsum("bthd,bshd->bhts", q.float(), k) * scale
    return torch.einsum("bhts,bshd->bthd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)
