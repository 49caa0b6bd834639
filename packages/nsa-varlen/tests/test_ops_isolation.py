"""Do sequences never see each other, not even as 0 * inf? One is filled with NaN, infinity or the largest number.

Whatever one sequence holds, no bit of another's results or gradients may change. A weight of 0 is no isolation: 0 times
infinity is NaN, so that rows of two sequences may not meet in one product at all.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from nsa_varlen.sdpa import _interval, _selected
from nsa_varlen.testing import BACKENDS, random_inputs, to_pages
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=7)
# Queries and keys of each sequence, and the sequences that are poisoned, one at a time.
BATCHES = {
    "many-short": ([5, 1, 0, 9, 6, 3, 7, 2, 8, 4, 6, 12], [5, 1, 3, 9, 6, 3, 7, 0, 8, 4, 6, 12], [4, 11]),
    "equal": ([6] * 8, [6] * 8, [0, 7]),
    "short-and-long": ([70, 6, 5, 40, 2, 12, 33], [70, 6, 5, 40, 30, 5, 33], [1, 3]),
    "decode": ([1] * 12, [9, 30, 12, 31, 17, 8, 25, 16, 33, 7, 15, 24], [1, 6]),
    "decode-equal": ([1] * 6, [20] * 6, [2, 5]),
    "speculative": ([3, 2, 3, 1, 3, 4], [19, 22, 17, 20, 40, 4], [0, 3]),
}
POISON = [torch.nan, torch.inf, -torch.inf, torch.finfo(torch.float32).max]
# Pieces of sdpa: whatever they are, batched or not, and both loop orders of selected attention.
PIECES: dict[str, list[tuple[Any, str, int]]] = {
    "as-it-comes": [],
    "batches-by-query": [
        (_interval, "CPU_SHORT_KEYS", 1 << 20),
        (_interval, "CPU_SHORT_PRODUCTS", 1 << 40),
        (_selected, "ROWS_PER_BLOCK", 1 << 40),
    ],
    "tiles-by-block": [(_interval, "CPU_SHORT_KEYS", 0), (_selected, "ROWS_PER_BLOCK", 0)],
}


@pytest.fixture(
    params=[("sdpa", pieces) for pieces in PIECES]
    + [(name, "as-it-comes") for name in BACKENDS if name not in ("oracle", "sdpa")],
    ids="-".join,
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    name, pieces = request.param
    for patch in PIECES[pieces]:
        monkeypatch.setattr(*patch)
    return BACKENDS[name]


class Problem:
    """Clean arguments of one operation on one batch, and where each sequence's rows are in them."""

    def __init__(self, backend: Any, op: str, batch: str) -> None:
        q_lengths, k_lengths, self.victims = BATCHES[batch]
        self.layout = VarlenLayout.from_lengths(q_lengths, k_lengths)
        q, k, v, gates = random_inputs(self.layout, dtype=torch.float32)
        k_cmp, v_cmp = (backend.compress_mean(x, self.layout, BLOCKS) for x in (k, v))
        _, lse = backend.compressed_attention(q, k_cmp, v_cmp, self.layout, BLOCKS)
        indices = backend.select_blocks(q, k_cmp, lse, self.layout, BLOCKS)
        layout = self.layout
        self.call: Callable[..., Any] = getattr(backend, op)
        self.arguments, self.rest = {
            "compress_mean": ({"x": k}, (layout, BLOCKS)),
            "compressed_attention": ({"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp}, (layout, BLOCKS)),
            "select_blocks": ({"q": q, "k_cmp": k_cmp, "lse": lse.T.contiguous()}, (layout, BLOCKS)),
            "selected_attention": ({"q": q, "k": k, "v": v}, (indices, layout, BLOCKS)),
            "window_attention": ({"q": q, "k": k, "v": v}, (layout, BLOCKS)),
            "combine": ({"gates": gates, "o_cmp": q, "o_slc": 2 * q, "o_win": 3 * q}, ()),
        }[op]
        self.op = op

    def rows_of(self, name: str, sequence: int) -> slice:
        """A sequence's rows in the argument or result `name`."""
        cu_seqlens = self.layout.cu_seqlens_q
        if name in ("k_cmp", "v_cmp") or (self.op, name) == ("compress_mean", "out"):
            cu_seqlens = self.layout.compressed(BLOCKS).cu_seqlens
        elif name in ("k", "v", "x"):
            cu_seqlens = self.layout.cu_seqlens_k
        return slice(*cu_seqlens[sequence : sequence + 2].tolist())

    def forward(self, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results by name, one row a query (or compressed block)."""
        if self.op == "select_blocks":
            arguments = arguments | {"lse": arguments["lse"].T.contiguous()}
        result = self.call(*arguments.values(), *self.rest)
        return {"out": result[0], "lse": result[1].T} if isinstance(result, tuple) else {"out": result}

    def run(self, arguments: dict[str, Tensor], grad_out: Tensor | None) -> dict[str, Tensor]:
        """Results and, where the operation has them, the gradients, by name."""
        if self.op == "select_blocks":
            return self.forward(arguments)
        leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
        results = self.forward(leaves)
        results["out"].backward(torch.ones_like(results["out"]) if grad_out is None else grad_out)
        return {n: x.detach() for n, x in results.items()} | {f"d{n}": x.grad for n, x in leaves.items()}

    def assert_others_unchanged(self, got: dict[str, Tensor], clean: dict[str, Tensor], victim: int) -> bool:
        """Whether something of the victim's own changed."""
        changed = False
        for name, x in got.items():
            rows = self.rows_of(name.removeprefix("d"), victim)
            others = torch.ones(len(x), dtype=torch.bool)
            others[rows] = False
            assert torch.equal(x[others], clean[name][others]), f"{name} of another sequence changed"
            changed |= not torch.equal(x[rows], clean[name][rows])
        return changed


OPS = [
    "compress_mean",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "combine",
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", BATCHES)
def test_what_a_sequence_holds_changes_no_bit_of_another(backend: Any, batch: str, op: str) -> None:
    problem = Problem(backend, op, batch)
    clean = problem.run(problem.arguments, None)
    assert all(x.isfinite().all() for name, x in clean.items() if name != "lse")
    changed = False
    for victim in problem.victims:
        for value in POISON:
            for name, x in problem.arguments.items():
                poisoned = x.clone()
                poisoned[problem.rows_of(name, victim)] = value
                got = problem.run(problem.arguments | {name: poisoned}, None)
                changed |= problem.assert_others_unchanged(got, clean, victim)
            if op != "select_blocks":
                grad_out = torch.ones_like(clean["out"])
                grad_out[problem.rows_of("out", victim)] = value
                got = problem.run(problem.arguments, grad_out)
                changed |= problem.assert_others_unchanged(got, clean, victim)
    assert changed or (op == "select_blocks" and batch in ("many-short", "equal"))  # there, all blocks are chosen


@pytest.mark.parametrize("op", ["compressed_attention", "select_blocks", "selected_attention", "window_attention"])
@pytest.mark.parametrize("batch", BATCHES)
def test_pages_keep_sequences_apart_too(backend: Any, batch: str, op: str) -> None:
    problem = Problem(backend, op, batch)
    names = [name for name in problem.arguments if name[0] in "kv"]
    offsets = problem.layout.cu_seqlens_k
    if names[0] == "k_cmp":
        offsets = problem.layout.compressed(BLOCKS).cu_seqlens
    lengths = offsets.diff().tolist()

    def paged(arguments: dict[str, Tensor]) -> dict[str, Any]:
        return arguments | {name: to_pages(arguments[name], lengths, 4) for name in names}

    clean = problem.forward(paged(problem.arguments))
    for victim in problem.victims:
        for value in POISON:
            for name in names:
                poisoned = problem.arguments[name].clone()
                poisoned[problem.rows_of(name, victim)] = value
                got = problem.forward(paged(problem.arguments | {name: poisoned}))
                problem.assert_others_unchanged(got, clean, victim)


@pytest.mark.parametrize("pages_of_values", ["shared-table", "own-table"])
@pytest.mark.parametrize("op", ["selected_attention", "window_attention"])
def test_a_missing_page_is_zeros_whoever_owns_the_first_page_of_the_pool(
    backend: Any, op: str, pages_of_values: str
) -> None:
    """Sequence 1 lost its first page: hidden keys, and listed ones, must not be read from where page 0 lies."""
    layout, blocks = VarlenLayout.from_lengths([1, 1], [8, 8]), BlockGeometry(4, 4, 4, 2, 0, 1, 8)
    q, k, v, _ = random_inputs(layout, dtype=torch.float32)
    table, lengths = torch.tensor([[0, 1], [-1, 3]], dtype=torch.int32), torch.tensor([8, 8], dtype=torch.int32)
    zeroed = []
    streams: list[tuple[Tensor, Tensor]] = []
    for x in (k, v):
        own = x.clone()
        own[8:12] = 0
        zeroed.append(own)
        streams.append((own.unflatten(0, (4, 4)), table if pages_of_values == "shared-table" else table.clone()))
    for listed in ([1, -1], [0, 1]):
        indices = torch.tensor([[[0, 1]] * 2, [listed] * 2], dtype=torch.int32)
        rest = (indices, layout, blocks) if op == "selected_attention" else (layout, blocks)
        expected = getattr(backend, op)(q, *zeroed, *rest)
        for value in (1.0, *POISON):
            paged = []
            for pages, of in streams:
                pages = pages.clone()
                pages[0] = value
                paged.append(PagedKV(pages, of, lengths))
            got = getattr(backend, op)(q, *paged, *rest)
            torch.testing.assert_close(got[0][1], expected[0][1], rtol=0, atol=1e-6)
            torch.testing.assert_close(got[1][:, 1], expected[1][:, 1], rtol=0, atol=1e-6)
