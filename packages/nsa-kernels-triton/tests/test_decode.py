"""Decode steps, interpreted, against the oracle and what sdpa stores, cut in every way that a plan may cut them.

`nsa_varlen.decode_testing` makes the steps: NaN is wherever nobody has to look.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_kernels_triton.configurations import overridden
from nsa_kernels_triton.contracts import interpreted
from nsa_kernels_triton.ops import decode, decode_plan
from nsa_varlen import BlockGeometry, NewTokens, PagedKV, arguments, reference
from nsa_varlen.decode_testing import DecodeCase, assert_equal, assert_stored_alike, decode_case, strided
from nsa_varlen.sdpa import BACKEND as SDPA
from nsa_varlen.testing import FP32, poisoned_empty
from torch import Tensor

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1"),
]

BLOCKS = BlockGeometry(kernel_size=32, kernel_stride=16, block_size=32, topk=8, window_size=40)
SMALL = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=32, topk=5, window_size=40)


def slow(*values: Any) -> Any:
    """A case of the second tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Numbers by which a plan takes an organisation, whatever a file says; two multiprocessors are interpreted.
WHOLE = {
    "compressed": {"splits": 1, "values": 1, "early": 0},
    "choice": {"chunk": 128, "alone": 1},
    "selected": {"splits": 1},
}
SPLIT = {
    "compressed": {"splits": 4, "programs": 256, "values": 1, "early": 1},
    "choice": {"chunk": 128, "value_splits": 2, "value_programs": 256},
    "selected": {"splits": 4, "programs": 256},
}


def numbers(base: dict[str, dict[str, int]], **changes: dict[str, int]) -> dict[str, dict[str, int]]:
    """`base` with other numbers, by kernel."""
    return {kernel: base[kernel] | changes.get(kernel, {}) for kernel in base}


CHUNKED, ONE, ADDED_FIRST = {"chunk": 16}, {"splits": 1}, {"values": 2}
ORGANISATIONS = {
    "alone": WHOLE,
    "alone-merged-apart": numbers(SPLIT, compressed=ONE, choice={"alone": 1}),
    "choice-beside": numbers(WHOLE, choice={"alone": 0}),
    "choice-of-chunks": numbers(WHOLE, choice=CHUNKED),
    "apart": SPLIT,
    "apart-of-chunks": numbers(SPLIT, choice=CHUNKED, selected=ONE),
    "apart-of-chunks-merged-apart": numbers(SPLIT, choice=CHUNKED),
    "apart-values-whole": numbers(SPLIT, choice={"value_splits": 1}, selected={"splits": 2}),
    "apart-logits-whole": numbers(SPLIT, compressed=ONE | {"values": 0}),
    "added-first": numbers(SPLIT, compressed=ADDED_FIRST, selected=ONE),
    "added-first-of-chunks": numbers(SPLIT, compressed=ADDED_FIRST, choice=CHUNKED),
    "added-first-of-tiles": numbers(SPLIT, compressed=ADDED_FIRST | {"keys": 16}, choice=CHUNKED),
}
# (chosen in the first kernel, in how many chunks, by how many programs values are added apart, merged by a fourth)
TAKEN = {
    "alone": (True, 1, 0, False),
    "alone-merged-apart": (True, 1, 0, True),
    "choice-beside": (False, 1, 0, False),
    "choice-of-chunks": (False, 3, 0, False),
    "apart": (False, 1, 2, True),
    "apart-of-chunks": (False, 3, 2, False),
    "apart-of-chunks-merged-apart": (False, 3, 2, True),
    "apart-values-whole": (False, 1, 1, True),
    "apart-logits-whole": (False, 1, 2, True),
    "added-first": (False, 1, 0, False),
    "added-first-of-chunks": (False, 3, 0, True),
    "added-first-of-tiles": (False, 3, 0, True),
}


@contextmanager
def organised(name: str, keys: int = 32, **changes: dict[str, int]) -> Iterator[None]:
    """Within, steps are cut so; with larger tiles than fp32 has by itself, of which the interpreter needs fewer."""
    with ExitStack() as stack:
        for kernel, found in (numbers(ORGANISATIONS[name], **changes)).items():
            stack.enter_context(overridden(f"decode_{kernel}", **({"keys": keys} | found)))
        yield


def seen(monkeypatch: pytest.MonkeyPatch) -> list[decode_plan.DecodePlan]:
    """The plans that are made from now on."""
    made = []

    def note(*args: Any) -> decode_plan.DecodePlan:
        made.append(decode_plan.decode_plan(*args))
        return made[-1]

    monkeypatch.setattr(decode, "decode_plan", note)
    return made


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.float32)], ids=["fp16", "fp32"])
@pytest.mark.parametrize("name", ORGANISATIONS)
def test_organisations(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of 16 blocks, or one of all: the plan is the one that the name says, and its results are right."""
    plans = seen(monkeypatch)
    case = decode_case([1170, 540], [1, 1], BLOCKS, heads=4, kv_heads=2, dtype=dtype, room=1200)
    with organised(name):
        case.check(BACKEND)
    first, chunks, values, merged = TAKEN[name]
    for plan in plans:
        assert (plan.choice is None) == first
        assert (plan.merge is not None) == merged
        assert not plan.levels
        if plan.choice is not None:
            found = plan.choice.constants
            assert (found["CHUNKS"], found["VALUE_SPLITS"]) == (chunks, values)


@pytest.mark.parametrize("kind", ["margin", "ties"])
@pytest.mark.parametrize("name", [slow("choice-of-chunks"), "apart-of-chunks", "added-first-of-chunks"])
def test_many_candidates_are_thinned_out(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two levels: 6 chunks leave 4 candidates each, of which at most 8 may be left to the last choice."""
    plans = seen(monkeypatch)
    monkeypatch.setattr(decode_plan, "MOST_CANDIDATES", 4)
    decode_plan.decode_plan.cache_clear()
    blocks = replace(BLOCKS, topk=7, kernel_stride=32)
    try:
        with organised(name):
            case = decode_case([2700], [1], blocks, heads=2, kv_heads=1, ties=kind == "ties", room=32 * 90)
            case.check(BACKEND, ties=kind == "ties")
    finally:
        decode_plan.decode_plan.cache_clear()
    assert {len(plan.levels) for plan in plans} == {2}


def test_as_many_candidates_as_a_long_context_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the last choice goes over, in the chunks of a file: 72 x 8, from room alone but for the last."""
    plans = seen(monkeypatch)
    blocks = replace(BLOCKS, topk=11, kernel_stride=32)
    with organised("apart-of-chunks"):
        case = decode_case([1170], [1], blocks, heads=1, kv_heads=1, head_dim=8, room=32 * 16 * 72)
        case.check(BACKEND)
    assert {len(plan.levels) for plan in plans} == {1}


def test_an_early_start_is_left_out_where_kernels_are_interpreted() -> None:
    """The interpreter has no programs to start early; it takes the numbers of a GPU, that one included."""
    with overridden("decode_compressed", early=1):
        decode_case([70], [1], SMALL, heads=1, kv_heads=1).check(BACKEND)


# --- heads, tokens, dims ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alone", slow("apart-of-chunks-merged-apart"), "added-first-of-chunks"])
@pytest.mark.parametrize("group", [1, slow(2), 3, slow(6), 16])
def test_groups(group: int, name: str) -> None:
    with organised(name):
        decode_case([600 if "chunks" in name else 200], [1], BLOCKS, heads=3 * group, kv_heads=3, head_dim=8).check(
            BACKEND
        )


@pytest.mark.parametrize("name", ["alone", "added-first"])
def test_the_largest_group(name: str) -> None:
    """All of one token's heads in one tile; the scores are summed over 16 of them at a time."""
    with organised(name):
        decode_case([200], [1], BLOCKS, heads=64, kv_heads=1, head_dim=8).check(BACKEND)


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("alone", torch.float16),
        ("apart-of-chunks-merged-apart", torch.float32),
        slow("apart-of-chunks", torch.float16),
        slow("choice-beside", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens, group", [(3, 1), (3, 6), slow(8, 2), (8, 16)], ids=str)
def test_tokens(tokens: int, group: int, name: str, dtype: torch.dtype) -> None:
    """Ragged counts; 8 x 16 rows are two tiles, so that "alone" is no longer that."""
    counts = {3: [3, 0, 1], 8: [8, 0, 3]}[tokens]
    lengths = [560, 9, 30] if "chunks" in name else [170, 9, 30]
    with organised(name):
        decode_case(lengths, counts, BLOCKS, heads=group, kv_heads=1, head_dim=8, dtype=dtype).check(BACKEND)


@pytest.mark.parametrize("name", [slow("alone"), slow("apart"), "added-first-of-chunks"])
@pytest.mark.parametrize("dims", [(24, 40), (40, 24), (8, 100), (80, 16), (192, 128)], ids=str)
def test_head_dims(dims: tuple[int, int], name: str) -> None:
    """In one piece or two, neither of them full."""
    with organised(name):
        case = decode_case([600], [1], BLOCKS, heads=2, kv_heads=1, head_dim=dims[0], v_head_dim=dims[1])
        case.check(BACKEND)


def test_head_dims_with_new_tokens() -> None:
    for dims in ((24, 40), (80, 17)):
        with organised("alone"):
            case = decode_case([67, 32], [3, 1], SMALL, kv_heads=2, head_dim=dims[0], v_head_dim=dims[1], new="weights")
            case.check(BACKEND)


# --- blocks, pages, lengths -------------------------------------------------------------------------------------------

GEOMETRIES = {
    "usual": BlockGeometry(topk=6),
    "block-32": BLOCKS,
    "eight-overlap": replace(BLOCKS, kernel_stride=4),
    "no-overlap": replace(BLOCKS, kernel_stride=32),
    "fewer-tokens-than-stride-times-two": replace(BLOCKS, kernel_size=24, kernel_stride=8),
    "block-per-token": replace(BLOCKS, kernel_size=1, kernel_stride=1),
    "topk-7": replace(BLOCKS, topk=7),
    "no-init": replace(BLOCKS, init_blocks=0, local_blocks=1),
    "three-of-each": replace(BLOCKS, init_blocks=3, local_blocks=3, topk=9),
    "forced-alone": replace(BLOCKS, topk=3),
    "one-block": replace(BLOCKS, topk=1, init_blocks=0, local_blocks=1),
    "all-blocks": replace(BLOCKS, topk=20),
    "window-1": replace(BLOCKS, window_size=1),
    "window-of-all": replace(BLOCKS, window_size=5000),
}


@pytest.mark.parametrize("name", [slow("alone"), "apart", slow("added-first-of-chunks")])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometries(geometry: str, name: str) -> None:
    blocks = GEOMETRIES[geometry]
    with organised(name):
        case = decode_case(
            *([9 * blocks.block_size + 19, 70], [1, 1], blocks),
            heads=2,
            kv_heads=1,
            pages=(32, blocks.block_size, 32),
            room=17 * blocks.block_size,
        )
        case.check(BACKEND)


@pytest.mark.parametrize("geometry", ["usual", "eight-overlap", "no-init", "forced-alone", "one-block", "window-1"])
def test_geometries_of_several_tokens(geometry: str) -> None:
    blocks = GEOMETRIES[geometry]
    with organised("apart-of-chunks"):
        lengths = [8 * blocks.block_size + 2, 7 * blocks.block_size + 19]
        decode_case(lengths, [3, 2], blocks, heads=1, kv_heads=1, pages=(32, blocks.block_size, 32)).check(BACKEND)


@pytest.mark.parametrize("name", ["alone", slow("apart-of-chunks")])
@pytest.mark.parametrize("new", [slow(None), "mean"], ids=["stored", "new"])
@pytest.mark.parametrize("pages", [(32, 64, 96), (64, 96, 32), (96, 32, 64), (16, 64, 16)], ids=str)
def test_page_sizes(pages: tuple[int, int, int], new: str | None, name: str) -> None:
    """Tables of values are wider than those of keys and name other pages."""
    with organised(name, keys=64):
        for apart in (False, True):
            decode_case([545, 97], [1, 2], SMALL, heads=1, kv_heads=1, pages=pages, apart=apart, new=new).check(BACKEND)


@pytest.mark.parametrize("name", ["alone", slow("apart"), slow("added-first")])
def test_any_length(name: str) -> None:
    """From none, around each boundary of blocks, pages and the window."""
    edges = [0, 1, 7, 8, 9, 11, 12, 31, 32, 33, 39, 40, 41, 63, 64, 65, 95, 96, 97, 159, 160, 161, 162]
    counts = [min(1, length) for length in edges]
    with organised(name):
        decode_case(edges, counts, SMALL, heads=1, kv_heads=1, head_dim=8).check(BACKEND)


@pytest.mark.parametrize("lengths, rows", [([0, 0], 2), ([], 2), ([20, 3], 0), ([20, 3], 2)], ids=str)
@pytest.mark.parametrize("new", [None, "mean", "blocks"])
def test_nobody_has_a_new_token(new: str | None, lengths: list[int], rows: int) -> None:
    case = decode_case(lengths, [0] * len(lengths), SMALL, rows=rows, heads=2, kv_heads=1, new=new)
    out, indices = case.check(BACKEND)
    assert out.shape == (len(lengths), rows, 2, 16)
    assert not out.any()
    assert (indices == -1).all()


@pytest.mark.parametrize("name", ["alone", "apart-of-chunks", slow("added-first-of-chunks")])
@pytest.mark.parametrize("stream", ["k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"])
def test_a_missing_page_holds_zeros(stream: str, name: str) -> None:
    """As it does for the oracle; its number is -1."""
    case = decode_case([560], [1], SMALL, heads=1, kv_heads=1, apart=True, seed=1)
    kv = case[stream]
    table = kv.block_table.clone()
    lost = {"cmp": 1, "slc": 0, "win": 17}[stream[2:]]
    table[0, lost] = -1
    with organised(name):
        case.changed(**{stream: replace(kv, block_table=table)}).check(BACKEND)


# --- ties, scale, arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORGANISATIONS)
def test_equal_scores_go_to_the_lower_index(name: str) -> None:
    """Of 12 heads, whose probabilities must be summed in one order everywhere."""
    with organised(name):
        case = decode_case([1170, 700], [1, 1], BLOCKS, heads=12, kv_heads=1, head_dim=8, ties=True)
        _, indices = case.check(BACKEND, ties=True)
    assert indices[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 35, 36]


@pytest.mark.parametrize("name", ["choice-of-chunks", "apart-of-chunks", "added-first-of-chunks"])
@pytest.mark.parametrize("kernel_stride", [4, 32])
@pytest.mark.parametrize("tokens", [1, 3])
def test_ties_where_blocks_overlap_and_where_not(tokens: int, kernel_stride: int, name: str) -> None:
    blocks = replace(BLOCKS, kernel_stride=kernel_stride)
    with organised(name):
        decode_case([1170], [tokens], blocks, heads=3, kv_heads=1, head_dim=8, ties=True).check(BACKEND, ties=True)


@pytest.mark.parametrize("name", ["alone", "added-first-of-chunks"])
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_scale(scale: float, name: str) -> None:
    with organised(name):
        decode_case([600], [1], BLOCKS, heads=2, kv_heads=1, scale=scale).check(BACKEND)


@pytest.mark.parametrize("name", ["alone", "apart"])
def test_queries_of_the_compressed_branch_are_q_by_default(name: str) -> None:
    case = decode_case([300], [1], BLOCKS, heads=2, kv_heads=1)
    with organised(name):
        other = case.run(BACKEND)
        for q_cmp in (None, case["q"]):
            found = case.changed(q_cmp=q_cmp).run(BACKEND)
            expected = case.changed(q_cmp=case["q"].clone()).check(BACKEND)
            for got, x in zip(found, expected, strict=True):
                assert_equal("q_cmp", got, x)
    assert not torch.equal(found[0], other[0])


@pytest.mark.parametrize("name", [slow("alone"), "alone-merged-apart"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["fp64", "fp16"])
def test_gates_of_another_dtype(dtype: torch.dtype, name: str) -> None:
    case = decode_case([200, 40], [1, 2], BLOCKS, heads=2, kv_heads=1)
    with organised(name):
        case.changed(gates=case["gates"].to(dtype).to(torch.float64).float()).check(BACKEND)
        found, _ = case.changed(gates=case["gates"].to(dtype)).run(BACKEND)
        same, _ = case.changed(gates=case["gates"].to(dtype).float()).run(BACKEND)
    torch.testing.assert_close(found, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("new", [None, "mean", "weights", "blocks"])
def test_views(new: str | None) -> None:
    """Of wider tensors with other heads between, with every second dimension apart."""
    case = decode_case([36, 73], [1, 2], SMALL, head_dim=8, kv_heads=2, new=new)
    with organised("alone"):
        strided(case).check(BACKEND)


@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_of_one_projection(tokens: int) -> None:
    """As `unbind` leaves them: of all six rows of a token, side by side in memory."""
    case = decode_case([76, 72, 33], [tokens, 1, 1], SMALL, head_dim=8, kv_heads=2, new="mean")
    new = case["new"]
    rows = new.k_slc, new.v_slc, new.k_win, new.v_win, new.cmp.k, new.cmp.v
    *four, k, v = torch.stack(rows, 2).unbind(2)
    with organised("alone"):
        case.changed(new=NewTokens(*four, replace(new.cmp, k=k, v=v))).check(BACKEND)


@pytest.mark.parametrize("new", ["mean", "blocks"])
def test_rows_of_longer_sequences(new: str) -> None:
    """Some of a prompt's rows: sequences lie further apart than their new tokens."""
    case = decode_case([76, 72], [2, 1], SMALL, head_dim=8, kv_heads=2, new=new)

    def slice_of_more(x: Tensor) -> Tensor:
        more = torch.full((len(x), x.shape[1] + 5, *x.shape[2:]), torch.nan)
        more[:, 2 : 2 + x.shape[1]] = x
        return more[:, 2 : 2 + x.shape[1]]

    new_tokens = case["new"]
    cmp = replace(new_tokens.cmp, k=slice_of_more(new_tokens.cmp.k), v=slice_of_more(new_tokens.cmp.v))
    rows = (new_tokens.k_slc, new_tokens.v_slc, new_tokens.k_win, new_tokens.v_win)
    with organised("alone"):
        case.changed(new=NewTokens(*map(slice_of_more, rows), cmp)).check(BACKEND)


@pytest.mark.parametrize("name", ["alone", "apart-of-chunks-merged-apart", "added-first-of-chunks"])
def test_padding_rows_are_left_alone(name: str) -> None:
    """More rows than anybody has tokens."""
    with organised(name):
        case = decode_case([70, 20], [1, 0], SMALL, rows=2, heads=2, kv_heads=1, new="mean", room=600)
        out, indices = case.check(BACKEND)
    assert not out[0, 1:].any()
    assert (indices[0, 1:] == -1).all()


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alone-merged-apart", slow("apart-of-chunks"), slow("added-first-of-chunks")])
def test_each_sequence_is_as_alone(name: str) -> None:
    """Bitwise, where a batch is cut as one sequence is."""
    tokens = 1 if "added-first" in name else 2
    case = decode_case([560, 0, 70, 9], [tokens, 0, 1, 1], SMALL, heads=2, kv_heads=1)
    with organised(name):
        whole = case.run(BACKEND)
        for sequence in range(4):
            one = case.part(slice(sequence, sequence + 1)).run(BACKEND)
            for got, x in zip(one, whole, strict=True):
                assert_equal(f"sequence {sequence}", got[0], x[sequence])


@pytest.mark.parametrize("new", [slow(None), slow("weights"), "blocks"])
@pytest.mark.parametrize("together", [1, slow(2)])
def test_more_sequences_than_scratch_holds(together: int, new: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = seen(monkeypatch)
    rotated = "halves" if new == "weights" else None
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 8, "apart": True}
    case = decode_case([33, 0, 76], [1, 0, 1], SMALL, **sizes, new=new, rotated=rotated)
    with organised("alone-merged-apart"):
        whole, parts = case.copy(), case.copy()
        expected = whole.run(BACKEND)
        monkeypatch.setattr(decode, "SCRATCH_BYTES", 4 * 2 * together * plans[0].region)
        with poisoned_empty():
            found = parts.run(BACKEND)
    assert {plan.region for plan in plans} == {plans[0].region}
    for got, x in zip(found, expected, strict=True):
        assert_equal("result", got, x)
    if new is not None:
        assert_stored_alike(parts, whole)


# --- new tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("alone", torch.float32),
        ("apart-of-chunks-merged-apart", torch.float16),
        slow("alone", torch.float16),
        slow("choice-beside", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "new, rotated",
    [
        slow("mean", None),  # as (mean, interleaved), less the rotation
        ("mean", "interleaved"),
        slow("weights", "halves"),
        ("blocks", None),
        slow("mean", "halves"),
        slow("weights", None),
        slow("weights", "interleaved"),
    ],
)
def test_new_tokens(new: str, rotated: str | None, name: str, dtype: torch.dtype) -> None:
    """A first block, several at once, a block and a page that begin, one that waits, one that is empty."""
    with organised(name):
        case = decode_case(
            *([8, 76, 0, 33], [1, 5, 0, 1], SMALL),
            **{"heads": 2, "kv_heads": 1, "head_dim": 8, "new": new, "rotated": rotated, "dtype": dtype, "room": 160},
        )
        case.check(BACKEND)


@pytest.mark.parametrize("name", ["apart", slow("added-first"), slow("added-first-of-chunks")])
@pytest.mark.parametrize("new, rotated", [slow("mean", None), ("weights", "halves"), slow("blocks", None)])
def test_one_new_token(new: str, rotated: str | None, name: str) -> None:
    """Over the emission of a block, at the end and at the beginning of a page of them, of a tile, of a block."""
    lengths = [7, 8, 32, 131, 132, 135, 136, 259, 260, 264]
    with organised(name):
        case = decode_case(
            *(lengths, [1] * len(lengths), SMALL), heads=1, kv_heads=1, new=new, rotated=rotated, room=540, apart=True
        )
        case.check(BACKEND)


@pytest.mark.parametrize("new", ["mean", slow("blocks")])
@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (16, 2), (12, 4)], ids=str)
def test_new_tokens_of_other_blocks(sizes: tuple[int, int], new: str) -> None:
    """A block per token, blocks that do not overlap, that overlap eightfold, of a size that is no power of two."""
    with organised("alone"):
        blocks = BlockGeometry(*sizes, 32, 5, window_size=40)
        decode_case([70, 33], [5, 1], blocks, heads=1, kv_heads=1, head_dim=8, new=new).check(BACKEND)


@pytest.mark.parametrize("new", [slow("weights"), "blocks"])
def test_several_kv_heads_store_their_own(new: str) -> None:
    with organised("alone-merged-apart"):
        case = decode_case([76, 36], [3, 1], SMALL, heads=6, kv_heads=3, new=new, apart=True, head_dim=8, v_head_dim=12)
        case.check(BACKEND)


@pytest.mark.parametrize("name", ["alone", "apart"])
def test_pages_of_slc_may_serve_the_window(name: str) -> None:
    case = decode_case([76, 36, 133], [1, 1, 2], SMALL, heads=2, kv_heads=1, new="mean")
    new = case["new"]
    shared = case.changed(k_win=case["k_slc"], v_win=case["v_slc"], new=replace(new, k_win=new.k_slc, v_win=new.v_slc))
    with organised(name):
        shared.check(BACKEND)


@pytest.mark.parametrize("new", [slow("mean"), "weights", slow("blocks")])
@pytest.mark.parametrize("name", [slow("alone"), "apart-of-chunks"])
def test_again_stores_the_same(name: str, new: str) -> None:
    case = decode_case([8, 76, 33], [1, 3, 1], SMALL, heads=2, kv_heads=1, new=new).copy()
    with organised(name):
        first = case.run(BACKEND)
        once = case.copy()
        for got, x in zip(case.run(BACKEND), first, strict=True):
            assert_equal("again", got, x)
    for stream in ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"):
        assert_equal(stream, case[stream].pages, once[stream].pages)
        assert_equal(stream, case[stream].lengths, once[stream].lengths)


@pytest.mark.parametrize("new", ["mean", slow("blocks")])
@pytest.mark.parametrize("stream", ["k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"])
def test_rows_without_a_page_are_dropped(stream: str, new: str) -> None:
    """Nobody else's page changes, the first of all least. The sequence asks nothing: what it would see is not there."""
    case = decode_case([76, 80], [3, 1], SMALL, heads=1, kv_heads=1, new=new, apart=True)
    kv = case[stream]
    table = kv.block_table.clone()
    table[0] = -1
    mine = case.changed(**{stream: replace(kv, block_table=table)}).copy()
    other = mine.copy()
    with organised("apart"):
        mine.run(BACKEND)
    other.run(SDPA)
    assert_stored_alike(mine, other)


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_floating_dtype(weights: torch.dtype) -> None:
    case = decode_case([76, 36], [3, 1], SMALL, heads=2, kv_heads=1, new="weights")
    new = case["new"]
    cmp = replace(new.cmp, k_weights=new.cmp.k_weights.to(weights), v_weights=new.cmp.v_weights.to(weights))
    with organised("alone"):
        case.changed(new=replace(new, cmp=cmp)).check(BACKEND)


def test_lengths_of_compressed_values_are_written_too() -> None:
    """Where they are a tensor of their own."""
    case = decode_case([76, 36], [3, 1], SMALL, heads=2, kv_heads=1, new="mean").copy()
    v_cmp = replace(case["v_cmp"], lengths=torch.full((2,), 99, dtype=torch.int32))
    case = case.changed(v_cmp=v_cmp)
    case.run(BACKEND)
    assert case["k_cmp"].lengths.tolist() == v_cmp.lengths.tolist() == [18, 8]


# --- what is refused --------------------------------------------------------------------------------------------------


def bad(case: DecodeCase, name: str, **changes: Any) -> DecodeCase:
    return case.changed(**{name: replace(case[name], **changes)})


def test_pages_that_the_kernels_cannot_read() -> None:
    case = decode_case([70], [1], SMALL, heads=2, kv_heads=1)
    for stream in ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"):
        kv, branch = case[stream], stream[2:]
        short = bad(case, stream, pages=kv.pages.repeat(1, 2, 1, 1))
        with pytest.raises(
            ValueError, match=rf"^k_{branch}, v_{branch}: expected pages of one size, a multiple of 16, got "
        ):
            short.run(BACKEND)
        wide = torch.stack((kv.pages, kv.pages), -1)[..., 0]
        with pytest.raises(ValueError, match=rf"^k_{branch}, v_{branch}: expected contiguous pages, got strides$"):
            bad(case, stream, pages=wide).run(BACKEND)
    odd = decode_case([70], [1], SMALL, heads=2, kv_heads=1, pages=(8, 32, 32))
    with pytest.raises(ValueError, match=r"^k_cmp, v_cmp: expected pages of one size, a multiple of 16, got 8 and 8$"):
        odd.run(BACKEND)
    small = decode_case([70], [1], SMALL, heads=2, kv_heads=1, pages=(16, 16, 16))
    with pytest.raises(ValueError, match=r"^k_slc: expected pages of a multiple of block_size=32, got 16$"):
        small.run(BACKEND)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"topk": 68}, "needs topk up to 64 beside the 3 forced blocks, got 68$"),
        ({"topk": 257, "init_blocks": 200}, "needs topk up to 256, got 257$"),
        ({"block_size": 16, "kernel_size": 8}, "needs block_size 32, 64 or 128, got 16$"),
    ],
)
def test_blocks_that_the_kernels_do_not_do(changes: dict[str, int], message: str) -> None:
    blocks = replace(SMALL, **changes)
    case = decode_case([70], [1], blocks, heads=2, kv_heads=1)
    with pytest.raises(ValueError, match=f"^decode_attention on backend triton: {message}"):
        case.run(BACKEND)


def test_precisions_and_heads_that_the_kernels_do_not_do() -> None:
    start = "^decode_attention on backend triton: "
    for options, message in (
        ({"dtype": torch.float64}, "takes float16, bfloat16 and float32, not float64$"),
        ({"dtype": torch.bfloat16}, "takes float16 and float32 in Triton's interpreter, not bfloat16$"),
        ({"heads": 65}, "needs at most 64 query heads a kv head, got 65$"),
        ({"head_dim": 257}, "needs head_dim and v_head_dim from 1 to 256, got 257 and 257$"),
    ):
        case = decode_case([40], [1], SMALL, **({"heads": 2, "kv_heads": 1, "ties": True} | options))
        with pytest.raises(ValueError, match=start + message):
            case.run(BACKEND)


@pytest.mark.parametrize("name", ["q", "q_cmp", "gates"])
def test_gradients_are_refused_and_no_grad_is_not(name: str) -> None:
    case = decode_case([40], [1], SMALL, heads=2, kv_heads=1)
    leaf = case.changed(**{name: case[name].clone().requires_grad_()})
    with pytest.raises(ValueError, match=r"records no gradients through paged keys and values$"):
        leaf.run(BACKEND)
    with torch.no_grad():
        assert_equal("out", leaf.run(BACKEND)[0], case.run(BACKEND)[0])


def test_the_most_blocks_that_compete() -> None:
    """64 places, of 130 blocks and more."""
    blocks = replace(BLOCKS, kernel_stride=32, topk=67)
    with organised("apart"):
        decode_case([32 * 72 + 5], [1], blocks, heads=1, kv_heads=1, head_dim=8).check(BACKEND)


BAD = [
    ({"q": torch.zeros(1, 1, 16)}, ValueError, r"^q: expected shape \[B, N, heads, head_dim\], got \[1, 1, 16\]$"),
    ({"q": None}, TypeError, r"^q: expected a tensor, got NoneType$"),
    ({"q_cmp": torch.zeros(1, 1, 2, 15)}, ValueError, r"^q_cmp: expected torch.float32 \[1, 1, 2, 16\] of q, got "),
    ({"gates": torch.zeros(1, 1, 2)}, ValueError, r"^gates: expected shape \[1, 1, 2, 3\] on cpu, got "),
    ({"counts": torch.zeros(1, dtype=torch.int64)}, ValueError, r"^counts: expected torch.int32 \[1\] on cpu, got "),
    ({"counts": torch.full((1,), 2, dtype=torch.int32)}, ValueError, r"^counts: expected 0 to 1, and at most the "),
    ({"k_slc": torch.zeros(3, 2, 8)}, TypeError, r"^k_slc: expected a PagedKV, got Tensor$"),
    ({"blocks": 64}, TypeError, r"^blocks: expected a BlockGeometry, got int$"),
    ({"scale": -1.0}, ValueError, r"^scale: expected a finite number above 0, got -1.0$"),
    ({"new": 3}, TypeError, r"^new: expected NewTokens or None, got int$"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_arguments_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Told as the reference tells them, before anything is stored."""
    case = decode_case([70], [1], SMALL, heads=2, kv_heads=1, new="mean")
    with pytest.raises(error, match=message):
        case.changed(**change).run(BACKEND)
    assert (case["k_cmp"].lengths == -7).all()


def test_new_rows_that_do_not_fit() -> None:
    case = decode_case([70], [1], SMALL, heads=2, kv_heads=1, new="mean")
    new = case["new"]
    with pytest.raises(ValueError, match=r"^new.v_win: expected shape \[1, 1, 1, 16\], got \[1, 1, 2, 16\]$"):
        case.changed(new=replace(new, v_win=new.v_win.repeat(1, 1, 2, 1))).run(BACKEND)
    with pytest.raises(ValueError, match=r"^new.cmp.k_tail: expected a ring of at least 8 rows"):
        case.changed(new=replace(new, cmp=replace(new.cmp, k_tail=new.cmp.k_tail[:, :7]))).run(BACKEND)
    assert (case["k_cmp"].lengths == -7).all()


def test_the_first_kernel_waits_for_nothing_of_the_step_before() -> None:
    """A step after a step, on the same pages: what the first stored, the second reads."""
    lengths = [39, 62]
    whole = decode_case([n + 2 for n in lengths], [2, 2], SMALL, heads=2, kv_heads=1, new="mean", rows=2).copy()
    steps = whole.copy()
    with organised("alone"):
        expected = whole.run(BACKEND)
        for step in range(2):
            new, part = steps["new"], slice(step, step + 1)
            cmp = replace(new.cmp, k=new.cmp.k[:, part], v=new.cmp.v[:, part])
            one = NewTokens(*(x[:, part] for x in (new.k_slc, new.v_slc, new.k_win, new.v_win)), cmp)
            reached = torch.tensor([n + step + 1 for n in lengths], dtype=torch.int32)
            kvs = {name: replace(steps[name], lengths=reached) for name in ("k_slc", "v_slc", "k_win", "v_win")}
            rows = {name: steps[name][:, part] for name in ("q", "q_cmp", "gates")}
            ones = torch.ones(2, dtype=torch.int32)
            out, indices = steps.changed(new=one, counts=ones, **kvs, **rows).run(BACKEND)
            torch.testing.assert_close(out[:, 0], expected[0][:, step], rtol=0, atol=5e-5)
            assert_equal("indices", indices[:, 0], expected[1][:, step])
    assert_stored_alike(steps, whole)


def test_tables_may_be_as_narrow_as_the_sequences() -> None:
    """Of no compressed block there may be no column at all."""
    case = decode_case([5], [1], SMALL, heads=1, kv_heads=1)
    kv = case["k_cmp"]
    empty = PagedKV(kv.pages, kv.block_table[:, :0], kv.lengths)
    case.changed(k_cmp=empty, v_cmp=replace(empty, pages=case["v_cmp"].pages)).check(BACKEND)


@pytest.mark.parametrize("new", ["mean", "blocks"])
@pytest.mark.parametrize("name", ["apart", "added-first"])
def test_new_blocks_of_two_tiles_are_made_by_those_who_read_them(name: str, new: str) -> None:
    """Blocks 15 and 16, the last of one tile and the first of the next, which another program reads."""
    with organised(name, keys=16):
        decode_case([72], [5], SMALL, heads=1, kv_heads=1, head_dim=8, new=new, room=400).check(BACKEND)


def apart(x: Tensor) -> Tensor:
    """Equal numbers, two others between each."""
    wide = torch.full((len(x), 3), 77, dtype=x.dtype)
    wide[:, 1] = x
    return wide[:, 1]


def test_counts_and_lengths_may_be_views() -> None:
    case = decode_case([76, 36, 33], [2, 1, 2], SMALL, heads=2, kv_heads=1, head_dim=8)
    lengths = apart(case["k_slc"].lengths)
    kv = {name: replace(case[name], lengths=lengths) for name in ("k_slc", "v_slc", "k_win", "v_win")}
    with organised("alone"):
        case.changed(counts=apart(case["counts"]), **kv).check(BACKEND)
        one = decode_case([76, 36], [1, 1], SMALL, heads=2, kv_heads=1, head_dim=8)
        one.changed(counts=torch.ones(1, dtype=torch.int32).expand(2)).check(BACKEND)


def test_lengths_of_compressed_rows_may_be_a_view() -> None:
    """They are written, and what lies between them is not."""
    case = decode_case([76, 36, 33], [2, 1, 2], SMALL, heads=2, kv_heads=1, head_dim=8, new="mean").copy()
    wide = torch.full((3, 3), 77, dtype=torch.int32)
    kv = {name: replace(case[name], lengths=wide[:, 1]) for name in ("k_cmp", "v_cmp")}
    with organised("alone"):
        case.changed(**kv).run(BACKEND)
    assert wide.tolist() == [[77, 18, 77], [77, 8, 77], [77, 7, 77]]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_rotation_may_be_a_view(transposed: bool) -> None:
    case = decode_case([76, 36, 33], [2, 1, 2], SMALL, heads=2, kv_heads=1, head_dim=8, new="mean", rotated="halves")
    new, rotation = case["new"], case["new"].cmp.rotation
    wide = torch.nn.functional.pad(rotation, (0, 0, 0, 5), value=9.0)[:, : rotation.shape[1]]
    view = rotation.transpose(0, 1).contiguous().transpose(0, 1) if transposed else wide
    with organised("alone"):
        case.changed(new=replace(new, cmp=replace(new.cmp, rotation=view))).check(BACKEND)


def test_rings_must_be_contiguous() -> None:
    case = decode_case([76, 36], [2, 1], SMALL, heads=2, kv_heads=1, head_dim=8, new="mean")
    cmp = case["new"].cmp
    with organised("alone"):
        case.copy().run(BACKEND)  # equal but for strides
        wide = torch.nn.functional.pad(cmp.k_tail, (0, 0, 0, 0, 0, 3))[:, : cmp.k_tail.shape[1]]
        new = replace(case["new"], cmp=replace(cmp, k_tail=wide))
        with pytest.raises(ValueError, match=r"^new.cmp.k_tail, new.cmp.v_tail: expected contiguous rings, got str"):
            case.changed(new=new).run(BACKEND)


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("stream", ["win", "slc"])
def test_a_new_row_without_a_page_is_read_as_zeros(stream: str, early: int) -> None:
    case = decode_case([70], [2], SMALL, heads=1, kv_heads=1, head_dim=8, new="mean")
    changes = {}
    for name in (f"k_{stream}", f"v_{stream}"):
        table = case[name].block_table.clone()
        table[0, 2] = -1
        changes[name] = replace(case[name], block_table=table)
    mine = case.changed(**changes).copy()
    exact = mine.copy().double()
    with organised("alone", compressed={"early": early}):
        out, indices = mine.run(BACKEND)
    expected, chosen = exact.run(reference)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=FP32)
    assert torch.equal(indices, chosen)


def test_a_length_beyond_its_table_writes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nobody looks at lengths: sequence 0 has no third page; the next table's first is another's."""
    case = decode_case([64, 64], [1, 1], SMALL, heads=1, kv_heads=1, head_dim=8, new="mean").copy()
    lengths = torch.tensor([65, 64], dtype=torch.int32)
    wrong = case.changed(**{x: replace(case[x], lengths=lengths) for x in ("k_slc", "v_slc", "k_win", "v_win")}).copy()
    before = wrong["k_slc"].pages.clone()
    monkeypatch.setattr(arguments, "_check_lengths", lambda *args, **kwargs: None)
    with organised("alone"):
        wrong.run(BACKEND)
    pages = wrong["k_slc"].pages
    changed = (pages != before) & ~(pages.isnan() & before.isnan())
    last = int(wrong["k_slc"].block_table[1, 1])
    assert changed.flatten(2).any(2).nonzero().tolist() == [[last, 31]]
