"""What one attention layer asks of a machine: sizes and lengths, and the problem that each operation makes of them."""

from dataclasses import dataclass

import torch

from nsa_routing.problem import Problem


@dataclass(frozen=True)
class Workload:
    """A layer's sizes and a batch's lengths.

    Fields:
        device, device_index, dtype, head_dim, v_head_dim, group_size, needs_grad, deterministic, paged: as `Problem`
            has them.
        total_q, max_seqlen_q, max_seqlen_k: likewise.
        ragged: lengths differ. Otherwise a batch whose numbers allow it is uniform.

    Raises:
        ValueError: a size or length below 1, or fewer queries in all than in the longest sequence.

    Example:
        >>> layer = Workload("cpu", torch.float32, group_size=4, max_seqlen_q=1, total_q=8)
        >>> layer.problem("window_attention").group_size, layer.problem("combine").group_size
        (4, 1)
        >>> Workload("cpu", torch.float32, total_q=2 * 8192).problem("window_attention").uniform
        True
    """

    device: str
    dtype: torch.dtype
    head_dim: int = 128
    v_head_dim: int = 128
    group_size: int = 16
    total_q: int = 8192
    max_seqlen_q: int = 8192
    max_seqlen_k: int = 8192
    needs_grad: bool = False
    deterministic: bool = False
    paged: bool = False
    ragged: bool = False
    device_index: int = 0

    def __post_init__(self) -> None:
        for name in ("head_dim", "v_head_dim", "group_size", "total_q", "max_seqlen_q", "max_seqlen_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.total_q < self.max_seqlen_q:
            raise ValueError(f"total_q: expected at least max_seqlen_q={self.max_seqlen_q}, got {self.total_q}")

    def problem(self, op: str) -> Problem:
        """The problem that the layer's call of `op` is: what `nsa.ops` plans by.

        `compress_mean` and `combine` know no groups, and `combine` no keys; neither takes pages or is said to be
        uniform. `select_blocks` has no values and no gradient. `decode_attention` takes nothing but pages, is not said
        to be uniform, and counts what the host knows: of B sequences with at most N new tokens each, `max_seqlen_q` is
        N, `total_q` is B * N, padding included, and `max_seqlen_k` is how many tokens a sequence's pages have room for.
        """
        v_head_dim = self.head_dim if op in ("compress_mean", "select_blocks") else self.v_head_dim
        bare = op in ("compress_mean", "combine")
        combine, decode = op == "combine", op == "decode_attention"
        rectangular = self.max_seqlen_q == self.max_seqlen_k and self.total_q % self.max_seqlen_q == 0
        return Problem(
            op,
            self.device,
            self.dtype,
            head_dim=self.v_head_dim if combine else self.head_dim,
            v_head_dim=v_head_dim,
            group_size=1 if bare else self.group_size,
            needs_grad=self.needs_grad and op != "select_blocks",
            deterministic=self.deterministic,
            paged=decode or (self.paged and not bare),
            device_index=self.device_index,
            uniform=rectangular and not (self.ragged or bare or decode),
            total_q=self.total_q,
            max_seqlen_q=0 if combine else self.max_seqlen_q,
            max_seqlen_k=0 if combine else self.max_seqlen_k,
        )

    def __str__(self) -> str:
        """On one line, for people.

        Example:
            >>> print(Workload("cuda", torch.bfloat16, max_seqlen_q=1, total_q=8, paged=True))
            bfloat16, head_dim 128/128, group size 16, 8 queries, at most 1 a sequence, over 8192 keys, paged
        """
        queries = f"{self.total_q} queries"
        if self.max_seqlen_q != self.total_q:
            queries += f", at most {self.max_seqlen_q} a sequence,"
        words = [
            str(self.dtype).removeprefix("torch."),
            f"head_dim {self.head_dim}/{self.v_head_dim}",
            f"group size {self.group_size}",
            f"{queries} over {self.max_seqlen_k} keys",
            *(name for name in ("needs_grad", "deterministic", "paged", "ragged") if getattr(self, name)),
        ]
        return ", ".join(words)


def typical(device: str, device_index: int = 0) -> Workload:
    """A layer as models have it today, prefilling 8,192 tokens: bfloat16 on accelerators, float32 on a CPU.

    Example:
        >>> typical("cpu").dtype
        torch.float32
    """
    return Workload(device, torch.float32 if device == "cpu" else torch.bfloat16, device_index=device_index)
