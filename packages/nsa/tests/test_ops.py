"""Do the operations go through the route, tell it the truth about the problem, and agree with the oracle?"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from nsa import NSAConfig, ops
from nsa_routing import Problem, backends, reset
from nsa_varlen import BlockGeometry, CompletedBlocks, NewTokens, PagedKV, VarlenLayout, layout, reference
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

OPS = ("compress_mean", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "combine")
ALL = (*OPS, "decode_attention")  # whose batches are padded, and whose keys lie in pages
LAYOUT = VarlenLayout.from_lengths([9, 0, 90, 3], [9, 5, 100, 3])
# Block sizes of the configuration in conftest.py, every field stated.
CONFIG_SIZES = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "topk": 4,
    "init_blocks": 1,
    "local_blocks": 2,
    "window_size": 12,
}
# Outputs of order one, sums of at most 100 terms in fp64.
FP64 = {"rtol": 0, "atol": 1e-13}
# An LSE below 8 in magnitude, rounded once to fp32.
LSE = {"rtol": 0, "atol": 8 * 2**-24}


@pytest.fixture
def blocks(make_config: Callable[..., NSAConfig]) -> BlockGeometry:
    return make_config().blocks


@pytest.fixture
def arguments(blocks: BlockGeometry) -> dict[str, tuple]:
    """Positional arguments of every op, in fp64, with 4 query heads over 2 kv heads and Dk=8, Dv=6."""
    torch.manual_seed(2)
    q = torch.randn(LAYOUT.total_q, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(LAYOUT.total_k, 2, dim, dtype=torch.float64) for dim in (8, 6))
    k_cmp, v_cmp = (reference.compress_mean(x, LAYOUT, blocks) for x in (k, v))
    _, lse = reference.compressed_attention(q, k_cmp, v_cmp, LAYOUT, blocks)
    indices = reference.select_blocks(q, k_cmp, lse, LAYOUT, blocks)
    gates = torch.rand(LAYOUT.total_q, 4, 3, dtype=torch.float64)
    outputs = torch.randn(3, LAYOUT.total_q, 4, 6, dtype=torch.float64)
    rows = blocks.num_compressed(LAYOUT.cu_seqlens_k.diff()).tolist()
    raw = [paged(x, LAYOUT.cu_seqlens_k.diff().tolist()) for _ in range(2) for x in (k, v)]
    q_padded, gates_padded = torch.randn(4, 3, 4, 8, dtype=torch.float64), torch.rand(4, 3, 4, 3, dtype=torch.float64)
    counts = torch.tensor([1, 0, 3, 3], dtype=torch.int32)
    return {
        "compress_mean": (k, LAYOUT, blocks),
        "compressed_attention": (q, k_cmp, v_cmp, LAYOUT, blocks),
        "select_blocks": (q, k_cmp, lse, LAYOUT, blocks),
        "selected_attention": (q, k, v, indices, LAYOUT, blocks),
        "window_attention": (q, k, v, LAYOUT, blocks),
        "combine": (gates, *outputs),
        "decode_attention": (q_padded, paged(k_cmp, rows), paged(v_cmp, rows), *raw, gates_padded, counts, blocks),
    }


def scored(arguments: dict, q_cmp: Tensor) -> tuple[Tensor, Tensor, VarlenLayout, BlockGeometry]:
    """What `select_blocks` would take of a decode by these queries, but the lse."""
    *_, counts, blocks = arguments["decode_attention"]
    layout = VarlenLayout.from_lengths(counts.tolist(), LAYOUT.cu_seqlens_k.diff().tolist())
    return q_cmp[torch.arange(q_cmp.shape[1]) < counts[:, None]], arguments["select_blocks"][1], layout, blocks


def assert_close(got: Tensor | tuple, expected: Tensor | tuple) -> None:
    if isinstance(got, tuple):
        torch.testing.assert_close(got[0], expected[0], **FP64)
        indices = got[1].dtype == torch.int32
        torch.testing.assert_close(got[1] if indices else got[1].double(), expected[1], **LSE)
    else:
        torch.testing.assert_close(got, expected, **FP64)


@pytest.mark.parametrize("backend", [None, "sdpa"])
@pytest.mark.parametrize("op", ALL)
def test_agrees_with_the_oracle(
    op: str, backend: str | None, arguments: dict, margin: Callable, score_error: float
) -> None:
    if op == "select_blocks":
        q, k_cmp, _, *rest = arguments[op]
        assert 2 * score_error < margin(q, k_cmp, *rest) < float("inf")
    if op == "decode_attention":
        assert 2 * score_error < margin(*scored(arguments, arguments[op][0])) < float("inf")
    assert_close(getattr(ops, op)(*arguments[op], backend=backend), getattr(reference, op)(*arguments[op]))


@pytest.mark.parametrize("op", [op for op in OPS if "attention" in op or op == "select_blocks"])
def test_scale_reaches_the_logits(op: str, arguments: dict) -> None:
    got, default = getattr(ops, op)(*arguments[op], scale=0.9), getattr(ops, op)(*arguments[op])
    if op == "select_blocks":
        # The LSE given belongs to another scale, so compare with scaled queries instead of with the oracle.
        q, *rest = arguments[op]
        assert torch.equal(got, ops.select_blocks(q * (0.9 * 8**0.5), *rest))
        assert not torch.equal(got, default)
    else:
        assert_close(got, getattr(reference, op)(*arguments[op], scale=0.9))
        assert (got[0] - default[0]).abs().max() > 1e-3


class Recorder:
    """Stands for `dispatch`: remembers the problems and gives a fixed answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Problem, str | None]] = []
        self.run = mock.Mock(return_value="answer")

    def __call__(self, op: str, problem: Problem, *, backend: str | None = None) -> Callable[..., Any]:
        self.calls.append((op, problem, backend))
        return self.run


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(ops, "dispatch", recorder)
    return recorder


def new_tokens(arguments: tuple) -> NewTokens:
    """Rows for `decode_attention` to store: all of them 1."""
    (batch, rows, _, _), k, v = arguments[0].shape, arguments[3], arguments[4]
    k, v = (x.pages.new_ones(batch, rows, x.num_heads, x.head_dim) for x in (k, v))
    return NewTokens(k, v, k, v, CompletedBlocks(k[:, :1], v[:, :1]))


@pytest.mark.parametrize("op", ALL)
def test_runs_what_the_route_gives(op: str, recorder: Recorder, arguments: dict) -> None:
    options: dict[str, Any] = {}
    if op not in ("compress_mean", "combine"):
        options["scale"] = 0.5
    if op == "decode_attention":
        options |= {"q_cmp": arguments[op][0] * 2, "new": new_tokens(arguments[op])}
    elif op.endswith("attention"):
        options["deterministic"] = True
    assert getattr(ops, op)(*arguments[op], **options, backend="some") == "answer"
    ((asked, problem, backend),) = recorder.calls
    assert (asked, problem.op, backend) == (op, op, "some")
    recorder.run.assert_called_once_with(*arguments[op], **options)


@pytest.mark.parametrize("op", ALL)
def test_states_the_problem(op: str, recorder: Recorder, arguments: dict) -> None:
    getattr(ops, op)(*arguments[op])
    dims = {
        "compress_mean": (8, 8, 1),
        "combine": (6, 6, 1),
        "select_blocks": (8, 8, 2),
    }.get(op, (8, 6, 2))
    sizes: dict[str, int] = {"total_q": 102}
    if op != "combine":  # which has no layout and no blocks
        sizes |= {"max_seqlen_q": 90, "max_seqlen_k": 100} | CONFIG_SIZES
    facts: dict[str, Any] = {}
    if op == "decode_attention":  # 4 sequences, 3 rows each, room for 7 pages of 16 rows
        sizes |= {"total_q": 12, "max_seqlen_q": 3, "max_seqlen_k": 112}
        facts["paged"] = True
    problem = recorder.calls[0][1]
    assert problem == Problem(op, "cpu", torch.float64, *dims, **sizes, **facts)


UNIFORM = {
    "one": ([7], [7], True),
    "equal": ([4, 4, 4], [4, 4, 4], True),
    "empty sequences": ([0, 0], [0, 0], True),
    "one ragged": ([4, 3, 4], [4, 3, 4], False),
    "queries ragged": ([2, 4], [4, 4], False),
    "keys ragged": ([4, 4], [3, 4], False),
    "keys ragged, as many": ([4, 4], [3, 5], False),
    "an empty one": ([4, 0], [4, 0], False),
    "decode": ([1, 1], [9, 9], False),
    "prefix": ([4, 4], [9, 9], False),
    "more queries": ([9, 9], [4, 4], False),
    "no sequence": ([], [], False),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lengths", UNIFORM)
def test_states_whether_a_batch_is_uniform(op: str, lengths: str, recorder: Recorder, blocks: BlockGeometry) -> None:
    """By host numbers alone: on the device meta there is nothing else to be read."""
    q_lengths, k_lengths, uniform = UNIFORM[lengths]
    layout = VarlenLayout.from_lengths(q_lengths, k_lengths)
    compressed = layout.compressed(blocks).total
    layout = layout.to("meta")
    tokens = compressed if op in ("compressed_attention", "select_blocks") else layout.total_k
    q, k = (torch.empty(count, 2, 8, device="meta") for count in (layout.total_q, tokens))
    indices = torch.empty(layout.total_q, 2, 1, dtype=torch.int32, device="meta")
    args = {
        "compress_mean": (k, layout, blocks),
        "compressed_attention": (q, k, k, layout, blocks),
        "select_blocks": (q, k, torch.empty(2, layout.total_q, device="meta"), layout, blocks),
        "selected_attention": (q, k, k, indices, layout, blocks),
        "window_attention": (q, k, k, layout, blocks),
        "combine": (q[..., :3], q, q, q),
    }[op]
    getattr(ops, op)(*args)
    assert recorder.calls[0][1].uniform is (uniform and op not in ("compress_mean", "combine"))


@pytest.mark.parametrize("op", ALL)
def test_states_the_device_and_dtype(op: str, recorder: Recorder, arguments: dict) -> None:
    def move(x: object) -> object:
        if isinstance(x, Tensor):
            return x.to("meta", torch.bfloat16 if x.is_floating_point() else x.dtype)
        if isinstance(x, PagedKV):
            return PagedKV(*(move(y) for y in (x.pages, x.block_table, x.lengths)))
        return x.to("meta") if isinstance(x, VarlenLayout) else x

    getattr(ops, op)(*map(move, arguments[op]))
    problem = recorder.calls[0][1]
    assert (problem.device, problem.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("op", ALL)
def test_needs_grad_if_any_argument_does_and_grad_mode_is_on(op: str, recorder: Recorder, arguments: dict) -> None:
    differentiable = [i for i, x in enumerate(arguments[op]) if isinstance(x, Tensor) and x.is_floating_point()]
    for index in differentiable:
        given = [x.clone().requires_grad_() if i == index else x for i, x in enumerate(arguments[op])]
        getattr(ops, op)(*given)
        with torch.no_grad():
            getattr(ops, op)(*given)
        with_grad, without = (call[1].needs_grad for call in recorder.calls[-2:])
        assert (with_grad, without) == (op != "select_blocks", False), f"argument {index}"


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("attention")])
@pytest.mark.parametrize("deterministic", [None, False, True])
def test_states_determinism(op: str, deterministic: bool | None, recorder: Recorder, arguments: dict) -> None:
    """None is left to the route: neither stated nor passed on."""
    getattr(ops, op)(*arguments[op], deterministic=deterministic)
    assert recorder.calls[0][1].deterministic is deterministic
    passed = {} if deterministic is None else {"deterministic": deterministic}
    recorder.run.assert_called_once_with(*arguments[op], scale=None, **passed)


@pytest.mark.parametrize("op", [op for op in ALL if op == "decode_attention" or not op.endswith("attention")])
def test_leaves_determinism_to_the_route(op: str, recorder: Recorder, arguments: dict) -> None:
    getattr(ops, op)(*arguments[op])
    assert recorder.calls[0][1].deterministic is None
    assert "deterministic" not in recorder.run.call_args.kwargs


@pytest.mark.parametrize("op", ALL)
def test_states_which_device_of_its_kind(
    op: str, recorder: Recorder, arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors say that they are on a device, which need not exist where there are none at all."""
    mode = FakeTensorMode()
    index = torch.cuda.device_count() - 1 if torch.cuda.is_available() else 3

    def fake(x: Tensor, device: object = None) -> Tensor:
        return FakeTensor(mode, x.to("meta"), torch.device("cuda", index))

    monkeypatch.setattr(layout, "to_device", fake)

    def move(x: object) -> object:
        if isinstance(x, VarlenLayout):
            return x.to(f"cuda:{index}")
        if isinstance(x, PagedKV):
            return PagedKV(*(fake(y) for y in (x.pages, x.block_table, x.lengths)))
        return fake(x) if isinstance(x, Tensor) else x

    getattr(ops, op)(*map(move, arguments[op]))
    problem = recorder.calls[0][1]
    assert (problem.device, problem.device_index) == ("cuda", index)


def paged(x: Tensor, lengths: list[int], page_size: int = 16) -> PagedKV:
    """Packed rows in shuffled pages, NaN where no row is."""
    pages_each = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(pages_each)).tolist()
    pages = torch.full((sum(pages_each), page_size, *x.shape[1:]), torch.nan, dtype=x.dtype)
    table = torch.full((len(lengths), max(pages_each)), -1, dtype=torch.int32)
    for sequence, rows in enumerate(x.split(lengths)):
        for number, part in enumerate(rows.split(page_size) if len(rows) else ()):
            page = order.pop()
            pages[page, : len(part)] = part
            table[sequence, number] = page
    return PagedKV(pages, table, torch.tensor(lengths, dtype=torch.int32))


PAGED = {
    "compressed_attention": (1, 2),
    "select_blocks": (1,),
    "selected_attention": (1, 2),
    "window_attention": (1, 2),
}


@pytest.mark.parametrize("op", PAGED)
def test_pages_stand_for_packed_rows(op: str, arguments: dict, blocks: BlockGeometry) -> None:
    lengths = LAYOUT.cu_seqlens_k.diff()
    rows = blocks.num_compressed(lengths) if op in ("compressed_attention", "select_blocks") else lengths
    given = [paged(x, rows.tolist()) if i in PAGED[op] else x for i, x in enumerate(arguments[op])]
    assert_close(getattr(ops, op)(*given), getattr(reference, op)(*arguments[op]))


@pytest.mark.parametrize("op", PAGED)
def test_states_that_keys_are_paged(op: str, recorder: Recorder, arguments: dict, blocks: BlockGeometry) -> None:
    lengths = LAYOUT.cu_seqlens_k.diff()
    rows = blocks.num_compressed(lengths) if op in ("compressed_attention", "select_blocks") else lengths
    for index in PAGED[op]:
        given = [paged(x, rows.tolist()) if i == index else x for i, x in enumerate(arguments[op])]
        getattr(ops, op)(*given)
        assert recorder.calls[-1][1].paged


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("select_blocks",)])
def test_gradients(op: str) -> None:
    """In fp64, with indices fixed: nothing here selects."""
    blocks = BlockGeometry(kernel_size=2, kernel_stride=1, block_size=2, topk=2, local_blocks=1, window_size=2)
    layout = VarlenLayout.from_lengths([3, 5])

    def rows(count: int, heads: int, dim: int) -> Tensor:
        return torch.randn(count, heads, dim, dtype=torch.float64, requires_grad=True)

    count = layout.compressed(blocks).total if op == "compressed_attention" else 8
    q, k, v = rows(8, 2, 2), rows(count, 1, 2), rows(count, 1, 3)
    indices = torch.tensor([[0, -1], [0, 1], [1, 0]]).repeat(3, 1)[:8, None].int()
    run, inputs = {
        "compress_mean": (lambda x: ops.compress_mean(x, layout, blocks), (k,)),
        "compressed_attention": (lambda *x: ops.compressed_attention(*x, layout, blocks)[0], (q, k, v)),
        "selected_attention": (lambda *x: ops.selected_attention(*x, indices, layout, blocks)[0], (q, k, v)),
        "window_attention": (lambda *x: ops.window_attention(*x, layout, blocks)[0], (q, k, v)),
        "combine": (ops.combine, (rows(8, 2, 3), rows(8, 2, 2), rows(8, 2, 2), rows(8, 2, 2))),
    }[op]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("attention")])
def test_an_lse_carries_no_gradient(op: str, arguments: dict) -> None:
    given = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments[op]]
    out, lse = getattr(ops, op)(*given)
    assert out.requires_grad
    assert not lse.requires_grad
    assert lse.dtype == torch.float32


class Fake:
    """A backend whose every operation gives back its first argument, as what that operation returns."""

    name = "fake"

    def __init__(self) -> None:
        self.ran: list[str] = []

    def refuse(self, op: str, problem: Problem, environment: object) -> str | None:
        return "cannot combine" if op == "combine" else None

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in ALL:
            raise AttributeError(op)

        def run(x: Tensor, *args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
            self.ran.append(op)
            return (x, x.new_zeros(x.shape[1], x.shape[0])) if op.endswith("attention") else x

        return run


@pytest.fixture
def fake_installed(fresh_routes: None, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Backend `fake` beside the installed ones, by entry point."""
    fake, point = Fake(), mock.Mock(value="fake:BACKEND")
    point.name, point.load = "fake", lambda: fake
    installed = tuple(backends.installed_backends().values())
    monkeypatch.setattr(backends, "entry_points", lambda group: (*installed, point))
    return fake


@pytest.mark.parametrize("op", [op for op in ALL if op != "combine"])
def test_a_backend_found_by_entry_point_runs(
    op: str, fake_installed: Fake, arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = getattr(ops, op)(*arguments[op], backend="fake")
    assert (got[0] if isinstance(got, tuple) else got) is arguments[op][0]
    monkeypatch.setenv("NSA_BACKEND", f"{op}=fake")
    reset()
    getattr(ops, op)(*arguments[op])
    assert fake_installed.ran == [op, op]
    monkeypatch.delenv("NSA_BACKEND")
    reset()
    assert_close(getattr(ops, op)(*arguments[op]), getattr(reference, op)(*arguments[op]))


@pytest.mark.usefixtures("fake_installed")
def test_a_backend_that_refuses_is_not_replaced(arguments: dict) -> None:
    with pytest.raises(RuntimeError, match=r"requested: fake(.|\n)*fake +rejected: cannot combine"):
        ops.combine(*arguments["combine"], backend="fake")


@pytest.mark.usefixtures("fresh_routes")
@pytest.mark.parametrize("op", ALL)
def test_a_backend_that_is_not_installed(op: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"^backend: expected one of \[.*'sdpa'.*\], got 'none-such'$"):
        getattr(ops, op)(*arguments[op], backend="none-such")


# --- decode_attention -------------------------------------------------------------------------------------------------

PAGES = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")
DECODE = ("q", *PAGES, "gates", "counts", "blocks")


@pytest.mark.parametrize("name", ["q_cmp", *PAGES])
def test_a_decode_needs_grad_for_its_pages_and_q_cmp_too(name: str, recorder: Recorder, arguments: dict) -> None:
    given = dict(zip(DECODE, arguments["decode_attention"], strict=True))
    given["q_cmp"] = given["q"].clone()
    leaf = given[name].pages if name in PAGES else given[name]
    leaf.requires_grad_()
    ops.decode_attention(**given)
    with torch.no_grad():
        ops.decode_attention(**given)
    assert [call[1].needs_grad for call in recorder.calls] == [True, False]


@pytest.mark.parametrize("row", range(6))
def test_a_decode_needs_grad_for_its_new_rows_too(row: int, recorder: Recorder, arguments: dict) -> None:
    new = new_tokens(arguments["decode_attention"])
    rows = [new.k_slc, new.v_slc, new.k_win, new.v_win, new.cmp.k, new.cmp.v]
    rows[row] = rows[row].clone().requires_grad_()
    new = NewTokens(*rows[:4], CompletedBlocks(*rows[4:]))
    ops.decode_attention(*arguments["decode_attention"], new=new)
    with torch.no_grad():
        ops.decode_attention(*arguments["decode_attention"], new=new)
    assert [call[1].needs_grad for call in recorder.calls] == [True, False]


def test_a_decode_that_would_record_a_gradient_is_refused(arguments: dict) -> None:
    """By the plan, with the reason; nothing is computed without the gradient that was asked for."""
    q, *rest = arguments["decode_attention"]
    with pytest.raises(RuntimeError, match=r"(?s)no backend accepts.*sdpa +rejected: records no gradients through pag"):
        ops.decode_attention(q.requires_grad_(), *rest)
    with torch.no_grad():
        out, _ = ops.decode_attention(q, *rest)
    assert not out.requires_grad


@pytest.mark.parametrize("change", ["q_cmp", "scale"])
def test_what_a_decode_may_be_told_reaches_it(
    change: str, arguments: dict, margin: Callable, score_error: float
) -> None:
    given = arguments["decode_attention"]
    q_cmp = torch.randn_like(given[0])
    said = {"q_cmp": q_cmp} if change == "q_cmp" else {"scale": 0.9}
    assert 2 * score_error < margin(*scored(arguments, q_cmp if change == "q_cmp" else given[0] * (0.9 * 8**0.5)))
    got = ops.decode_attention(*given, **said)
    assert_close(got, reference.decode_attention(*given, **said))
    assert (got[0] - ops.decode_attention(*given)[0]).abs().max() > 1e-3


BAD_DECODES = [
    *(({name: None}, TypeError, rf"^{name}: expected a tensor, got NoneType$") for name in ("q", "gates", "counts")),
    ({"q_cmp": [1.0]}, TypeError, r"^q_cmp: expected a tensor, got list$"),
    ({"q": torch.zeros(12, 4, 8)}, ValueError, r"^q: expected shape \[B, N, heads, head_dim\], got \[12, 4, 8\]$"),
    *(({x: torch.zeros(5, 2, 8)}, TypeError, rf"^{x}: expected a PagedKV, got Tensor$") for x in PAGES),
    ({"q": torch.zeros(4, 3, 4, 8)}, TypeError, r"^k_cmp: expected dtype torch.float32 of q, got torch.float64$"),
    ({"counts": torch.tensor([1, 0, 3, 4]).int()}, ValueError, r"^counts: expected 0 to 3, and at most the lengths "),
    ({"blocks": None}, TypeError, r"^blocks: expected a BlockGeometry, got NoneType$"),
]


@pytest.mark.parametrize("change, error, message", BAD_DECODES)
def test_arguments_of_a_decode_that_do_not_fit(
    change: dict, error: type[Exception], message: str, arguments: dict, recorder: Recorder
) -> None:
    """Before anybody is asked to plan for them."""
    given = dict(zip(DECODE, arguments["decode_attention"], strict=True)) | change
    with pytest.raises(error, match=message):
        ops.decode_attention(**given)
    assert recorder.calls == []
