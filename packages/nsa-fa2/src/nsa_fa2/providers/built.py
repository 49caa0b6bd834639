"""Whether the installed flash-attn computes what it is asked for: it can be built for some head dims only.

Such a build says nothing. For a head dim that it has no kernel for it may leave in its output what memory held, or read
beyond a row; and there are kernels of their own for windows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROWS, HEADS, KV_HEADS, WINDOW = 24, 2, 1, 5
OFF = 0.1  # of outputs of unit scale: half precision stays below a tenth of it, what is wrong is as large as they are

# (q, k, v, scale, window) -> out: causal attention, to the last `window` keys or to all.
Run = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]


def computes(run: Run, head_dim: int, dtype: torch.dtype, device: torch.device, *, windowed: bool) -> bool:
    """Whether it makes of a few random rows what plain torch makes of them, causally or with a window.

    Waits for the device. The process's own random numbers go on as if nothing had happened.

    Example:
        >>> computes(lambda q, *_: torch.ones_like(q), 32, torch.float16, torch.device("cpu"), windowed=False)
        False
    """
    generator = torch.Generator(device).manual_seed(head_dim)
    shapes = ((1, ROWS, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    scale: float = head_dim**-0.5
    window = WINDOW if windowed else None
    error = (run(q, k, v, scale, window).float() - _expected(q, k, v, scale, window)).abs().max()
    return bool(error <= OFF)  # not for NaN


def _expected(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """[1, T, H, D], fp32."""
    place = torch.arange(q.shape[1], device=q.device)
    behind = place[:, None] - place
    seen = (behind >= 0) & (behind < (len(place) if window is None else window))
    k, v = (x.float().expand(-1, -1, HEADS, -1) for x in (k, v))  # of one kv head
    logits = torch.einsum("bthd,bshd->bhts", q.float(), k) * scale
    return torch.einsum("bhts,bshd->bthd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)
