"""Does the command line plan for the very problems that `nsa.ops` plans for?"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa import ops
from nsa_routing import OPS, Problem
from nsa_routing.workload import Workload
from nsa_varlen.op_inputs import PAGE_SIZE, op_inputs
from nsa_varlen.sdpa import BACKEND

BATCHES = {  # queries, keys, and what a workload says of them
    "ragged": ([5, 40], [50, 60], {"total_q": 45, "max_seqlen_q": 40, "max_seqlen_k": 60}),
    "uniform": ([40, 40], [40, 40], {"total_q": 80, "max_seqlen_q": 40, "max_seqlen_k": 40}),
    "one": ([40], [40], {"total_q": 40, "max_seqlen_q": 40, "max_seqlen_k": 40}),
    "by chance": ([40, 30, 10], [40, 30, 10], {"total_q": 80, "max_seqlen_q": 40, "max_seqlen_k": 40, "ragged": True}),
    "decode": ([1, 1, 1], [40, 40, 40], {"total_q": 3, "max_seqlen_q": 1, "max_seqlen_k": 40}),
    "first tokens": ([1, 1, 1], [1, 1, 1], {"total_q": 3, "max_seqlen_q": 1, "max_seqlen_k": 1}),
}


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_workload_makes_the_problems_of_the_operations(
    batch: str, op: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, lengths = BATCHES[batch]
    asked: list[Problem] = []

    def dispatch(op: str, problem: Problem, *, backend: str | None) -> Any:
        asked.append(problem)
        return getattr(BACKEND, op)

    monkeypatch.setattr(ops, "dispatch", dispatch)
    sizes = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 4}
    args, kwargs = op_inputs(op, q, k, **sizes, dtype=torch.float16, device="cpu", requires_grad=grad)
    if op == "decode_attention":  # rows of q with their padding, and room for keys by the page
        lengths = lengths | {"total_q": len(q) * max(q), "max_seqlen_k": -(-max(k) // PAGE_SIZE) * PAGE_SIZE}
        args[0].requires_grad_(grad)  # which no backend takes: that is to be told, too
    getattr(ops, op)(*args, **kwargs)
    (problem,) = asked
    workload = Workload("cpu", torch.float16, 8, 4, 3, **lengths, needs_grad=grad)
    assert replace(problem, deterministic=False) == workload.problem(op)  # None there is resolved by dispatch
