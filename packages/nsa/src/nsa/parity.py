"""What plain torch computes where another backend did: the reference that observed layers are compared with."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.transfer import to_device
from torch import Tensor

from nsa import ops
from nsa.attention import nsa_attention
from nsa.decode_step import DecodeStep
from nsa.noted_problems import noting

REFERENCE = "sdpa"


@torch.no_grad()
def prefill_difference(
    q: Tensor,
    kv: Sequence[Tensor | PagedKV],
    gates: Tensor,
    layout: VarlenLayout,
    blocks: BlockGeometry,
    *,
    q_cmp: Tensor,
    block_indices: Tensor,
    out: Tensor,
    rows: int,
) -> Tensor:
    """out less that of `sdpa` for the same blocks, at the last `rows` queries of each sequence: fp64 [R, Hq, Dv].

    The keys are all that these queries saw: they are the last ones, and layouts are bottom-right aligned.
    """
    host = layout.host
    kept = [range(max(begin, end - rows), end) for begin, end in pairwise(host.cu_seqlens_q.tolist())]
    number = torch.tensor([row for span in kept for row in span], dtype=torch.int64, device="cpu")
    last = to_device(number, q.device)
    lengths_q, lengths_k = [len(span) for span in kept], host.cu_seqlens_k.diff().tolist()
    part = VarlenLayout.from_lengths(lengths_q, lengths_k, device=q.device)
    of_rows = (x.detach()[last] for x in (q, q_cmp, gates, block_indices, out))
    q, q_cmp, gates, block_indices, out = of_rows
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = (x.detach() if isinstance(x, Tensor) else x for x in kv)
    with noting(None):
        expected = nsa_attention(
            *(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, part, blocks),
            q_cmp=q_cmp,
            block_indices=block_indices,
            backend=REFERENCE,
        )
    return out.double() - expected.double()


@torch.no_grad()
def decode_difference(
    step: DecodeStep, q: Tensor, gates: Tensor, blocks: BlockGeometry, *, q_cmp: Tensor, out: Tensor
) -> Tensor:
    """out less that of `sdpa`, which selects for itself, once the step has stored its tokens: fp64 [B * N, Hq, Dv]."""
    with noting(None):
        expected, _ = ops.decode_attention(
            q, *step.cmp, *step.slc, *step.win, gates, step.counts, blocks, q_cmp=q_cmp, backend=REFERENCE
        )
    return (out.double() - expected.double()).flatten(0, 1)
