"""A decode step in parts that can be run, and timed, by themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nsa_varlen.autograd import in_autocast
from nsa_varlen.geometry import BlockGeometry
from nsa_varlen.new_tokens import NewTokens
from nsa_varlen.sdpa._append import append
from nsa_varlen.sdpa._decode import Stream, choice, combined, compressed, is_idle, newest, selected, window

Stage = Callable[[], Any]


def decode_stages(
    q: Tensor,
    q_cmp: Tensor,
    cmp: Stream,
    slc: Stream,
    win: Stream,
    gates: Tensor,
    counts: Tensor,
    blocks: BlockGeometry,
    scale: float,
    new: NewTokens | None,
) -> dict[str, Stage]:
    """The calls that `decode` consists of, each having run once: see `SdpaBackend.decode_stages`.

    A stage takes what the others made that one time. So it may be captured in a CUDA graph, whose memory holds nothing
    until it is replayed, and the others still run.
    """
    if is_idle(q, slc):
        return {}
    made: dict[str, Any] = {}
    with _plainly(q):
        position, rows, rows_cmp = newest(q, q_cmp, slc[0], counts, scale)

    def stored_and_compressed() -> tuple[Tensor, Tensor]:
        if new is not None:
            append(new, cmp, slc, win, counts, blocks)
        return compressed(rows_cmp, cmp, position, blocks)

    def all_combined() -> Tensor:
        return combined(gates, (made["cmp"][0], made["sel"], made["win"]), position, q.dtype)

    def alone(run: Stage) -> Stage:
        def stage() -> Any:
            with _plainly(q):
                return run()

        return stage

    stages = {
        "cmp": alone(stored_and_compressed),
        "choice": alone(lambda: choice(made["cmp"][1], position, slc[0], blocks)),
        "sel": alone(lambda: selected(rows, slc, made["choice"], position, blocks)),
        "win": alone(lambda: window(rows, win, position, blocks)),
        "combine": alone(all_combined),
    }
    for name, stage in stages.items():
        made[name] = stage()
    return stages


@contextmanager
def _plainly(q: Tensor) -> Iterator[None]:
    """Within, no gradients and no autocast, as around `decode`."""
    kind = q.device.type
    with torch.no_grad(), torch.autocast(kind, enabled=False) if in_autocast(kind) else nullcontext():
        yield
