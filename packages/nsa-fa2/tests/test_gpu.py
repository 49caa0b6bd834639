"""Do the real kernels on a GPU give what the oracle gives, within the budget of half precision? And what else they owe.

Shapes are small: what is asked here is whether the providers do what `PlainKernel` does in their place elsewhere.
"""

import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from nsa_fa2 import CUDNN, FA2, FA2_TORCH, FlashBackend
from nsa_fa2.contracts import unmet
from nsa_fa2.providers import flash_attn
from nsa_varlen import BlockGeometry, VarlenLayout, masks, reference
from nsa_varlen.testing import (
    HALF_BUDGET,
    assert_within_budget,
    errors,
    plain_attention,
    poisoned_empty,
    random_inputs,
    to_pages,
)
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BACKENDS = {backend.name: backend for backend in (FA2, FA2_TORCH, CUDNN)}
OPS = ("compressed_attention", "selected_attention", "window_attention")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Errors are compared by their largest: with few heads that is the luck of a few elements, so small groups get more.
HEADS = {group: (max(32, 2 * group), max(32 // group, 2)) for group in (1, 4, 8, 16)}
BLOCKS = BlockGeometry()
SMALL = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=5, window_size=40)
# Whole prefill of one length; after a prefix; ragged, with chunks, decode steps, empty ones, more queries than keys.
LENGTHS = {
    "one": ([433], None),
    "uniform": ([160, 160], None),
    "prefix": ([61, 61], [250, 250]),
    "ragged": ([300, 77, 0, 1, 40, 9], [300, 650, 40, 500, 13, 0]),
}


@pytest.fixture(autouse=True, scope="module")
def _autograd_has_a_context() -> None:
    """The first matrix product in autograd's thread warns that it makes its CUDA context; warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.ones(2, 2, device="cuda", requires_grad=True)
        (x @ x).sum().backward()


def machine() -> SimpleNamespace:
    """This machine, as routing would describe it."""
    major, minor = torch.cuda.get_device_capability()
    try:
        found = version("flash-attn")
    except PackageNotFoundError:
        found = None
    return SimpleNamespace(
        sm=10 * major + minor, torch=torch.__version__, flash_attn=found, cudnn=torch.backends.cudnn.version()
    )


def problem(lengths: str = "ragged", dtype: torch.dtype = torch.bfloat16, **more: object) -> SimpleNamespace:
    asked = {"device": "cuda", "dtype": dtype, "head_dim": 64, "v_head_dim": 64}
    return SimpleNamespace(**asked | {"uniform": lengths in ("one", "uniform")} | more)


def taken() -> list[tuple[str, str, str]]:
    """(backend, op, lengths) of all that the limits of a backend's kernel allow."""
    return [
        (name, op, lengths)
        for name, op, lengths in product(BACKENDS, OPS, LENGTHS)
        if unmet(op, problem(lengths), BACKENDS[name].kernel.limits) is None
    ]


def able(backend: FlashBackend, op: str, asked: SimpleNamespace) -> FlashBackend:
    """The backend, or a skip with its own reason."""
    reason = backend.refuse(op, asked, machine())
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    return backend


class Case(NamedTuple):
    """Arguments of an operation, and the mask that they mean."""

    args: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]
    mask: Tensor
    layout: VarlenLayout
    blocks: BlockGeometry


def case(
    op: str, lengths: str, dtype: torch.dtype, blocks: BlockGeometry = BLOCKS, *, heads: tuple[int, int], dim: int
) -> Case:
    layout = VarlenLayout.from_lengths(*LENGTHS[lengths], device="cuda")
    inputs = random_inputs(layout, heads=heads[0], kv_heads=heads[1], head_dim=dim)
    q, k, v = (x.to(dtype) for x in inputs[:3])
    if op == "window_attention":
        return Case((q, k, v), (), masks.window_mask(layout, blocks)[:, None], layout, blocks)
    k_cmp, v_cmp = (reference.compress_mean(x.double(), layout, blocks).to(dtype) for x in (k, v))
    if op == "compressed_attention":
        return Case((q, k_cmp, v_cmp), (), masks.compressed_mask(layout, blocks)[:, None], layout, blocks)
    _, lse = reference.compressed_attention(q.double(), k_cmp.double(), v_cmp.double(), layout, blocks)
    indices = reference.select_blocks(q.double(), k_cmp.double(), lse, layout, blocks)
    return Case((q, k, v), (indices,), masks.selected_mask(indices, layout, blocks), layout, blocks)


def results(attend, args: tuple[Tensor, ...]) -> list[Tensor]:
    """[out, dq, dk, dv] for one upstream gradient, exact in every dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in args]
    out = attend(*leaves)
    generator = torch.Generator().manual_seed(3)
    out.backward(torch.randint(-2, 3, out.shape, generator=generator).to(out))
    return [out.detach(), *(x.grad for x in leaves)]


def assert_as_the_oracle(
    backend: FlashBackend, op: str, made: Case, judge: Callable[..., None] = assert_within_budget
) -> None:
    """Out and gradients within twice the error of plain torch in the same dtype, max-abs and RMS; lse by its bound."""
    rest = (*made.indices, made.layout, made.blocks)
    exact = results(lambda *x: getattr(reference, op)(*x, *rest)[0], tuple(x.double() for x in made.args))
    plain = results(lambda *x: plain_attention(*x, made.mask), made.args)
    got = results(lambda *x: getattr(backend, op)(*x, *rest)[0], made.args)
    for name, *tensors in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        judge(*tensors, name=f"{op} {name}")
    with torch.no_grad():
        _, lse = getattr(backend, op)(*made.args, *rest)
    _, exact_lse = getattr(reference, op)(*(x.double() for x in made.args), *rest)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    seen = exact_lse > -torch.inf
    # Products of halves are exact in fp32; sums of Dk of them, the scaling, exp and the sum over keys are not.
    q, k = (x.double().norm(dim=-1).max() if x.numel() else 0.0 for x in made.args[:2])
    dim = made.args[0].shape[-1]
    bound = 2.0**-24 * ((2 * dim + 8) * float(q * k) * dim**-0.5 + made.layout.max_seqlen_k + 16)
    assert float((lse[seen] - exact_lse[seen]).abs().max()) <= bound


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, op, lengths", taken())
def test_as_the_oracle(name: str, op: str, lengths: str, dtype: str, group: int, dim: int) -> None:
    backend = able(BACKENDS[name], op, problem(lengths, DTYPES[dtype], head_dim=dim, v_head_dim=dim))
    assert_as_the_oracle(backend, op, case(op, lengths, DTYPES[dtype], heads=HEADS[group], dim=dim))


@pytest.mark.parametrize("name, op, lengths", taken())
def test_other_block_sizes(name: str, op: str, lengths: str) -> None:
    backend = able(BACKENDS[name], op, problem(lengths))
    assert_as_the_oracle(backend, op, case(op, lengths, torch.float16, SMALL, heads=HEADS[4], dim=64))


def test_many_phases_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit the workspace goes in several calls: the same bits of out, and gradients within the budget."""
    backend = able(FA2_TORCH, "compressed_attention", problem())
    for op, lengths in product(("compressed_attention", "selected_attention"), ("one", "ragged")):
        made = case(op, lengths, torch.bfloat16, heads=HEADS[4], dim=64)
        rest = (*made.indices, made.layout, made.blocks)
        out, lse = getattr(backend, op)(*made.args, *rest)
        with monkeypatch.context() as patch:
            patch.setattr("nsa_fa2.attention.WORKSPACE", 1 << 18)
            again, lse_again = getattr(backend, op)(*made.args, *rest)
            assert torch.equal(out, again)
            assert torch.equal(lse, lse_again)
            assert_as_the_oracle(backend, op, made)


@pytest.mark.parametrize("op", OPS)
def test_the_providers_agree(op: str) -> None:
    """flash-attn and torch build from one source: they differ by the order of sums, less than one rounding of bf16."""
    fa2, fa2_torch = (able(backend, op, problem()) for backend in (FA2, FA2_TORCH))
    made = case(op, "ragged", torch.bfloat16, heads=(8, 2), dim=128)
    rest = (*made.indices, made.layout, made.blocks)
    first, second = (results(lambda *x, b=b: getattr(b, op)(*x, *rest)[0], made.args) for b in (fa2, fa2_torch))
    for name, x, y in zip(("out", "dq", "dk", "dv"), first, second, strict=True):
        ulp = torch.finfo(torch.bfloat16).eps * float(y.abs().max())
        assert float((x - y).abs().max()) <= ulp, name


@pytest.mark.parametrize("name, op, lengths", taken())
def test_nothing_is_left_unwritten(name: str, op: str, lengths: str) -> None:
    backend = able(BACKENDS[name], op, problem(lengths))
    made = case(op, lengths, torch.bfloat16, SMALL, heads=HEADS[4], dim=64)
    with poisoned_empty():
        assert_as_the_oracle(backend, op, made)


@pytest.mark.parametrize("op", ["compressed_attention", "window_attention"])
def test_deterministic_gradients(op: str) -> None:
    """fa2 has them on request; without, its dq is summed by atomics and varies."""
    backend = able(FA2, op, problem())
    for lengths in ("one", "ragged"):
        made = case(op, lengths, torch.bfloat16, heads=(16, 2), dim=128)

        def attend(*x: Tensor, made: Case = made) -> Tensor:
            return getattr(backend, op)(*x, made.layout, made.blocks, deterministic=True)[0]

        first, *others = (results(attend, made.args) for _ in range(3))
        assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("name, op, lengths", taken())
def test_forwards_are_deterministic(name: str, op: str, lengths: str) -> None:
    backend = able(BACKENDS[name], op, problem(lengths, deterministic=True))
    made = case(op, lengths, torch.bfloat16, heads=(16, 2), dim=128)
    rest = (*made.indices, made.layout, made.blocks)
    first, *others = (getattr(backend, op)(*made.args, *rest, deterministic=True) for _ in range(3))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("dims", [(128, 64), (64, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("name, op, lengths", [taken for taken in taken() if taken[2] == "uniform"])
def test_unequal_head_dims(name: str, op: str, lengths: str, dims: tuple[int, int]) -> None:
    backend = able(BACKENDS[name], op, problem(lengths, head_dim=dims[0], v_head_dim=dims[1]))
    made = case(op, lengths, torch.bfloat16, SMALL, heads=HEADS[4], dim=dims[0])
    generator = torch.Generator("cuda").manual_seed(1)
    v = torch.randn(*made.args[2].shape[:2], dims[1], generator=generator, device="cuda", dtype=torch.bfloat16)
    try:
        assert_as_the_oracle(backend, op, made._replace(args=(*made.args[:2], v)))
    except RuntimeError as error:
        if "was built without a kernel" not in str(error):
            raise
        pytest.skip(str(error))


def test_a_reduced_build_of_flash_attn_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a build returns whatever memory held: here a call that writes nothing stands for it."""
    able(FA2, "window_attention", problem())
    for windowed in (False, True):
        flash_attn.check_built(64, torch.bfloat16, torch.device("cuda", 0), windowed=windowed)
    monkeypatch.setattr(flash_attn, "_built", set())
    monkeypatch.setattr(flash_attn, "_forward", lambda q, *_: (torch.full_like(q, 3.0), q))
    for windowed, words in ((False, "a kernel"), (True, "a kernel of windows")):
        with pytest.raises(RuntimeError, match=rf"was built without {words} for head_dim 64 in torch\.bfloat16"):
            flash_attn.check_built(64, torch.bfloat16, torch.device("cuda", 0), windowed=windowed)


def assert_rms_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    """flash-attn rounds the dk and dv of each head before it adds those of a group: of few numbers one stands out."""
    got, allowed = (errors(x, exact)[1] for x in (actual, plain))
    assert got <= HALF_BUDGET * allowed, name


@pytest.mark.parametrize("dim", [8, 32, 40, 96, 256])
@pytest.mark.parametrize("lengths", ["one", "ragged"])
@pytest.mark.parametrize("op", OPS)
def test_a_head_dim_is_computed_or_refused(op: str, lengths: str, dim: int) -> None:
    """flash-attn may have been built for some: for the others there must be words, not numbers."""
    backend = able(FA2, op, problem(lengths, head_dim=dim, v_head_dim=dim))
    made = case(op, lengths, torch.bfloat16, heads=HEADS[4], dim=dim)
    try:
        assert_as_the_oracle(backend, op, made, assert_rms_within_budget)
    except RuntimeError as error:
        if "was built without a kernel" not in str(error):
            raise


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["fa2", "fa2-torch"])
def test_pages(name: str, op: str) -> None:
    """Paged keys and values count as packed ones do; rows that no sequence owns are NaN.

    Equal bits, but for the window: there keys that no query reaches are left out, and sums begin elsewhere.
    """
    backend = able(BACKENDS[name], op, problem())
    made = case(op, "ragged", torch.bfloat16, heads=HEADS[4], dim=64)
    lengths = LENGTHS["ragged"][1]
    if op == "compressed_attention":
        lengths = [made.blocks.num_compressed(length) for length in lengths]
    paged = [to_pages(x, lengths, 64) for x in made.args[1:]]
    rest = (*made.indices, made.layout, made.blocks)
    out, lse = getattr(backend, op)(made.args[0], *paged, *rest)
    expected = getattr(backend, op)(*made.args, *rest)
    if op == "window_attention":
        exact, _ = getattr(reference, op)(*(x.double() for x in made.args), *rest)
        assert_within_budget(out, plain_attention(*made.args, made.mask), exact)
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-4)
    else:
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["fa2", "fa2-torch"])
def test_a_decode_step_with_an_idle_sequence(name: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-2 takes packed queries for dense ones where the longest sequence is said to have one query."""
    backend = able(BACKENDS[name], op, problem())
    monkeypatch.setitem(LENGTHS, "idle", ([1, 0, 1], [300, 200, 100]))
    assert_as_the_oracle(backend, op, case(op, "idle", torch.bfloat16, heads=HEADS[16], dim=128))


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("length", [32, 33, 40, 47, 48, 64])
@pytest.mark.parametrize("name", BACKENDS)
def test_one_or_two_compressed_blocks(name: str, length: int, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest sequences that see a block: calls of one key, of one row, or both."""
    op = "compressed_attention"
    backend = able(BACKENDS[name], op, problem("uniform"))
    monkeypatch.setitem(LENGTHS, "short", ([length] * sequences, None))
    assert_as_the_oracle(backend, op, case(op, "short", torch.bfloat16, heads=HEADS[4], dim=128))


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize("name, op, lengths", taken())
def test_nobody_waits(name: str, op: str, lengths: str) -> None:
    """Forward and backward, on a layout that has its lengths on the host, from its first use on."""
    backend = able(BACKENDS[name], op, problem(lengths))
    made = case(op, lengths, torch.bfloat16, heads=(8, 2), dim=64)
    rest = (*made.indices, made.layout, made.blocks)
    results(lambda *x: getattr(backend, op)(*x, *rest)[0], made.args)  # loads libraries
    leaves = [x.detach().clone().requires_grad_() for x in made.args]
    torch.cuda.set_sync_debug_mode("error")
    layout = VarlenLayout.from_lengths(*LENGTHS[lengths], device="cuda")
    out, _ = getattr(backend, op)(*leaves, *made.indices, layout, made.blocks)
    out.backward(torch.ones_like(out))
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name, op, lengths", taken())
def test_captured_in_a_graph(name: str, op: str, lengths: str) -> None:
    """After one call, which makes what the layout keeps: a replay on new values gives what a call gives."""
    backend = able(BACKENDS[name], op, problem(lengths))
    made = case(op, lengths, torch.bfloat16, heads=(8, 2), dim=64)
    rest = (*made.indices, made.layout, made.blocks)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            getattr(backend, op)(*made.args, *rest)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = getattr(backend, op)(*made.args, *rest)
        made.args[0].copy_(made.args[0].flip(0))
        graph.replay()
        called = getattr(backend, op)(*made.args, *rest)
    assert all(torch.equal(x, y) for x, y in zip(captured, called, strict=True))


def test_unaligned_and_strided_arguments() -> None:
    """Kernels read 16 bytes at a time: what begins elsewhere is copied first."""
    made = case("window_attention", "ragged", torch.bfloat16, heads=(8, 2), dim=64)
    for name, backend in BACKENDS.items():
        if backend.refuse("window_attention", problem(), machine()) is not None:
            continue
        expected = backend.window_attention(*made.args, made.layout, made.blocks)
        shifted = []
        for x in made.args:
            wide = torch.full((x.shape[0], x.shape[1], 2 * x.shape[2] + 1), torch.nan, dtype=x.dtype, device="cuda")
            wide[..., 1::2] = x
            shifted.append(wide[..., 1::2])
        for args in (shifted, [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in made.args]):
            got = backend.window_attention(*args, made.layout, made.blocks)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), name


@pytest.mark.alone
def test_long_offsets() -> None:
    """More than 2^31 elements of q: the fold's phases, which are summed over, and its workspace at 256k tokens."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    backend = able(CUDNN, "compressed_attention", problem("one"))
    layout, blocks = VarlenLayout.from_lengths([262_144], device="cuda"), BLOCKS
    num_cmp = layout.compressed(blocks).total
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(layout.total_q, 72, 128, generator=generator, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, num_cmp, 1, 128, generator=generator, dtype=torch.bfloat16, device="cuda").unbind()
    assert q.numel() > 1 << 31
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = backend.compressed_attention(q, k, v, layout, blocks)
    used = torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes
    assert used <= (2 << 30) + (1 << 28), "the workspace, and what cuDNN takes for itself"
    for t in (31, 100_000, 262_143):
        seen = blocks.num_compressed(t + 1)
        logits = (q[t].double() @ k[:seen, 0].double().T) * 128**-0.5
        assert torch.allclose(lse[:, t].double(), logits.logsumexp(-1), rtol=0, atol=1e-4)
        weights, values = logits.softmax(-1), v[:seen, 0].double()
        # Weights and the result are rounded to bf16, each by 2^-9 of itself at most.
        assert bool(((out[t].double() - weights @ values).abs() <= 2.0**-8 * (weights @ values.abs())).all())
