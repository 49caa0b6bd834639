"""One operation to run, as far as the choice of a backend depends on it."""

from dataclasses import dataclass, fields

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
LENGTHS = ("total_q", "max_seqlen_q", "max_seqlen_k")


@dataclass(frozen=True)
class Problem:
    """What a backend may refuse or accept by.

    Lengths are there for the thresholds of a profile. Plans are shared by all problems whose lengths lie between the
    same thresholds, so a backend that accepts a problem accepts it at every length: it works in chunks where it must.

    Fields:
        op: one of OPS.
        device: "cpu", "cuda", ...
        dtype: of q (or of the one tensor argument).
        head_dim, v_head_dim: Dk and Dv.
        group_size: query heads per kv head, G.
        needs_grad: a gradient will be recorded.
        deterministic: results must be bitwise equal across runs; None leaves it to `NSA_DETERMINISTIC` and
            `torch.use_deterministic_algorithms`.
        paged: keys and values arrive as PagedKV.
        softcap, sinks, fp8_scales: reserved; no backend implements them, and each refuses them.
        device_index: which of the devices of that kind.
        kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size: the block sizes, in
            tokens (topk, init_blocks, local_blocks: in blocks).
        uniform: every sequence has max_seqlen_q queries and exactly as many keys, so that the packed batch is a
            rectangular one. False says nothing: of `combine` and `compress_mean`, which have no queries over keys, and
            of a batch whose lengths nobody compared, too.
        total_q: packed queries, Tq.
        max_seqlen_q, max_seqlen_k: the longest sequence's queries and keys. Of `decode_attention`, whose lengths only
            the device knows: the rows of q for a sequence and the room of its pages; total_q counts all rows of q.

    Raises:
        TypeError: dtype is no torch.dtype, or a length no int.
        ValueError: an unknown op, or a length below 0.

    Example:
        >>> Problem("window_attention", "cuda", torch.bfloat16, 128, 128, 16, max_seqlen_k=65_536).block_size
        64
    """

    op: str
    device: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    group_size: int
    needs_grad: bool = False
    deterministic: bool | None = None
    paged: bool = False
    softcap: bool = False
    sinks: bool = False
    fp8_scales: bool = False
    device_index: int = 0
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512
    uniform: bool = False
    total_q: int = 0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op: expected one of {list(OPS)}, got {self.op!r}")
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype, got {self.dtype!r} of type {type(self.dtype).__name__}")
        if torch.compiler.is_compiling():
            return  # lengths may be symbolic there, and a comparison a guard
        for name in LENGTHS:
            length = getattr(self, name)
            if type(length) is not int:
                raise TypeError(f"{name}: expected an int, got {length!r} of type {type(length).__name__}")
            if length < 0:
                raise ValueError(f"{name}: expected at least 0, got {length}")


STATIC = tuple(field.name for field in fields(Problem) if field.name not in LENGTHS)  # all but the lengths


def device_name(problem: Problem) -> str:
    """The device as routes are named by it: "cpu", "cuda:0", ...

    Example:
        >>> device_name(Problem("combine", "cuda", torch.float16, 64, 64, 4, device_index=1))
        'cuda:1'
    """
    return problem.device if problem.device == "cpu" else f"{problem.device}:{problem.device_index}"


def describe(problem: Problem) -> str:
    """The problem on one line.

    Example:
        >>> describe(Problem("combine", "cpu", torch.float32, 64, 64, 4, needs_grad=True, total_q=7))
        'combine on cpu, torch.float32, head_dim 64/64, group size 4, total_q 7, needs_grad'
    """
    words = [
        f"{problem.op} on {device_name(problem)}",
        str(problem.dtype),
        f"head_dim {problem.head_dim}/{problem.v_head_dim}",
        f"group size {problem.group_size}",
        *(f"{name} {getattr(problem, name)}" for name in LENGTHS if getattr(problem, name)),
        *(field.name for field in fields(problem) if getattr(problem, field.name) is True),
    ]
    return ", ".join(words)
