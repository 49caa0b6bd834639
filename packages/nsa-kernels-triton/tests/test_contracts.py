"""What does the backend refuse, in which words, and what does it accept beside that? No kernel is called."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nsa_kernels_triton import contracts
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.contracts import OPS
from nsa_kernels_triton.ops import attention, combining, pooling, selected, selection
from nsa_varlen import BlockGeometry, VarlenLayout, reference
from nsa_varlen.decode_testing import STREAMS, decode_case
from nsa_varlen.testing import random_inputs, to_pages

ATTENTION = ["compressed_attention", "selected_attention", "window_attention"]
BY_BLOCK = ["select_blocks", "selected_attention"]
LISTED = [*BY_BLOCK, "decode_attention"]  # that know lists of blocks
OTHERS = [op for op in OPS if op != "decode_attention"]  # that do not take pages
EACH = pytest.mark.parametrize("op", OPS)
DTYPES = "takes float16, bfloat16 and float32"


@dataclass(frozen=True)
class Problem:
    """As routing has it: a prefill in bf16 on a GPU."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    v_head_dim: int = 128
    group_size: int = 16
    topk: int = 16
    block_size: int = 64
    init_blocks: int = 1
    local_blocks: int = 2
    needs_grad: bool = False
    deterministic: bool | None = None
    paged: bool = False
    softcap: bool = False
    sinks: bool = False
    fp8_scales: bool = False


@dataclass(frozen=True)
class Machine:
    """As routing has it: an H100 with Triton."""

    device: str = "cuda"
    sm: int | None = 90
    triton: str | None = "3.7.1"


@pytest.fixture(params=[False, True], ids=["compiled", "interpreted"])
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param else "0")
    return request.param


@pytest.mark.parametrize("value", ["0", "1", "true", "YES", "on", "Y", "2", ""])
def test_the_interpreter_is_on_in_tritons_words(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert contracts.interpreted() == triton.knobs.runtime.interpret


def refusal(op: str, machine: Any = None, **asked: Any) -> str | None:
    return BACKEND.refuse(op, Problem(**asked), Machine() if machine is None else machine)


@EACH
@pytest.mark.usefixtures("interpreted")
def test_what_is_taken(op: str) -> None:
    assert refusal(op) is None
    learning = (False,) if op == "decode_attention" else (True, False)
    for asked in (
        *({"dtype": dtype} for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        *({"head_dim": dim, "v_head_dim": 257 - dim} for dim in (1, 8, 24, 96, 100, 128, 192, 255, 256)),
        *({"group_size": size} for size in (1, 2, 3, 7, 16, 63, 64)),
        *({"block_size": size} for size in (32, 64, 128)),
        *({"deterministic": asked, "needs_grad": learns} for asked in (True, False) for learns in learning),
    ):
        assert refusal(op, **asked) is None, asked


@pytest.mark.parametrize("op", ["", "attention", "nsa_attention", "refuse"])
def test_other_operations(op: str) -> None:
    assert refusal(op) == f"has no operation {op}"


@EACH
@pytest.mark.parametrize("feature", ["softcap", "sinks", "fp8_scales"])
def test_what_nobody_implements(op: str, feature: str) -> None:
    assert refusal(op, **{feature: True}) == f"does not implement {feature}"


@EACH
def test_devices(op: str, interpreted: bool) -> None:
    for device in ("mps", "xpu", "meta"):
        assert refusal(op, device=device) == "needs CUDA"
    cpu = Machine(device="cpu", sm=None)
    assert refusal(op, cpu, device="cpu", dtype=torch.float16) == (None if interpreted else "needs CUDA")


@EACH
def test_dtypes(op: str, interpreted: bool) -> None:
    for dtype, word in ((torch.float64, "float64"), (torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int8, "int8")):
        assert refusal(op, dtype=dtype) == f"{DTYPES}, not {word}"
    cpu = Machine(device="cpu", sm=None)
    expected = "takes float16 and float32 in Triton's interpreter, not bfloat16" if interpreted else "needs CUDA"
    assert refusal(op, cpu, device="cpu", dtype=torch.bfloat16) == expected


@EACH
@pytest.mark.parametrize("dims", [(0, 64), (64, 0), (257, 64), (64, 257), (576, 512)], ids=str)
def test_head_dims(op: str, dims: tuple[int, int]) -> None:
    expected = f"needs head_dim and v_head_dim from 1 to 256, got {dims[0]} and {dims[1]}"
    assert refusal(op, head_dim=dims[0], v_head_dim=dims[1]) == expected


@EACH
def test_group_sizes(op: str) -> None:
    """Of the operations that have groups."""
    for size in (65, 128):
        expected = f"needs at most 64 query heads a kv head, got {size}"
        assert refusal(op, group_size=size) == (None if op in ("compress_mean", "combine") else expected)


@EACH
def test_topk(op: str) -> None:
    """Of the operations that know lists of blocks; of a decode step, whose places few may compete for."""
    forced = {"init_blocks": 190, "local_blocks": 2}
    assert refusal(op, topk=256, **forced) is None
    assert refusal(op, topk=257, **forced) == ("needs topk up to 256, got 257" if op in LISTED else None)
    assert refusal(op, topk=67) is None
    expected = "needs topk up to 64 beside the 3 forced blocks, got 68" if op == "decode_attention" else None
    assert refusal(op, topk=68) == expected


@EACH
@pytest.mark.parametrize("size", [1, 16, 48, 96, 256])
def test_block_sizes(op: str, size: int) -> None:
    """Of the operations that know blocks."""
    expected = f"needs block_size 32, 64 or 128, got {size}" if op in LISTED else None
    assert refusal(op, block_size=size) == expected


@EACH
def test_pages(op: str) -> None:
    """A decode step has nothing else, and no gradient."""
    decodes = op == "decode_attention"
    for learns in (False, True):
        expected = "records no gradients through paged keys and values" if learns else None
        assert refusal(op, paged=True, needs_grad=learns) == (
            expected if decodes else "does not take paged keys and values"
        )


@EACH
def test_what_a_problem_does_not_say_is_false(op: str) -> None:
    class Older:
        device, dtype, head_dim, v_head_dim, group_size, block_size = "cuda", torch.float16, 64, 64, 4, 64

    assert BACKEND.refuse(op, Older, Machine()) is None


@EACH
@pytest.mark.usefixtures("interpreted")
def test_machines(op: str) -> None:
    assert refusal(op, Machine(triton=None)) == "needs triton >= 3.6, got none"
    for version in ("2.1.0", "3.5.1", "3.0.0.post1"):
        assert refusal(op, Machine(triton=version)) == f"needs triton >= 3.6, got {version}"
    for version in ("3.6.0", "3.7.1+git1", "3.10.0", "4.0"):
        assert refusal(op, Machine(triton=version)) is None
    assert refusal(op, Machine(sm=None)) == "needs an NVIDIA GPU"
    assert refusal(op, Machine(sm=75)) == "needs SM 8.0 or newer, got 7.5"
    assert refusal(op, Machine(sm=61)) == "needs SM 8.0 or newer, got 6.1"
    for sm in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        assert refusal(op, Machine(sm=sm)) is None


def test_a_machine_without_a_gpu(interpreted: bool) -> None:
    cpu = Machine(device="cpu", sm=None)
    assert contracts.missing(cpu) == (None if interpreted else "needs CUDA")
    assert contracts.missing(Machine(device="cpu", sm=None, triton=None)) == "needs triton >= 3.6, got none"


@EACH
def test_the_problem_is_refused_before_the_machine(op: str) -> None:
    """What no machine could do is said first."""
    nothing = Machine(device="cpu", sm=None, triton=None)
    assert refusal(op, nothing, dtype=torch.float64) == f"{DTYPES}, not float64"
    assert refusal(op, nothing) == "needs triton >= 3.6, got none"


BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=32, topk=4, window_size=8)
LENGTHS = [9, 40]


def call(
    op: str,
    *,
    learning: str = "",
    paged: str = "",
    blocks: BlockGeometry = BLOCKS,
    dtype: Any = torch.float16,
    **sizes: Any,
) -> Callable[[], Any]:
    """`op` on random inputs; those named in `learning` need gradients, those in `paged` come as pages."""
    layout = VarlenLayout.from_lengths(LENGTHS)
    lengths = [blocks.num_compressed(length) for length in LENGTHS] if op in ATTENTION[:1] + BY_BLOCK[:1] else LENGTHS
    q, k, v, gates = random_inputs(layout, dtype=dtype, **sizes)
    listed = torch.zeros(layout.total_q, k.shape[1], 1, dtype=torch.int32)
    given: dict[str, Any] = {"q": q, "k": k[: sum(lengths)], "v": v[: sum(lengths)], "gates": gates}
    given["out"] = given["q"].new_zeros(*q.shape[:2], v.shape[2])
    given |= {name: given[name].clone().requires_grad_() for name in learning.split()}
    given |= {name: to_pages(given[name], lengths, 4) for name in paged.split()}
    q, k, v, gates, out = given.values()
    if op == "decode_attention":
        some = decode_case([40], [1], blocks, dtype=dtype, ties=True, **sizes)
        return lambda: some.run(BACKEND)
    arguments = {
        "compress_mean": (k, layout, blocks),
        "compressed_attention": (q, k, v, layout, blocks),
        "select_blocks": (q, k, torch.zeros(q.shape[1], q.shape[0]), layout, blocks),
        "selected_attention": (q, k, v, listed, layout, blocks),
        "window_attention": (q, k, v, layout, blocks),
        "combine": (gates, out, out, out),
    }[op]
    return lambda: getattr(BACKEND, op)(*arguments)


def assert_refused(made: Callable[[], Any], op: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op} on backend triton: ") as caught:
        made()
    assert str(caught.value) == f"{op} on backend triton: {reason}"


@EACH
def test_a_direct_call_says_the_same(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert_refused(call(op), op, "needs CUDA")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_refused(call(op, dtype=torch.float64), op, f"{DTYPES}, not float64")
    inside = "takes float16 and float32 in Triton's interpreter, not bfloat16"
    assert_refused(call(op, dtype=torch.bfloat16), op, inside)
    dims = (257, 257) if op in ("compress_mean", "select_blocks", "combine") else (257, 8)
    expected = f"needs head_dim and v_head_dim from 1 to 256, got {dims[0]} and {dims[1]}"
    assert_refused(call(op, head_dim=257, v_head_dim=257 if op == "combine" else 8), op, expected)


@pytest.mark.parametrize("op", [*ATTENTION, "select_blocks", "decode_attention"])
def test_direct_calls_with_large_groups(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_refused(call(op, heads=130), op, "needs at most 64 query heads a kv head, got 65")


@pytest.mark.parametrize("op", BY_BLOCK)  # a decode step's must fit its pages, too: test_decode.py
def test_direct_calls_with_other_blocks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    odd = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=48, topk=4)
    assert_refused(call(op, blocks=odd), op, "needs block_size 32, 64 or 128, got 48")


PAGED = [*((op, paged) for op in ATTENTION for paged in ("k v", "k", "v")), ("select_blocks", "k")]


@pytest.mark.parametrize(("op", "paged"), PAGED)
def test_direct_calls_with_pages(op: str, paged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_refused(call(op, paged=paged), op, "does not take paged keys and values")


LEARNING = [
    ("compress_mean", "k"),
    *((op, name) for op in ATTENTION for name in ("q", "k", "v")),
    *(("select_blocks", name) for name in ("q", "k")),
    *(("combine", name) for name in ("gates", "out")),
]


@pytest.mark.parametrize(("op", "learning"), LEARNING)
def test_direct_calls_that_learn_are_taken(op: str, learning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the contract: no kernel is called."""
    taken = []
    for module in (attention, combining, pooling, selected, selection):
        if hasattr(module, op):
            monkeypatch.setattr(module, op, lambda *args: taken.append(any(map(learns, args))))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    call(op, learning=learning)()
    assert taken == [True]


def learns(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def test_without_grad_mode_no_gradients_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unmet(op: str, problem: Any) -> str:
        asked.append(problem.needs_grad)
        return "stop"

    monkeypatch.setattr("nsa_kernels_triton.backend.unmet", unmet)
    for op, learning in LEARNING:
        made = call(op, learning=learning)
        assert_refused(made, op, "stop")
        with torch.no_grad():
            assert_refused(made, op, "stop")
    assert asked == [True, False] * len(LEARNING)


def test_each_branch_counts_for_combine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "nsa_kernels_triton.backend.unmet", lambda op, problem: asked.append(problem.needs_grad) or "no"
    )
    gates, out = torch.ones(3, 2, 3), torch.ones(3, 2, 8)
    for place in range(4):
        outs = [out.clone().requires_grad_(i == place) for i in range(3)]
        with pytest.raises(ValueError, match="combine on backend triton: no"):
            BACKEND.combine(gates, *outs)
    assert asked == [True] * 3 + [False]


@EACH
def test_bad_arguments_are_told_as_the_reference_tells_them(op: str) -> None:
    """Before the contract is asked."""
    layout = VarlenLayout.from_lengths([9])
    q, k, v, gates = random_inputs(layout, dtype=torch.float32)
    short, lse = VarlenLayout.from_lengths([8]), torch.zeros(4, 9)
    decode = decode_case([40], [1], BLOCKS, ties=True).changed(gates=gates)
    arguments = {
        "compress_mean": (k, short, BLOCKS),
        "compressed_attention": (q, k, v, layout, BLOCKS),
        "select_blocks": (q, k, lse, layout, BLOCKS),
        "selected_attention": (q, k, v, torch.zeros(9, 1, 1, dtype=torch.int32), layout, BLOCKS),
        "window_attention": (q, k[:8], v, layout, BLOCKS),
        "combine": (gates, q, q, k),
        "decode_attention": tuple(decode[name] for name in (*("q", *STREAMS), "gates", "counts", "blocks")),
    }[op]
    said = []
    for backend in (BACKEND, reference):
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(backend, op)(*arguments)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]
    assert "expected" in said[0][1]


def test_the_backend_has_its_name_and_every_operation() -> None:
    assert BACKEND.name == "triton"
    assert BACKEND.uses_triton is True
    others = {"decode_stages", "name", "refuse", "uses_triton"}
    assert {x for x in dir(BACKEND) if not x.startswith("_")} == {*OPS, *others}


@EACH
def test_signatures_are_those_of_the_reference(op: str) -> None:
    def parameters(owner: Any) -> list[tuple[Any, ...]]:
        return [(x.name, x.kind, x.default) for x in inspect.signature(getattr(owner, op)).parameters.values()]

    assert parameters(BACKEND) == parameters(reference)


@pytest.mark.parametrize("op", OTHERS)
def test_each_operation_is_an_operator_of_torch(op: str) -> None:
    """But the decode step, which writes what it is given: compiled code calls it as it stands."""
    assert hasattr(torch.ops.nsa_kernels_triton, op)


ASKED = """
import sys, torch
from types import SimpleNamespace as Some
from nsa_kernels_triton.backend import BACKEND
problem = Some(device="cuda", dtype=torch.float16, head_dim=64, v_head_dim=64, group_size=4, block_size=64)
print([BACKEND.refuse(op, problem, Some(device="cuda", sm=90, triton="3.7.1")) for op in ("combine", "select_blocks")])
print(*{"triton", "flash_attn"} & sys.modules.keys())
"""


@pytest.mark.parametrize("stub", [False, True], ids=["as-it-is", "triton-breaks"])
def test_import_and_refusals_are_light(stub: bool, tmp_path: Path) -> None:
    """Also where importing triton would raise."""
    if stub:
        (tmp_path / "triton.py").write_text("raise RuntimeError('imported')\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", ASKED], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[None, None]", ""]
