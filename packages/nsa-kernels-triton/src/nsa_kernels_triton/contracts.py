"""Why the kernels cannot run an operation, in words: told before a call, never by an exception from inside one."""

import os
import re
from typing import Any

import torch

OPS = (
    "compress_mean",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "combine",
    "decode_attention",
)
BLOCK_OPS = ("select_blocks", "selected_attention", "decode_attention")  # that go by selection blocks
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK_SIZES = (32, 64, 128)
MAX_HEAD_DIM = 256
MAX_GROUP_SIZE = 64
MAX_TOPK = 256
MAX_COMPETED = 64  # places of a decode step's list that blocks compete for
MIN_TILE = 16  # keys; pages hold whole tiles
OLDEST_TRITON = (3, 6)  # with which all kernels were compiled
OLDEST_SM = 80


def unmet(op: str, problem: Any) -> str | None:
    """What of a problem the kernels do not do, or None. The machine is another matter.

    Args:
        op: the operation.
        problem: with `device`, `dtype`, `head_dim`, `v_head_dim`, `group_size`, `block_size`, `topk`, `needs_grad`,
            `paged` and the reserved `softcap`, `sinks`, `fp8_scales`, as `nsa_routing.Problem` has them; what it lacks
            is false.

    Example:
        >>> from types import SimpleNamespace
        >>> layer = dict(device="cuda", dtype=torch.float16, head_dim=128, v_head_dim=128, group_size=4, block_size=48)
        >>> unmet("selected_attention", SimpleNamespace(**layer))
        'needs block_size 32, 64 or 128, got 48'
    """
    if op not in OPS:
        return f"has no operation {op}"
    for feature in ("softcap", "sinks", "fp8_scales"):
        if getattr(problem, feature, False):
            return f"does not implement {feature}"
    if problem.device != "cuda" and not (problem.device == "cpu" and interpreted()):
        return "needs CUDA"
    if problem.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, not {_name(problem.dtype)}"
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:
        return "takes float16 and float32 in Triton's interpreter, not bfloat16"
    dims = problem.head_dim, problem.v_head_dim
    if min(dims) < 1 or max(dims) > MAX_HEAD_DIM:
        return f"needs head_dim and v_head_dim from 1 to {MAX_HEAD_DIM}, got {dims[0]} and {dims[1]}"
    if op.endswith("attention") or op == "select_blocks":
        reason = _unmet_lists(op, problem)
        if reason is not None:
            return reason
    if op == "decode_attention":
        return _unmet_decode(problem)
    if getattr(problem, "paged", False):
        return "does not take paged keys and values"
    return None


def _unmet_lists(op: str, problem: Any) -> str | None:
    """What of the heads and blocks of an attention the kernels do not do."""
    if problem.group_size > MAX_GROUP_SIZE:
        return f"needs at most {MAX_GROUP_SIZE} query heads a kv head, got {problem.group_size}"
    if op in BLOCK_OPS and problem.block_size not in BLOCK_SIZES:
        return f"needs block_size 32, 64 or 128, got {problem.block_size}"
    if op in BLOCK_OPS and getattr(problem, "topk", 0) > MAX_TOPK:
        return f"needs topk up to {MAX_TOPK}, got {problem.topk}"
    return None


def _unmet_decode(problem: Any) -> str | None:
    """What of a decode step the kernels do not do."""
    if getattr(problem, "needs_grad", False):
        return "records no gradients through paged keys and values"
    forced = getattr(problem, "forced", None)
    if forced is None:
        forced = getattr(problem, "init_blocks", 0) + getattr(problem, "local_blocks", 0)
    if getattr(problem, "topk", 0) - forced > MAX_COMPETED:
        return f"needs topk up to {MAX_COMPETED} beside the {forced} forced blocks, got {problem.topk}"
    return None


def missing(environment: Any) -> str | None:
    """Why a machine, as `nsa_routing.Environment` tells of it, cannot run the kernels; None if it can."""
    version = re.match(r"(\d+)\.(\d+)", environment.triton or "")
    if version is None or (int(version[1]), int(version[2])) < OLDEST_TRITON:
        return f"needs triton >= {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}, got {environment.triton or 'none'}"
    if environment.device == "cpu":
        return None if interpreted() else "needs CUDA"
    if environment.sm is None:
        return "needs an NVIDIA GPU"
    if environment.sm < OLDEST_SM:
        return f"needs SM 8.0 or newer, got {environment.sm / 10}"
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors: it reads the variable, in these words, on import."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
