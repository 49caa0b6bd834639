"""What does each backend refuse, in which words, and what does it accept beside that? No kernel is called."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from nsa_fa2 import CUDNN, FA2, FA2_TORCH, FlashBackend, machines
from nsa_fa2.testing import DENSE_ONLY, Case, PlainKernel, plain_backend
from nsa_varlen import BlockGeometry, VarlenLayout

CMP, SLC, WIN = OPS = ["compressed_attention", "selected_attention", "window_attention"]
BACKENDS = {backend.name: backend for backend in (FA2, FA2_TORCH, CUDNN)}
# What each takes of the operations, on a uniform batch.
TAKEN = [*product(("fa2", "fa2-torch"), OPS), ("cudnn", CMP)]
EACH = pytest.mark.parametrize(("name", "op"), TAKEN)


@pytest.fixture(autouse=True)
def _operations_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch that runs the tests may be older than the machines' is said to be."""
    for provider in (machines.torch_flash, machines.cudnn):
        monkeypatch.setattr(provider, "is_known", lambda: True)


@dataclass(frozen=True)
class Problem:
    """As routing has it: a uniform prefill in bf16 on a GPU."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    v_head_dim: int = 128
    needs_grad: bool = False
    deterministic: bool | None = None
    paged: bool = False
    uniform: bool = True
    softcap: bool = False
    sinks: bool = False
    fp8_scales: bool = False


@dataclass(frozen=True)
class Machine:
    """As routing has it: an H100 with everything."""

    sm: int | None = 90
    torch: str = "2.11.0"
    flash_attn: str | None = "2.8.3"
    cudnn: int | None = 91_900


def refusal(name: str, op: str, machine: Any = None, **asked: Any) -> str | None:
    return BACKENDS[name].refuse(op, Problem(**asked), Machine() if machine is None else machine)


@EACH
def test_a_uniform_prefill_on_an_h100_is_taken(name: str, op: str) -> None:
    assert refusal(name, op) is None
    for asked in ({"dtype": torch.float16}, {"needs_grad": True}, {"deterministic": True}, {"head_dim": 64}):
        assert refusal(name, op, **asked) is None


@pytest.mark.parametrize("op", ["compress_mean", "select_blocks", "combine", "", "attention"])
@pytest.mark.parametrize("name", BACKENDS)
def test_other_operations(name: str, op: str) -> None:
    assert refusal(name, op) == f"has no operation {op}"
    assert not hasattr(BACKENDS[name], op or "attention")


@EACH
@pytest.mark.parametrize("feature", ["softcap", "sinks", "fp8_scales"])
def test_what_nobody_implements(name: str, op: str, feature: str) -> None:
    assert refusal(name, op, **{feature: True}) == f"does not implement {feature}"


@EACH
def test_devices(name: str, op: str) -> None:
    for device in ("cpu", "mps", "xpu"):
        assert refusal(name, op, device=device) == f"needs CUDA, got {device}"


@EACH
def test_dtypes(name: str, op: str) -> None:
    for dtype, word in ((torch.float32, "float32"), (torch.float64, "float64")):
        assert refusal(name, op, dtype=dtype) == f"takes float16 and bfloat16, not {word}"
    assert refusal(name, op, dtype=torch.float8_e4m3fn) == "takes float16 and bfloat16, not float8_e4m3fn"


@EACH
def test_head_dims(name: str, op: str) -> None:
    most = 128 if name == "cudnn" else 256
    for dims in product((8, 40, 64, 128, most), repeat=2):
        assert refusal(name, op, head_dim=dims[0], v_head_dim=dims[1]) is None
    for dims in ((12, 64), (64, 12), (1, 1), (129, 127)):
        assert refusal(name, op, head_dim=dims[0], v_head_dim=dims[1]) == (
            f"needs head_dim and v_head_dim that are multiples of 8, got {dims[0]} and {dims[1]}"
        )
    for dims in ((264, 64), (64, 264), (most + 8, most), (most, most + 8), (576, 512)):
        assert refusal(name, op, head_dim=dims[0], v_head_dim=dims[1]) == (
            f"needs head_dim and v_head_dim up to {most}, got {dims[0]} and {dims[1]}"
        )


def test_a_head_dim_for_flash_attention_that_cudnn_has_not() -> None:
    for name, op in TAKEN:
        reason = refusal(name, op, head_dim=160, v_head_dim=160)
        assert reason == ("needs head_dim and v_head_dim up to 128, got 160 and 160" if name == "cudnn" else None)


def test_cudnn_is_for_the_compressed_branch_of_uniform_batches() -> None:
    assert refusal("cudnn", WIN) == "has no sliding window"
    assert refusal("cudnn", SLC) == "has no ragged batches, which gathered keys are"
    assert refusal("cudnn", CMP, paged=True) == "does not take paged keys and values"
    ragged = "needs sequences of one length, with as many queries as keys"
    assert refusal("cudnn", CMP, uniform=False) == ragged
    for name, op in product(("fa2", "fa2-torch"), OPS):
        assert refusal(name, op, uniform=False) is None
        assert refusal(name, op, uniform=False, paged=True) is None


def test_a_problem_that_does_not_say_whether_it_is_uniform_is_not() -> None:
    class Older:
        device, dtype, head_dim, v_head_dim = "cuda", torch.float16, 64, 64

    assert FA2.refuse(CMP, Older, Machine()) is None
    assert CUDNN.refuse(CMP, Older, Machine()) == "needs sequences of one length, with as many queries as keys"


@pytest.mark.parametrize(("name", "op"), list(product(("fa2", "fa2-torch"), OPS)))
def test_gradients_of_pages(name: str, op: str) -> None:
    assert refusal(name, op, paged=True) is None
    expected = "records no gradients through paged keys and values"
    assert refusal(name, op, paged=True, needs_grad=True) == expected


def test_deterministic_gradients() -> None:
    expected: dict[tuple[str, str], str | None] = dict.fromkeys(TAKEN, "has no deterministic gradients")
    expected |= dict.fromkeys([("fa2", CMP), ("fa2", WIN)])
    expected |= dict.fromkeys(product(("fa2", "fa2-torch"), [SLC]), SLC_ORDER)
    for (name, op), reason in expected.items():
        assert refusal(name, op, deterministic=True, needs_grad=True) == reason, (name, op)
        for asked in ({"deterministic": True}, {"needs_grad": True}, {"deterministic": False, "needs_grad": True}):
            assert refusal(name, op, **asked) is None


SLC_ORDER = "adds up the gradients of gathered keys in no fixed order"


@EACH
def test_machines(name: str, op: str) -> None:
    """A GPU that is not NVIDIA's has no compute capability."""
    assert refusal(name, op, Machine(sm=None)) == "needs an NVIDIA GPU"
    assert refusal(name, op, Machine(sm=75)) == "needs SM 8.0 or newer, got 7.5"
    for sm in (80, 86, 89, 90, 100, 120):
        assert refusal(name, op, Machine(sm=sm)) is None


def test_each_provider_needs_its_own_library_alone() -> None:
    bare = Machine(flash_attn=None, cudnn=None)
    assert refusal("fa2-torch", CMP, bare) is None
    assert refusal("fa2", CMP, replace(bare, flash_attn="2.8.0")) is None
    assert refusal("cudnn", CMP, replace(bare, cudnn=90_000)) is None


@pytest.mark.parametrize(
    "version", ["2.8", "2.8.0", "2.8.3", "2.8.3.post2", "2.8.3+cu12torch2.8cxx11abiTRUE", "2.8rc1", "2.9.1", "2.10.0"]
)
def test_flash_attn_that_serves(version: str) -> None:
    assert refusal("fa2", CMP, Machine(flash_attn=version)) is None


@pytest.mark.parametrize(
    "version",
    ["2.7.4.post1", "2.0", "1.0.9", "3.0.0", "3.0.0b1", "20.8", "2", "2.x", "dev", "", "v2", "2..8", "main-8"],
)
def test_flash_attn_that_does_not(version: str) -> None:
    """Versions that are none at all are refused too: asking raises nothing."""
    expected = f"needs flash-attn >=2.8,<3, got {version}"
    assert refusal("fa2", CMP, Machine(flash_attn=version)) == expected


def test_flash_attn_that_is_not_there() -> None:
    expected = "needs flash-attn >=2.8,<3: pip install --no-build-isolation flash-attn"
    assert refusal("fa2", CMP, Machine(flash_attn=None)) == expected


def test_cudnn_that_is_old_or_not_there() -> None:
    assert refusal("cudnn", CMP, Machine(cudnn=None)) == "needs cuDNN 9, got none"
    assert refusal("cudnn", CMP, Machine(cudnn=8_902)) == "needs cuDNN 9, got 8902"
    assert refusal("cudnn", CMP, Machine(cudnn=90_000)) is None

    class Older:  # an environment that does not know of cuDNN
        sm, torch, flash_attn = 90, "2.11.0", None

    assert refusal("cudnn", CMP, Older) == "needs cuDNN 9, got none"


def test_a_torch_with_other_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("fa2-torch", WIN) is None
    monkeypatch.setattr(machines.torch_flash, "is_known", lambda: False)
    expected = "needs torch 2.7 or newer, got 2.4.0"
    assert refusal("fa2-torch", WIN, Machine(torch="2.4.0")) == expected
    assert refusal("cudnn", CMP) is None
    monkeypatch.setattr(machines.cudnn, "is_known", lambda: False)
    assert refusal("cudnn", CMP, Machine(torch="2.4.0")) == "needs torch 2.5 or newer, got 2.4.0"
    assert refusal("fa2", WIN, Machine(torch="2.4.0")) is None


def test_the_problem_is_refused_before_the_machine() -> None:
    """What no machine could do is said first."""
    for name in BACKENDS:
        assert refusal(name, CMP, Machine(sm=None), dtype=torch.float32) == "takes float16 and bfloat16, not float32"


BLOCKS = BlockGeometry(6, 3, 6, 3, window_size=8)


def case_of(op: str, q: list[int], k: list[int], **sizes: int) -> Case:
    return Case.random(op, VarlenLayout.from_lengths(q, k), BLOCKS, **sizes)


@EACH
def test_a_direct_call_says_the_same(name: str, op: str) -> None:
    case = case_of(op, [9, 9], [9, 9])
    with pytest.raises(ValueError, match=rf"^{op} on backend {name}: needs CUDA, got cpu$"):
        getattr(BACKENDS[name], op)(*case[1:4], *case.rest)


class Untouched(PlainKernel):
    """No call may reach it."""

    def forward(self, *tensors: Any, **options: Any) -> Any:
        raise AssertionError("called in spite of a refusal")


def assert_refused(case: Case, limits: Any, reason: str, **options: Any) -> None:
    """In the words of the contract, and before anything is computed."""
    backend = FlashBackend("strict", Untouched(limits), lambda environment: None)
    with pytest.raises(ValueError, match=rf"^{case.op} on backend strict: ") as caught:
        getattr(backend, case.op)(*case[1:4], *case.rest, **options)
    assert str(caught.value) == f"{case.op} on backend strict: {reason}"


@pytest.mark.parametrize("op", OPS)
def test_direct_calls_are_held_to_the_limits(op: str) -> None:
    case = case_of(op, [9, 9], [9, 9], head_dim=8, v_head_dim=16)
    cpu = replace(FA2.kernel.limits, devices=("cpu",))
    assert_refused(case, cpu, "takes float16 and bfloat16, not float64")
    half = case._replace(**{name: getattr(case, name).half() for name in ("q", "k", "v")})
    getattr(plain_backend(limits=cpu), op)(*half[1:4], *half.rest)
    dims = "needs head_dim and v_head_dim"
    assert_refused(half, replace(cpu, max_head_dim=8), f"{dims} up to 8, got 8 and 16")
    assert_refused(half, replace(cpu, head_dim_multiple=16), f"{dims} that are multiples of 16, got 8 and 16")


@pytest.mark.parametrize(
    "lengths", [([9, 9], [9, 8]), ([9, 8], [9, 8]), ([3], [9]), ([9], [3]), ([1, 1], [9, 9]), ([0, 9], [0, 9])], ids=str
)
def test_a_kernel_of_dense_batches_is_not_called_on_others(lengths: tuple[list[int], list[int]]) -> None:
    reason = "needs sequences of one length, with as many queries as keys"
    assert_refused(case_of(CMP, *lengths), DENSE_ONLY, reason)
    assert_refused(case_of(WIN, *lengths), DENSE_ONLY, "has no sliding window")
    assert_refused(case_of(SLC, *lengths), DENSE_ONLY, "has no ragged batches, which gathered keys are")


def test_deterministic_gradients_of_direct_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by the call, or by torch's own switch where the call does not say; not asked for without gradients."""
    unable = replace(plain_backend().kernel.limits, deterministic_gradients=False)
    for op in OPS:
        reason = SLC_ORDER if op == SLC else "has no deterministic gradients"
        case = case_of(op, [9, 4], [9, 4])
        learning = case._replace(v=case.v.clone().requires_grad_())
        backend = plain_backend(limits=unable)
        getattr(backend, op)(*case[1:4], *case.rest, deterministic=True)
        getattr(backend, op)(*learning[1:4], *case.rest, deterministic=False)
        with torch.no_grad():
            getattr(backend, op)(*learning[1:4], *case.rest, deterministic=True)
        assert_refused(learning, unable, reason, deterministic=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
            assert_refused(learning, unable, reason)
            getattr(backend, op)(*learning[1:4], *case.rest, deterministic=False)


def test_whether_gradients_must_be_deterministic_reaches_the_kernel() -> None:
    asked = []

    class Noting(PlainKernel):
        def backward(self, *tensors: Any, **options: Any) -> Any:
            asked.append(options["deterministic"])
            return super().backward(*tensors, **options)

    backend = FlashBackend("noting", Noting(), lambda environment: None)
    for op, deterministic in product((CMP, WIN), (True, False)):
        case_of(op, [9, 4], [9, 4]).run(backend, deterministic=deterministic)
        assert set(asked) == {deterministic}
        asked.clear()
