"""Peers as workloads, over modules that stand in for theirs: what they are given, and whether checks see what is wrong.

The stand-ins compute what was read in the peers' sources, by the oracle.
"""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from nsa.benchmarks import fla_core, peers, prefill
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.benchmarks.operations import op_workloads
from nsa_varlen.benchmarks.trying import TINY, FaultyBackend, off_by_a_little, tried
from torch import Tensor

GEOMETRY = {"kernel_size": 16, "kernel_stride": 16, "block_size": 16, "topk": 8, "window_size": 20}
SIZES = {"S": 250, "batch": 2, "num_heads": 16, "num_kv_heads": 1, "head_dim": 32, "dtype": "bfloat16"}
SELECTED = TINY | {"S": 90, "batch": 2, "block_size": 16}


class FlaModule:
    """`fla.ops.nsa` and `fla.ops.nsa.parallel`, of one geometry."""

    def __init__(self) -> None:
        self.window_off = 0
        self.pooled_by: Callable[[Tensor], Tensor] = lambda x: x
        self.chosen_by: Callable[[Tensor, int], Tensor] = lambda listed, size: listed
        self.calls: list[dict[str, Any]] = []

    def blocks(self, size: int, topk: int, window: int = 1) -> BlockGeometry:
        return BlockGeometry(size, size, size, topk, window_size=max(1, window))

    def mean_pooling(self, x: Tensor, size: int) -> Tensor:
        """A last block that is not full is averaged, too."""
        parts = [part.float().mean(1) for part in x.split(size, 1)]
        return self.pooled_by(torch.stack(parts, 1).to(x.dtype))

    def parallel_nsa_compression(
        self, q: Tensor, k: Tensor, v: Tensor, TK: int, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        layout, blocks = VarlenLayout.from_lengths([TK]), self.blocks(block_size, 16)
        q, k, v = (x[0].double() for x in (q, k, v))
        count = blocks.num_compressed(TK)
        out, lse = reference.compressed_attention(q, k[:count], v[:count], layout, blocks, scale=scale)
        return out[None], lse.T[None]

    def parallel_nsa_topk(
        self, q: Tensor, k: Tensor, lse: Tensor, TK: int, block_counts: int, block_size: int, scale: float
    ) -> Tensor:
        """Of rounded queries; by no order of numbers."""
        layout, blocks = VarlenLayout.from_lengths([TK]), self.blocks(block_size, block_counts)
        taken, k_cmp = (q[0] * scale).double(), k[0, : blocks.num_compressed(TK)].double()
        _, exact = reference.compressed_attention(taken, k_cmp, k_cmp, layout, blocks, scale=1.0)
        listed = reference.select_blocks(taken, k_cmp, exact, layout, blocks, scale=1.0)
        return self.chosen_by(listed.flip(-1), block_size)[None]

    def parallel_nsa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g_cmp: Tensor | None = None,
        g_slc: Tensor | None = None,
        g_swa: Tensor | None = None,
        block_indices: Tensor | None = None,
        block_counts: int = 16,
        block_size: int = 64,
        window_size: int = 0,
    ) -> Tensor:
        self.calls.append({"gates": (g_cmp, g_slc, g_swa), "contiguous": all(x.is_contiguous() for x in (q, k, v))})
        tokens, blocks = q.shape[1], self.blocks(block_size, block_counts, window_size - self.window_off)
        layout, made = VarlenLayout.from_lengths([tokens]), []
        for b in range(len(q)):
            q1, k1, v1 = q[b].double(), k[b].double(), v[b].double()
            if g_cmp is None:
                assert block_indices is not None
                made.append(reference.selected_attention(q1, k1, v1, block_indices[b], layout, blocks)[0])
                continue
            one, count = slice(b, b + 1), blocks.num_compressed(tokens)
            k_cmp, v_cmp = (self.mean_pooling(x[one], block_size) for x in (k, v))
            sizes = {"TK": tokens, "block_size": block_size, "scale": q.shape[-1] ** -0.5}
            listed = self.parallel_nsa_topk(q=q[one], k=k_cmp, lse=k_cmp, block_counts=block_counts, **sizes)[0]
            k_cmp, v_cmp = (x[0, :count].double() for x in (k_cmp, v_cmp))
            outs = (
                reference.compressed_attention(q1, k_cmp, v_cmp, layout, blocks),
                reference.selected_attention(q1, k1, v1, listed, layout, blocks),
                reference.window_attention(q1, k1, v1, layout, blocks),
            )
            gates = [g[b].double()[..., None] for g in (g_cmp, g_slc, g_swa) if g is not None]
            made.append(sum(gate * out for gate, (out, _) in zip(gates, outs, strict=True)))
        return torch.stack(made).to(q.dtype)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    for member, x in members.items():
        setattr(sys.modules[name], member, x)


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> FlaModule:
    made = FlaModule()
    module(
        monkeypatch,
        "fla.ops.nsa.parallel",
        mean_pooling=made.mean_pooling,
        parallel_nsa_compression=made.parallel_nsa_compression,
        parallel_nsa_topk=made.parallel_nsa_topk,
    )
    sys.modules["fla.ops.nsa"].parallel_nsa = made.parallel_nsa  # type: ignore[attr-defined]
    return made


@pytest.fixture
def native_sparse_attend(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Heads before tokens; the own block and those that the mask shows, whose numbers are looked up in any case."""
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, block_size: int, indices: Tensor, mask: Tensor) -> Tensor:
        calls.append((indices, mask))
        assert bool((indices >= 0).all()), "an address before the keys"
        assert indices.stride() == mask.stride()
        tokens, made = q.shape[2], []
        blocks, layout = BlockGeometry(block_size, block_size, block_size), VarlenLayout.from_lengths([tokens])
        own = (torch.arange(tokens) // block_size)[:, None, None].expand(-1, k.shape[1], 1)
        for b in range(len(q)):
            others = torch.where(mask[b], indices[b], -1).transpose(0, 1)
            assert not (others == own).any(), "the own block twice"
            q1, k1, v1 = (x[b].transpose(0, 1).double() for x in (q, k, v))
            listed = torch.cat((others, own), -1).int()
            made.append(reference.selected_attention(q1, k1, v1, listed, layout, blocks)[0].transpose(0, 1))
        return torch.stack(made).to(q.dtype)

    name = "native_sparse_attention_pytorch.triton_native_sparse_attention"
    module(monkeypatch, name, native_sparse_attend=attend)
    return calls


# --- fla.prefill ------------------------------------------------------------------------------------------------------

FLA = {workload.name: workload for workload in fla_core.workloads()}


def prefilled(**changes: Any) -> tuple[Any, Any, list[Tensor]]:
    workload = FLA["fla.prefill"]
    state = workload.setup("cpu", 0, **{**workload.parameters, **SIZES, **GEOMETRY, **changes})
    return workload, state, [workload.call(state, 0)]


@pytest.mark.parametrize("changes", [{}, {"dtype": "float16"}, {"S": 90}, {"inputs": "smooth"}], ids=str)
def test_prefill_is_checked_in_its_last_rows(changes: dict[str, Any], fla: FlaModule) -> None:
    workload, state, results = prefilled(**changes)
    assert "out of the last 64 rows off by" in workload.check(state, results)
    (call,) = fla.calls
    assert call["contiguous"]
    assert all(gate.is_contiguous() and gate.shape == state.q.shape[:3] for gate in call["gates"])


@pytest.mark.usefixtures("fla")
def test_prefill_has_the_inputs_of_ours() -> None:
    """Of the same seed and parameters, so that both can stand side by side."""
    ours = next(workload for workload in prefill.workloads() if workload.name == "nsa.prefill")
    _, state, _ = prefilled()
    other = ours.setup("cpu", 0, **{**ours.parameters, **SIZES, **GEOMETRY})
    gates = torch.stack(state.gates, -1)
    for mine, theirs in ((state.q, other.q), (state.k, other.k), (state.v, other.v), (gates, other.gates)):
        assert mine.flatten(0, 1).equal(theirs)
    assert FLA["fla.prefill"].parameters.keys() == ours.parameters.keys() - {"backend"}
    parameters = {**ours.parameters, **SIZES, **GEOMETRY}
    assert FLA["fla.prefill"].cost(**parameters) == ours.cost(**parameters)


def most_recent(listed: Tensor, size: int) -> Tensor:
    """Always the last blocks, and the first."""
    current = torch.arange(len(listed))[:, None, None] // size
    recent = (current - torch.arange(listed.shape[-1])).int().expand_as(listed).clone()
    recent[..., -1].clamp_(max=0)
    return recent.clamp_min(-1)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("window", "out of the last "),
        ("pooling", "k_cmp: expected the means of "),
        ("choice", "block_indices of the last "),
        ("row", "out of the last "),
        ("gates", "out of the last "),
    ],
)
def test_a_fault_of_a_prefill_is_seen(fault: str, words: str, fla: FlaModule) -> None:
    if fault == "window":
        fla.window_off = 1
    if fault == "pooling":
        fla.pooled_by = lambda x: x.roll(1, 1)
    if fault == "choice":
        fla.chosen_by = most_recent
    workload, state, results = prefilled(topk=4)
    if fault == "row":
        results[0][-1, -1] += 0.25
    if fault == "gates":
        state = state._replace(gates=state.gates[::-1])
    with pytest.raises(AssertionError, match=f"^{words}"):
        workload.check(state, results)


ON_CUDA = {"sm": 90, "flash_attn": "2.8.3", "triton": "3.6.0"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"kernel_size": 32}, "needs kernel_size = kernel_stride = block_size, got 32, 64, 64"),
        ({"init_blocks": 2}, "forces init_blocks=1, got 2"),
        ({"local_blocks": 1}, "forces local_blocks=2, got 1"),
        ({"topk": 12}, "needs a topk that is a power of two, at most half of block_size, got 12 of 64"),
        ({"topk": 64}, "needs a topk that is a power of two, at most half of block_size, got 64 of 64"),
        ({"num_kv_heads": 8}, "needs a power of two of at least 16 query heads a kv head, got 8"),
        ({"dtype": "float32"}, "dtype: expected one of ['float16', 'bfloat16'], got 'float32'"),
        ({"inputs": "odd"}, "inputs: expected random or smooth, got 'odd'"),
    ],
)
def test_what_is_no_match_for_ours_is_refused(
    changes: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fla_core, "environment", lambda device: SimpleNamespace(**ON_CUDA))
    monkeypatch.setattr(fla_core, "installed", lambda *_: "0.6.0")
    workload = FLA["fla.prefill"]
    assert workload.refuse("cuda", **{**workload.parameters, **changes}) == words


@pytest.mark.parametrize(
    "found, flash_attn, words",
    [
        ("0.5.9", "2.8.3", "needs fla-core 0.6 or newer, got 0.5.9"),
        (None, "2.8.3", "needs fla-core 0.6 or newer, got none"),
        ("1.0", None, "needs flash-attn for its window"),
        ("1.0", "2.8.3", None),
    ],
)
def test_what_it_needs(
    found: str | None, flash_attn: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fla_core, "environment", lambda device: SimpleNamespace(flash_attn=flash_attn))
    monkeypatch.setattr(fla_core, "installed", lambda *_: found)
    workload = FLA["fla.prefill"]
    assert workload.refuse("cuda", **workload.parameters) == words
    assert workload.refuse("cpu", **workload.parameters) == "needs CUDA"


# --- attention to given blocks ----------------------------------------------------------------------------------------

ADAPTERS = [(fla_core.FlaBackend, "bfloat16"), (peers.PytorchBackend, "float16")]


def anywhere(adapter: type) -> Any:
    """The adapter, on any device."""
    made = adapter()
    made.refuse = lambda *_: None
    return made


@pytest.mark.usefixtures("fla", "native_sparse_attend")
@pytest.mark.parametrize("adapter, dtype", ADAPTERS)
def test_selected_attention_is_that_of_the_oracle(adapter: type, dtype: str) -> None:
    (workload,) = op_workloads(anywhere(adapter), ["selected_attention"])
    assert "off by" in tried(workload, **SELECTED | {"dtype": dtype})
    spoiled = FaultyBackend(anywhere(adapter), "selected_attention", off_by_a_little)
    (faulty,) = op_workloads(spoiled, ["selected_attention"])
    with pytest.raises(AssertionError, match=r"^out of the last "):
        tried(faulty, **SELECTED | {"dtype": dtype})


def test_no_key_before_the_first_is_asked_for(native_sparse_attend: list[Any]) -> None:
    """-1 is no number of a block for it: its kernel reads whatever it is given, and masks afterwards."""
    (workload,) = op_workloads(anywhere(peers.PytorchBackend), ["selected_attention"])
    state = workload.setup("cpu", 0, **{**workload.parameters, **SELECTED, "dtype": "float16"})
    assert (state.args[3] == -1).any()
    workload.call(state, 0)
    ((indices, mask),) = native_sparse_attend
    assert indices.shape == mask.shape == (2, 2, 90, 4)


BLOCKS_AND_DIMS = "needs a block_size that is a power of two from 16 on, and head_dim up to 128"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "computes in float16, got torch.bfloat16"),
        ({"pass": "backward"}, "is compared forward only"),
        ({"num_heads": 64}, "needs 1, 2, 4, 8 or 16 query heads a kv head, got 32"),
        ({"num_heads": 6}, "needs 1, 2, 4, 8 or 16 query heads a kv head, got 3"),
        ({"head_dim": 256}, f"{BLOCKS_AND_DIMS}, got 64 and 256"),
        ({"block_size": 48}, f"{BLOCKS_AND_DIMS}, got 48 and 64"),
    ],
)
def test_what_native_sparse_attend_does_not_do_is_refused(
    changes: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_varlen.benchmarks.operations.environment", lambda device: SimpleNamespace(**ON_CUDA))
    (workload,) = peers.pytorch_workloads()
    assert workload.refuse("cuda", **{**workload.parameters, **changes}) == words
    assert workload.refuse("cpu", **workload.parameters) == "needs CUDA"


def test_gradients_of_fla_want_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_core, "installed", lambda *_: "0.6.0")
    workload = FLA["fla.selected_attention"]
    assert workload.refuse("cuda", **{**workload.parameters, "topk": 12}) is None
    words = "needs a topk that is a power of two for its gradients, got 12"
    assert workload.refuse("cuda", **{**workload.parameters, "topk": 12, "pass": "backward"}) == words


# --- which there are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "there, names",
    [
        ([], []),
        (["fla-core"], ["fla.prefill", "fla.selected_attention"]),
        (["native-sparse-attention-pytorch"], ["nsa-pytorch.selected_attention"]),
    ],
)
def test_those_that_are_installed(there: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look into them."""
    monkeypatch.setattr(peers, "installed", lambda name: "1.0" if name in there else None)
    assert [workload.name for workload in peers.workloads()] == names
    assert not {"fla", "native_sparse_attention_pytorch"} & sys.modules.keys()
