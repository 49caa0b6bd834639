"""How many different blocks neighbouring queries choose: measured on the device, known to a later call.

A hint, and no more: it steers which organisation of `ops.selected` runs, never what it computes. A few tiles are
sampled, their mean is copied to the host without waiting, and a call that finds the copy arrived uses it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_kernels_triton.configurations import launch
from nsa_kernels_triton.tiles import count_tiles, power_of_two

NEIGHBOURS = 8
SAMPLES = 256  # tiles
LONG = 16_384  # queries: beside so long a call a sample costs nothing, and every one begins one
EVERY = 16  # shorter calls between two samples
UNKNOWN = 1 << 20


@dataclass
class Spread:
    """What is known of one kind of call.

    Fields:
        percent: distinct blocks of NEIGHBOURS queries as a percentage of one query's; 100 says that all choose the
            same. UNKNOWN before the first sample arrives.
        calls: since the last sample.
        pending: sampled counts on their way to the host, with the event that says when they have arrived.
    """

    percent: int = UNKNOWN
    calls: int = 0
    pending: tuple[Tensor, Any] | None = None

    def read(self, num_slots: int) -> None:
        """Take in a sample that has arrived."""
        pending = self.pending  # another thread may take it meanwhile
        if pending is not None and pending[1].query():
            self.percent, self.pending = _percent(pending[0], num_slots), None

    def measure(self, block_indices: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_size: int) -> None:
        """Begin a sample where it is time for one. To be called last: no kernel waits for what it costs the host."""
        if capturing(block_indices):
            return
        if self.pending is None and (block_indices.shape[0] >= LONG or self.calls % EVERY == 0):
            self.pending = _sample(block_indices, cu_seqlens_q, cu_seqlens_k, block_size)
        self.calls += 1


_known: dict[tuple[Any, ...], Spread] = {}


def spread_of(block_indices: Tensor, block_size: int) -> Spread:
    """What is known of calls like this one, without waiting for anything."""
    total_q, num_kv_heads, num_slots = block_indices.shape
    kind = (block_indices.device, total_q.bit_length(), num_kv_heads, num_slots, block_size)
    spread = _known.setdefault(kind, Spread())
    if not capturing(block_indices):
        spread.read(num_slots)
    return spread


def capturing(x: Tensor) -> bool:
    """Whether a graph is being captured, which can neither ask an event nor read its answer."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _sample(block_indices: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_size: int) -> tuple[Tensor, Any]:
    from nsa_kernels_triton.kernels.sharing import union_kernel

    total_q, num_kv_heads, num_slots = block_indices.shape
    batch_size = cu_seqlens_q.shape[0] - 1
    tiles = count_tiles(total_q, batch_size, NEIGHBOURS)
    step = -(-tiles // SAMPLES)
    samples = tiles // step
    counts = block_indices.new_empty(samples, num_kv_heads, 2)
    ordered = block_indices.new_empty(samples, num_kv_heads, NEIGHBOURS, power_of_two(num_slots))
    config = launch("union", block_indices.device)
    union_kernel[samples, num_kv_heads](
        *(block_indices, cu_seqlens_q, cu_seqlens_k, ordered, counts, counts, counts),
        *(batch_size, num_kv_heads, num_slots, step - 1, step),
        BLOCK_SIZE=block_size,
        QUERIES=NEIGHBOURS,
        QUERIES_2=NEIGHBOURS,
        SLOTS=power_of_two(num_slots),
        STORE=False,
        **config.options,
    )
    if counts.device.type != "cuda":
        return counts, _Arrived()
    host = torch.empty_like(counts, device="cpu", pin_memory=True)
    host.copy_(counts, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _percent(counts: Tensor, num_slots: int) -> int:
    distinct = counts[..., 1]
    full = distinct[distinct >= num_slots]  # not the tiles at a sequence's beginning, where all choose all there is
    return round(100 * float(full.double().mean()) / num_slots) if full.numel() else 100


class _Arrived:
    """The event of counts that are on the host already."""

    def query(self) -> bool:
        """True."""
        return True
