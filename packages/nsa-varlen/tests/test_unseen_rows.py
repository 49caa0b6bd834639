"""May keys and values that no query sees hold anything? Whoever loads a row that it hides answers for what is there.

A page has rows that nobody wrote: before the window's first, where a sequence began with rows from elsewhere, and
behind the last. Pages that nobody holds have no other. A weight of 0 does not hide NaN.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout, masks
from nsa_varlen.sdpa import BACKEND, _interval, _selected
from nsa_varlen.testing import BACKENDS, gradients, random_inputs, to_pages
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=4, window_size=7)
BATCHES = {
    "decode": ([1] * 6, [9, 30, 12, 31, 17, 8]),
    "one": ([1], [30]),
    "speculative": ([3, 2, 3, 0, 3, 4], [19, 22, 17, 20, 40, 4]),
    "chunks": ([9, 30, 5], [40, 33, 5]),
}
OPS = ["compressed_attention", "select_blocks", "selected_attention", "window_attention"]
# Pieces of sdpa, as in test_ops_isolation.py.
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
    params=[("sdpa", pieces) for pieces in PIECES] + [(name, "as-it-comes") for name in BACKENDS if name != "sdpa"],
    ids="-".join,
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    name, pieces = request.param
    for patch in PIECES[pieces]:
        monkeypatch.setattr(*patch)
    return BACKENDS[name]


class Call:
    """An operation on one batch: its keys and values by name, all else, and which of their rows some query sees."""

    def __init__(self, op: str, batch: str) -> None:
        q_lengths, k_lengths = BATCHES[batch]
        layout = self.layout = VarlenLayout.from_lengths(q_lengths, k_lengths)
        q, k, v, _ = random_inputs(layout, dtype=torch.float32)
        k_cmp, v_cmp = (BACKEND.compress_mean(x, layout, BLOCKS) for x in (k, v))
        _, lse = BACKEND.compressed_attention(q, k_cmp, v_cmp, layout, BLOCKS)
        generator = torch.Generator().manual_seed(0)
        # Any lists: with those of select_blocks the newest tokens are always seen, and in order.
        indices = torch.randint(-1, 8, (len(q), k.shape[1], 2), generator=generator, dtype=torch.int32)
        end = (layout, BLOCKS)
        self.op, self.q = op, q
        self.kv, self.rest, mask = {
            "compressed_attention": ({"k": k_cmp, "v": v_cmp}, end, masks.compressed_mask(*end)[:, None]),
            "select_blocks": ({"k": k_cmp}, (lse, *end), masks.compressed_mask(*end)[:, None]),
            "selected_attention": ({"k": k, "v": v}, (indices, *end), masks.selected_mask(indices, *end)),
            "window_attention": ({"k": k, "v": v}, end, masks.window_mask(*end)[:, None]),
        }[op]
        self.seen = mask.any(0).T  # [rows, Hk or 1]
        compressed = op in ("compressed_attention", "select_blocks")
        offsets = layout.compressed(BLOCKS).cu_seqlens if compressed else layout.cu_seqlens_k
        self.lengths = offsets.diff().tolist()

    def poisoned(self) -> dict[str, Tensor]:
        return {name: x.masked_fill(~self.seen[..., None], torch.nan) for name, x in self.kv.items()}

    def run(self, backend: Any, kv: dict[str, Any]) -> tuple[Tensor, ...]:
        result = getattr(backend, self.op)(self.q, *kv.values(), *self.rest)
        return result if isinstance(result, tuple) else (result,)


def paged(call: Call, kv: dict[str, Tensor], page_size: int) -> dict[str, PagedKV]:
    """Pages without a row that someone sees are taken away: what they held is another's."""
    found = {name: to_pages(x, call.lengths, page_size) for name, x in kv.items()}
    for x in found.values():
        unwritten = x.pages.isnan().flatten(1).all(1)
        x.block_table.masked_fill_(unwritten[x.block_table.clamp_min(0)], -1)
    return found


def assert_unchanged(got: tuple[Tensor, ...], clean: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, clean, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)  # other rows beside a product may round it otherwise


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", BATCHES)
def test_rows_that_no_query_sees_hold_anything(backend: Any, batch: str, op: str) -> None:
    call = Call(op, batch)
    assert_unchanged(call.run(backend, call.poisoned()), call.run(backend, call.kv))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", BATCHES)
def test_and_so_do_those_of_pages(backend: Any, batch: str, op: str) -> None:
    call = Call(op, batch)
    clean = call.run(backend, call.kv)
    for page_size in (4, 16) if backend is not BACKENDS["oracle"] else ():  # that takes no pages
        assert_unchanged(call.run(backend, paged(call, call.poisoned(), page_size)), clean)


@pytest.mark.parametrize("op", [op for op in OPS if op != "select_blocks"])
@pytest.mark.parametrize("batch", BATCHES)
def test_their_gradients_are_zero_and_the_others_what_they_were(backend: Any, batch: str, op: str) -> None:
    call = Call(op, batch)
    call_op: Callable[..., Any] = getattr(backend, op)
    found = []
    for kv in (call.poisoned(), call.kv):
        inputs = [call.q, *kv.values()]
        found.append(gradients(lambda q, k, v: call_op(q, k, v, *call.rest), inputs, torch.ones_like(call.q)))
    assert_unchanged(*found)
    for grad in found[0][1:]:
        assert not grad.masked_fill(call.seen[..., None], 0.0).any()


@pytest.mark.parametrize("name", ["oracle", "sdpa"])
def test_a_decode_step_sees_no_row_before_its_windows(name: str) -> None:
    """Rows of the window's first page that were never written, and pages that nobody holds."""
    lengths, counts = [30, 9, 17, 5], [1, 2, 0, 3]
    layout = VarlenLayout.from_lengths(lengths)
    q, k, v, gates = random_inputs(layout, dtype=torch.float64)
    k_cmp, v_cmp = (BACKEND.compress_mean(x, layout, BLOCKS) for x in (k, v))
    compressed = layout.compressed(BLOCKS).cu_seqlens.diff().tolist()
    first = torch.tensor(lengths) - torch.tensor(counts).clamp_min(1) - BLOCKS.window_size + 1
    unseen = layout.key_positions() < first[layout.sequence_of_keys()]
    assert unseen.any()

    def run(win: list[Tensor]) -> tuple[Tensor, Tensor]:
        pages = [to_pages(x, compressed, 16) for x in (k_cmp, v_cmp)]
        pages += [to_pages(x, lengths, 16, seed=i) for i, x in enumerate((k, v, *win))]
        queries, weights = q[:12].unflatten(0, (4, 3)), gates[:12].unflatten(0, (4, 3))
        call = BACKENDS[name].decode_attention
        return call(queries, *pages, weights, torch.tensor(counts, dtype=torch.int32), BLOCKS)

    poisoned = [x.masked_fill(unseen[:, None, None], torch.nan) for x in (k, v)]
    assert_unchanged(run(poisoned), run([k, v]))
