"""A backend of one operation, window attention, in plain torch."""

from typing import Any

import torch
from nsa_varlen.arguments import check_attention, check_layout, scale_or_default
from torch import Tensor

ROWS = 128  # queries at a time: they see ROWS + window_size - 1 keys at most, however long the sequence is


class ExampleBackend:
    """Positions (t - w, t], a few queries at a time."""

    name = "example"

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        """Why it cannot run `op` on this problem; None if it can, at every length."""
        if op != "window_attention":
            return f"has no operation {op}"
        for feature in ("paged", "softcap", "sinks", "fp8_scales"):
            if getattr(problem, feature, False):
                return f"does not take {feature}"
        return None if problem.dtype == torch.float32 else f"takes torch.float32, not {problem.dtype}"

    def window_attention(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Any, blocks: Any, *, scale: Any = None, deterministic: Any = None
    ) -> tuple[Tensor, Tensor]:
        """(out [Tq, Hq, Dv], lse [Hq, Tq]), layout a VarlenLayout, blocks a BlockGeometry."""
        check_layout(layout, blocks)
        check_attention(("k", "v"), q, k, v, layout.total_k, layout)
        scale = scale_or_default(scale, q.shape[-1])
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        lengths_q, lengths_k = (x.diff().tolist() for x in (layout.host.cu_seqlens_q, layout.host.cu_seqlens_k))
        parts = [(q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(q.shape[1], 0))]
        for q_s, k_s, v_s in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
            first = len(k_s) - len(q_s)  # bottom-right: the queries are the last tokens
            for rows in q_s.split(ROWS):
                low, high = max(0, first - blocks.window_size + 1), max(0, first + len(rows))
                age = torch.arange(first, first + len(rows))[:, None] - torch.arange(low, high)
                seen = ((age >= 0) & (age < blocks.window_size)).to(q.device)
                parts.append(attend(rows, k_s[low:high], v_s[low:high], seen, scale))
                first += len(rows)
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses, 1).detach()


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention where `seen`; rows that see nothing give 0 and -inf, and gradients of 0."""
    logits = (torch.einsum("thd,shd->hts", q, k) * scale).masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return torch.einsum("hts,shd->thd", weights, v), lse


BACKEND = ExampleBackend()
