"""What nsa-bench can time of this package, by the entry point `fa2` of `nsa.bench`.

Beside the operations of its backends dense attention by flash-attn, as `nsa_varlen.benchmarks.dense` has it by torch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from nsa_varlen.benchmarks import Workload, dense
from nsa_varlen.benchmarks.machine import DTYPES, environment, problem
from nsa_varlen.benchmarks.operations import op_workloads
from torch import Tensor

from nsa_fa2.backend import CUDNN, FA2, FA2_TORCH

Value = int | str

PARAMETERS = {name: x for name, x in dense.PARAMETERS.items() if name != "backend"} | {"dtype": "bfloat16"}


class State(NamedTuple):
    """Dense attention to run.

    Fields:
        attend: flash-attn's function.
        lengths: of each decode step those of all sequences, int32 [STEPS, B]; None of prefill.
    """

    point: dense.Point
    attend: Callable[..., Tensor]
    lengths: Tensor | None = None


def _setup_prefill(device: str, seed: int, **sizes: Value) -> State:
    from flash_attn import flash_attn_func

    tokens = int(sizes.pop("S"))
    return State(dense.make_point(device, seed, tokens, tokens, backend="flash-attn", **sizes), flash_attn_func)


def _setup_decode(device: str, seed: int, **sizes: Value) -> State:
    from flash_attn import flash_attn_with_kvcache

    tokens, steps = int(sizes.pop("S")), dense.STEPS
    point = dense.make_point(device, seed, steps, tokens + steps, backend="flash-attn", **sizes)
    lengths = torch.arange(tokens + 1, tokens + steps + 1, dtype=torch.int32, device=device)
    return State(point, flash_attn_with_kvcache, lengths[:, None].repeat(1, len(point.q)))


def _prefill(state: State, _: int) -> Tensor:
    return state.attend(state.point.q, state.point.k, state.point.v, causal=True)


def _decode(state: State, index: int) -> Tensor:
    """One query a sequence over the first of its tokens."""
    assert state.lengths is not None
    q, k, v, _ = state.point
    return state.attend(q[:, index : index + 1], k, v, cache_seqlens=state.lengths[index])


def _refuse(device: str, **parameters: Value) -> str | None:
    """As backend fa2 refuses a window, which is the same kernel."""
    if parameters["dtype"] not in DTYPES:
        return f"dtype: expected one of {list(DTYPES)}, got {parameters['dtype']!r}"
    return FA2.refuse("window_attention", problem(device, parameters), environment(device))


def _facts(facts: Callable[[dense.Point], Mapping[str, Value]]) -> Callable[[State], Mapping[str, Value]]:
    return lambda state: facts(state.point)


def _check(check: Callable[[dense.Point, Sequence[Tensor]], str]) -> Callable[[State, Sequence[Tensor]], str]:
    return lambda state, results: check(state.point, results)


def anchors() -> list[Workload]:
    """Dense attention by flash-attn: prefill and decode."""
    return [
        Workload(
            "dense.prefill.flash-attn",
            "causal attention over all tokens, by flash-attn",
            PARAMETERS,
            setup=_setup_prefill,
            call=_prefill,
            cost=dense.prefill_cost,
            check=_check(dense.check_prefill),
            facts=_facts(dense.dense_facts),
            refuse=_refuse,
        ),
        Workload(
            "dense.decode.flash-attn",
            "one query a sequence over all its tokens, nothing stored, by flash-attn",
            PARAMETERS,
            setup=_setup_decode,
            call=_decode,
            cost=dense.decode_cost,
            check=_check(dense.check_decode),
            facts=_facts(dense.decode_facts),
            refuse=_refuse,
            calls=dense.STEPS,
        ),
    ]


def workloads() -> list[Workload]:
    """The anchors, and the operations that the backends ever run: cuDNN has neither windows nor ragged batches."""
    branches: dict[Any, tuple[str, ...]] = {
        FA2: ("compressed_attention", "selected_attention", "window_attention"),
        FA2_TORCH: ("compressed_attention", "selected_attention", "window_attention"),
        CUDNN: ("compressed_attention",),
    }
    operations = [op_workloads(backend, ops, dtype="bfloat16") for backend, ops in branches.items()]
    return [*anchors(), *(workload for found in operations for workload in found)]
