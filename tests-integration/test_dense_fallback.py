"""Does a dense form serve ragged batches through the routes, and do they go to sdpa where a backend has no form?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nsa import ops
from nsa_routing import OPS, Problem, plan_for
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.dense import DenseForms, masked_attention
from nsa_varlen.testing import certified_inputs, rounding_bounds, run_ops
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=7)
LENGTHS = [20, 9, 3, 0, 1, 31], [41, 9, 3, 5, 17, 31]
ATTENTION = ("compressed_attention", "selected_attention", "window_attention")
PROFILE = """
name: fallback
extends: cpu
source: none; backends that a test made.
order:
{order}
presets:
  safe: {{{name}: always}}
"""


class DenseOnly(DenseForms):
    """The operations that follow from a dense attention, and no other."""

    name = "dense-only"

    def __init__(self) -> None:
        super().__init__(self.counted)
        self.calls = 0

    def counted(self, *qkv_mask: Any, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return masked_attention(*qkv_mask, scale=scale, is_causal=is_causal)

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        return None


class Formless:
    """A backend whose attention has no form at all."""

    name = "formless"

    def refuse(self, op: str, problem: Any, environment: Any) -> str | None:
        return None


@pytest.mark.parametrize("made", [DenseOnly, Formless], ids=lambda x: x.name)
def test_a_ragged_batch_is_the_oracles_and_the_plan_says_by_whom(
    made: type[DenseOnly] | type[Formless], install: Callable, flags: Callable, tmp_path: Path
) -> None:
    profile = tmp_path / "fallback.yaml"
    profile.write_text(PROFILE.format(name=made.name, order="\n".join(f"  {op}: [{made.name}, sdpa]" for op in OPS)))
    backend = install(made())[made.name]
    flags(PROFILE=str(profile))

    layout = VarlenLayout.from_lengths(*LENGTHS)
    inputs, _ = certified_inputs(layout, BLOCKS)
    exact_inputs, leaves = inputs.leaves(), inputs.leaves()
    exact, got = run_ops(reference, exact_inputs, layout, BLOCKS), run_ops(ops, leaves, layout, BLOCKS)
    grad_out = torch.arange(exact.out.numel(), dtype=torch.float64).sin().reshape(exact.out.shape)
    exact.out.backward(grad_out)
    got.out.backward(grad_out)

    bounds = rounding_bounds(inputs, grad_out, layout, BLOCKS)
    assert torch.equal(got.block_indices, exact.block_indices)
    for name in ("k_cmp", "v_cmp", "o_cmp", "o_slc", "o_win", "out"):
        torch.testing.assert_close(getattr(got, name), getattr(exact, name), rtol=0, atol=bounds.values)
    for name in ("lse_cmp", "lse_slc", "lse_win"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=0, atol=bounds.lse)
    for x, y in zip(leaves, exact_inputs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=bounds.gradients)

    for op in OPS:
        plan = plan_for(Problem(op, "cpu", torch.float64, 8, 8, 2, total_q=64, max_seqlen_q=31, max_seqlen_k=41))
        by_form = made is DenseOnly and op in ATTENTION
        assert plan.profile == "fallback"
        assert plan.accepted == ((made.name, "sdpa") if by_form else ("sdpa",))
        assert by_form or plan.candidates[0].reason == f"has no operation {op}"
    assert (backend.calls > 0) if made is DenseOnly else not hasattr(backend, "window_attention")
