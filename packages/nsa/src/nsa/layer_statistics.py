"""Sums over what a layer's queries did, kept on the device, and what they mean once they are on the host."""

import math
from collections.abc import Sequence

import torch
from nsa_varlen import BlockGeometry
from nsa_varlen.keeping import outside_inference
from torch import Tensor

from nsa.reads import reads_and_budget

BRANCHES = ("cmp", "slc", "win")
NEAR_ZERO, NEAR_ONE = 0.05, 0.95  # gates below and above are counted: branches that are off, or fully on
ROWS_AT_ONCE = 4096  # of queries: bounds the memory that counting takes beside a long prefill

# What is summed, in the order of a row of `LayerStatistics.state`; `length` is only of the last step. Whole numbers are
# exact in fp64 up to 2^53: at 2^17 keys a query and 2^8 kv heads, 2^28 queries.
SUMS = (
    "steps",
    *(f"{what}.{branch}" for what in ("gates", "gate", "gate_squares", "gate_low", "gate_high") for branch in BRANCHES),
    *(f"reads.{branch}" for branch in BRANCHES),
    "budget",
    "queries",
    "nonfinite",
    "overlap",
    "neighbours",
    "length",
    "parity_steps",
    "parity",
    "parity_elements",
)
PARITY = SUMS.index("parity_steps")  # it and those behind it are added by themselves, in few steps


class LayerStatistics:
    """Accumulates on the device, waits for nothing, and is part of a CUDA graph that was captured meanwhile.

    Fields:
        state: fp64 [2, len(SUMS)]: of the last step, and of all steps. It keeps its place in memory until `move`.

    Example:
        >>> statistics = LayerStatistics(torch.device("cpu"))
        >>> gates, out, none = torch.full((1, 1, 3), 0.5), torch.ones(1, 1, 8), torch.zeros(2, dtype=torch.float64)
        >>> indices = torch.tensor([[[0, -1]]], dtype=torch.int32)
        >>> statistics.add(gates, out, indices, torch.tensor([40]), none, BlockGeometry())
        >>> numbers = summary(statistics.state[1].tolist(), num_kv_heads=1)
        >>> numbers["gate_mean.cmp"], numbers["reads.slc"], numbers["budget"]
        (0.5, 41.0, 1066.0)
    """

    def __init__(self, device: torch.device) -> None:
        place = torch.device("cpu") if device.type == "meta" else device  # of what has no device yet
        self.state = outside_inference(torch.zeros)(2, len(SUMS), dtype=torch.float64, device=place)

    def add(
        self,
        gates: Tensor,
        out: Tensor,
        block_indices: Tensor,
        position: Tensor,
        overlap: Tensor,
        blocks: BlockGeometry,
    ) -> None:
        """A step: queries at int64 `position` [T], T at least 1, negative ones being padding that counts nothing.

        Args:
            gates: [T, Hq, 3]. out: [T, Hq, Dv], before the output projection.
            block_indices: int32 [T, Hk, topk], each row's entries distinct.
            overlap: fp64 [2], of `selection_overlap.overlap`.
        """
        parts = zip(*(x.split(ROWS_AT_ONCE) for x in (gates, out, block_indices, position)), strict=True)
        each = [_sums(gates, out, chosen, at, blocks) for gates, out, chosen, at in parts]
        sums = each[0] if len(each) == 1 else torch.stack(each).sum(0)
        queries, length = sums[-2:-1], (position.amax()[None] + 1).double()
        row = torch.cat((queries.sign(), sums, overlap, length, length.new_zeros(len(SUMS) - PARITY)))
        self.state[0].copy_(row)
        self.state[1].add_(row)

    def add_parity(self, difference: Tensor, there: Tensor) -> None:
        """A comparison: |difference| of every element where `there`, which broadcasts; only those that are finite."""
        counted = _finite(difference) & there
        size = difference.abs().where(counted, 0.0).sum(dtype=torch.float64)
        elements = counted.sum().double()
        self.state[1, PARITY:].add_(torch.stack((elements.sign(), size, elements)))

    def move(self, device: torch.device) -> None:
        """Go on on another device."""
        self.state = outside_inference(self.state.to)(device, copy=True)

    def reset(self) -> None:
        """Start anew, in place: graphs hold the tensor."""
        self.state.zero_()


def _sums(gates: Tensor, out: Tensor, block_indices: Tensor, position: Tensor, blocks: BlockGeometry) -> Tensor:
    """From `gates.*` to `nonfinite`, as SUMS has them: fp64."""
    real = position >= 0
    there = real[:, None, None]
    counted = _finite(gates) & there
    gates = gates.double().where(counted, 0.0)
    of_gates = (counted, gates, gates.square(), (gates < NEAR_ZERO) & counted, (gates > NEAR_ONE) & counted)
    sums = [x.sum((0, 1), dtype=torch.float64) for x in of_gates]
    sums.append(reads_and_budget(block_indices, position, blocks).sum(0).double())
    sums += [real.sum()[None].double(), (~_finite(out) & there).sum()[None].double()]
    return torch.cat(sums)


def _finite(x: Tensor) -> Tensor:
    """`x.isfinite()` in half as many kernels: NaN is less than nothing."""
    return x.abs() < math.inf


def summary(row: Sequence[float], num_kv_heads: int) -> dict[str, float | int]:
    """What a row of `LayerStatistics.state` says. What is not defined, as a mean of nothing, is left out.

    Returns:
        steps: those with at least one query. queries: how many. nonfinite: elements of out that are NaN or infinite.
        gate_mean, gate_std, gate_low, gate_high by branch: over queries and heads; the latter are shares.
        reads, budget by branch; budget: keys per query and kv head. overlap: of neighbouring queries' blocks, 0 to 1.
        parity_steps, parity_mae: how often it was compared, and mean |out - out of sdpa|.

    Example:
        >>> summary([0.0] * len(SUMS), num_kv_heads=2)
        {'steps': 0, 'queries': 0, 'nonfinite': 0, 'parity_steps': 0}
    """
    sums = dict(zip(SUMS, row, strict=True))
    counts = {name: int(sums[name]) for name in ("steps", "queries", "nonfinite", "parity_steps")}
    found: dict[str, float] = {}
    for branch in BRANCHES:
        count = sums[f"gates.{branch}"]
        if count:
            mean = sums[f"gate.{branch}"] / count
            found[f"gate_mean.{branch}"] = mean
            found[f"gate_std.{branch}"] = math.sqrt(max(0.0, sums[f"gate_squares.{branch}"] / count - mean * mean))
            found[f"gate_low.{branch}"] = sums[f"gate_low.{branch}"] / count
            found[f"gate_high.{branch}"] = sums[f"gate_high.{branch}"] / count
    if sums["queries"]:
        for name in (*(f"reads.{branch}" for branch in BRANCHES), "budget"):
            found[name] = sums[name] / (sums["queries"] * num_kv_heads)
        # Compressed blocks and the window are read whole; of the selected blocks the budget counts topk full ones.
        found |= {f"budget.{branch}": found[f"reads.{branch}"] for branch in ("cmp", "win")}
        found["budget.slc"] = found["budget"] - found["budget.cmp"] - found["budget.win"]
    if sums["neighbours"]:
        found["overlap"] = sums["overlap"] / sums["neighbours"]
    if sums["parity_elements"]:
        found["parity_mae"] = sums["parity"] / sums["parity_elements"]
    # A gate of more than 1e154, of a module of one's own, has a square that is none.
    return counts | {name: value for name, value in found.items() if math.isfinite(value)}
