"""`decode_attention` with rows to store: is everything then where it belongs, and the result that of pages that had it?

Pages, rings and lengths are compared as wholes, with NaN wherever nobody wrote: a row too many shows as one too few.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from nsa_varlen import (
    BlockGeometry,
    CompletedBlocks,
    NewTokens,
    PagedKV,
    PooledTokens,
    VarlenLayout,
    reference,
    unfold_blocks,
)
from nsa_varlen.sdpa import BACKEND
from nsa_varlen.testing import to_pages
from torch import Tensor

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12)
# A first block, one of two, a block and a page that begin, several blocks at once, an empty sequence, one that waits.
LENGTHS, COUNTS = [8, 75, 33, 131, 0, 16, 9], [1, 3, 1, 10, 0, 0, 9]
ROWS = 10
STREAMS = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")
RUNS = {"oracle": reference.decode_attention, "sdpa": BACKEND.decode_attention}
KINDS = ("mean", "weights", "blocks")


@dataclass
class Case:
    """Arguments before (rows to come are NaN, the lengths of cmp nonsense), and what pages and rings hold after."""

    arguments: dict[str, Any]
    stored: dict[str, PagedKV]
    rings: tuple[Tensor, Tensor] | None

    def run(self, name: str, **changes: Any) -> tuple[Tensor, Tensor]:
        return RUNS[name](**(self.arguments | changes))

    def result(self) -> tuple[Tensor, Tensor]:
        """Of the oracle, with everything stored by hand."""
        return reference.decode_attention(**(self.arguments | self.stored | {"new": None}))

    def check(self, atol: float = 1e-12) -> None:
        """Everything is where it belongs, and nothing anywhere else."""
        for name, kv in self.stored.items():
            got = self.arguments[name]
            tolerance = atol if "cmp" in name else 0.0
            torch.testing.assert_close(got.pages, kv.pages, rtol=0, atol=tolerance, equal_nan=True, msg=name)
            assert torch.equal(got.lengths, kv.lengths), name
        if self.rings is not None:
            new = self.arguments["new"].cmp
            for got, ring in zip((new.k_tail, new.v_tail), self.rings, strict=True):
                torch.testing.assert_close(got, ring, rtol=0, atol=0, equal_nan=True)


def turned(k: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """k [T, H, D] by rotation [2, T, D/2], by matrices of two rows."""
    out = torch.empty_like(k)
    for pair in range(half := k.shape[-1] // 2):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        cos, sin = rotation[:, :, None, pair]
        out[..., i], out[..., j] = cos * k[..., i] - sin * k[..., j], sin * k[..., i] + cos * k[..., j]
    return out


def make(
    kind: str = "mean",
    rotated: str | None = None,
    *,
    lengths: list[int] = LENGTHS,
    counts: list[int] = COUNTS,
    rows: int = ROWS,
    blocks: BlockGeometry = BLOCKS,
    page_size: int = 16,
    spare: int = 3,
    dims: tuple[int, int] = (8, 6),
    shared: bool = False,
) -> Case:
    """`spare`: rows of the ring beyond what it must have."""
    layout, batch = VarlenLayout.from_lengths(lengths), len(lengths)
    before = [length - count for length, count in zip(lengths, counts, strict=True)]
    first, last = ([blocks.num_compressed(n) for n in x] for x in (before, lengths))
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    raw = {name: rand(sum(lengths), 2, dims[name[0] == "v"]) for name in STREAMS}
    if shared:
        raw |= {"k_win": raw["k_slc"], "v_win": raw["v_slc"]}
    weights = {side: rand(2, blocks.kernel_size) if kind == "weights" else None for side in "kv"}
    rows_of = {}
    for side in "kv":
        unfolded = unfold_blocks(raw[f"{side}_cmp"], layout, blocks)
        weight = torch.full((2, blocks.kernel_size), 1 / blocks.kernel_size) if kind != "weights" else weights[side]
        rows_of[f"{side}_cmp"] = torch.einsum("hl,nlhd->nhd", weight.double(), unfolded)
    room = max(1, -(-max(last, default=0) // page_size)) * page_size
    rotation = None if rotated is None else torch.stack(((a := rand(room + 2, dims[0] // 2)).cos(), a.sin()))
    if rotation is not None:
        number = torch.cat([torch.arange(n) for n in [*last, 0]])
        rows_of["k_cmp"] = turned(rows_of["k_cmp"], rotation[:, number], rotated == "interleaved")
    rows_of |= {name: raw[name] for name in STREAMS if "cmp" not in name}
    ends = {name: last if "cmp" in name else lengths for name in STREAMS}
    stored = {name: to_pages(x, ends[name], page_size, seed=i) for i, (name, x) in enumerate(rows_of.items())}
    if shared:
        stored |= {"k_win": stored["k_slc"], "v_win": stored["v_slc"]}
    given = {}
    for name, kv in stored.items():
        starts, pages = first if "cmp" in name else before, kv.pages.clone()
        for sequence, (start, end) in enumerate(zip(starts, ends[name], strict=True)):
            for row in range(start, end):
                pages[kv.block_table[sequence, row // page_size], row % page_size] = torch.nan
        old = torch.full_like(kv.lengths, -7) if "cmp" in name else kv.lengths.clone()
        given[name] = PagedKV(pages, kv.block_table, old)
    if shared:
        given |= {"k_win": given["k_slc"], "v_win": given["v_slc"]}

    def newest(x: Tensor) -> Tensor:
        padded = torch.full((batch, rows, *x.shape[1:]), torch.nan, dtype=torch.float64)
        for into, sequence, count in zip(padded, x.split(lengths), counts, strict=True):
            into[:count] = sequence[len(sequence) - count :]
        return padded

    def ring(x: Tensor, ends: list[int], size: int) -> Tensor:
        made = torch.full((batch, size, *x.shape[1:]), torch.nan, dtype=torch.float64)
        for into, sequence, end in zip(made, x.split(lengths), ends, strict=True):
            for position in range(end):
                into[position % size] = sequence[position]
        return made

    rings = None
    if kind == "blocks":
        most = (rows - 1) // blocks.kernel_stride + 1
        done = [torch.full((batch, most, 2, dim), torch.nan, dtype=torch.float64) for dim in dims]
        for made, side in zip(done, "kv", strict=True):
            for into, rows_, start in zip(made, rows_of[f"{side}_cmp"].split(last), first, strict=True):
                into[: len(rows_) - start] = rows_[start:]
        cmp = CompletedBlocks(*done)
    else:
        size = blocks.kernel_size - 1 + rows + spare
        k_tail, v_tail = (ring(raw[name], before, size) for name in ("k_cmp", "v_cmp"))
        rings = tuple(ring(raw[name], lengths, size) for name in ("k_cmp", "v_cmp"))
        k, v = newest(raw["k_cmp"]), newest(raw["v_cmp"])
        cmp = PooledTokens(k, v, k_tail, v_tail, weights["k"], weights["v"], rotation, rotated == "interleaved")
    new = NewTokens(*(newest(raw[name]) for name in STREAMS[2:]), cmp)
    arguments = {
        "q": rand(batch, rows, 4, dims[0]),
        **given,
        "gates": rand(batch, rows, 4, 3).sigmoid(),
        "counts": torch.tensor(counts, dtype=torch.int32),
        "blocks": blocks,
        "q_cmp": rand(batch, rows, 4, dims[0]),
        "new": new,
    }
    return Case(arguments, stored, rings)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-6)  # as in test_decode.py: an lse in fp32
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("rotated", [None, "halves", "interleaved"])
@pytest.mark.parametrize("kind", KINDS)
def test_stores_and_attends(kind: str, rotated: str | None, run: str) -> None:
    case = make(kind, rotated)
    assert_same(case.run(run), case.result())
    case.check()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_again_stores_the_same(kind: str, run: str) -> None:
    """A backend that takes over runs it anew."""
    case = make(kind, "halves")
    first = case.run(run)
    assert all(torch.equal(a, b) for a, b in zip(case.run(run), first, strict=True))
    case.check()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "blocks",
    [
        BlockGeometry(kernel_size=1, kernel_stride=1, block_size=4, topk=5, window_size=1),
        BlockGeometry(kernel_size=16, kernel_stride=16, block_size=16, topk=20, window_size=300),
        BlockGeometry(kernel_size=16, kernel_stride=2, block_size=16, topk=4, window_size=12),
    ],
    ids=str,
)
def test_other_blocks(blocks: BlockGeometry, kind: str, run: str) -> None:
    """A block per token, blocks that do not overlap, and blocks that overlap eightfold; a ring of no row too many."""
    case = make(kind, "halves", blocks=blocks, spare=0)
    assert_same(case.run(run), case.result())
    case.check()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("count", range(6))
def test_any_length(count: int, run: str) -> None:
    """Every offset of the new tokens to blocks and to pages of 4 rows: each first length from 0 to 39."""
    blocks = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=4, topk=3, window_size=5)
    lengths = [before + count for before in range(40)]
    case = make("mean", "halves", lengths=lengths, counts=[count] * 40, rows=5, blocks=blocks, page_size=4)
    case.run(run)
    case.check()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_has_a_new_token(kind: str, run: str) -> None:
    """Then only the lengths of cmp are written."""
    case = make(kind, "halves", counts=[0] * len(LENGTHS))
    out, indices = case.run(run)
    assert not out.any()
    assert (indices == -1).all()
    case.check(0.0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths, rows", [([0, 0], 4), ([], 4), ([20, 3], 0)])
def test_nothing_to_do(lengths: list[int], rows: int, kind: str, run: str) -> None:
    case = make(kind, "halves", lengths=lengths, counts=[0] * len(lengths), rows=rows)
    out, _ = case.run(run)
    assert out.shape == (len(lengths), rows, 4, 6)
    case.check(0.0)


@pytest.mark.parametrize("run", RUNS)
def test_pages_of_slc_may_serve_the_window(run: str) -> None:
    case = make(shared=True)
    assert case.arguments["k_win"] is case.arguments["k_slc"]
    assert_same(case.run(run), case.result())
    case.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STREAMS)
def test_rows_without_a_page_are_dropped(name: str, kind: str) -> None:
    """Of one stream at a time, in every sequence in turn: all else is stored, and both forms agree."""
    for sequence in range(len(COUNTS)):
        results = []
        for run in RUNS:
            case = make(kind, "halves")
            kv, expected = case.arguments[name], case.stored[name].pages.clone()
            table = kv.block_table.clone()
            table[sequence] = -1
            lost = [page for page in kv.block_table[sequence].tolist() if page >= 0]
            expected[lost] = kv.pages[lost]
            case.arguments[name] = replace(kv, block_table=table)
            case.stored[name] = replace(case.stored[name], pages=expected, block_table=table)
            results.append(case.run(run))
            case.check()
        assert_same(results[1], results[0])


@pytest.mark.parametrize("run", RUNS)
def test_pages_may_be_a_slice_of_a_pool_whose_first_row_stays(run: str) -> None:
    """All streams in one storage, as a cache has them: nobody else's page changes."""
    case = make("weights", "interleaved", dims=(8, 8))
    pool, start, used = torch.full((140, 16, 2, 8), 5.0, dtype=torch.float64), 1, {}
    for name in STREAMS:
        kv = case.arguments[name]
        count = len(kv.pages)
        pool[start : start + count] = kv.pages
        table = torch.where(kv.block_table >= 0, kv.block_table + start, -1)
        case.arguments[name] = replace(kv, pages=pool[:130], block_table=table)
        used[name] = slice(start, start + count)
        start += count
    assert start < 130
    assert_same(case.run(run), case.result())
    for name, where in used.items():
        torch.testing.assert_close(pool[where], case.stored[name].pages, rtol=0, atol=1e-12, equal_nan=True)
    assert (pool[0] == 5).all()
    assert (pool[start:] == 5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotated", [None, "halves"])
@pytest.mark.parametrize("kind", ["mean", "weights"])
def test_a_pooled_row_is_rounded_once_and_a_rotated_one_again(kind: str, rotated: str, dtype: torch.dtype) -> None:
    case = make(kind, rotated)

    def low(x: Any) -> Any:
        if isinstance(x, PagedKV):
            return PagedKV(x.pages.to(dtype), x.block_table, x.lengths)
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    new = case.arguments["new"]
    cmp = PooledTokens(*(low(x) if i < 4 else x for i, x in enumerate(vars(new.cmp).values())))
    if rotated is not None:
        cmp = replace(cmp, rotation=cmp.rotation.float())
    arguments = {name: low(x) for name, x in case.arguments.items()}
    arguments["new"] = NewTokens(*(low(x) for x in (new.k_slc, new.v_slc, new.k_win, new.v_win)), cmp)
    BACKEND.decode_attention(**arguments)
    positions = [
        (sequence, block)
        for sequence, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True))
        for block in range(BLOCKS.num_compressed(length - count), BLOCKS.num_compressed(length))
    ]
    assert len(positions) > 3
    for name, tail, weights in (("k_cmp", cmp.k_tail, cmp.k_weights), ("v_cmp", cmp.v_tail, cmp.v_weights)):
        for sequence, block in positions:
            rows = torch.stack([tail[sequence, p % tail.shape[1]] for p in range(block * 4, block * 4 + 8)]).double()
            weight = torch.full((2, 8), 1 / 8).double() if weights is None else weights.float().double()
            terms = rows * weight.T[..., None]
            exact, size = terms.sum(0), terms.abs().sum(0)
            # One rounding, of half a unit in the last place, and 9 sums and products in fp32.
            bound = torch.finfo(dtype).eps / 2 * exact.abs() + 9 * 2.0**-24 * size
            if name == "k_cmp" and rotated is not None:
                rounded = exact
                exact = turned(rounded[None], cmp.rotation[:, block : block + 1].double(), False)[0]
                # Each of a pair is off by both of its bounds at most, then rounded again.
                both = (bound.unflatten(-1, (2, -1)).sum(-2)).repeat(1, 2)
                bound = both + torch.finfo(dtype).eps / 2 * (exact.abs() + both) + 4 * 2.0**-24 * size.amax()
            got = arguments[name].rows(torch.tensor(sequence), torch.tensor(block)).double()
            assert ((got - exact).abs() <= bound).all()


def test_weights_of_any_floating_dtype() -> None:
    case, other = make("weights"), make("weights")
    cmp = other.arguments["new"].cmp
    narrow = replace(cmp, k_weights=cmp.k_weights.half(), v_weights=cmp.v_weights.bfloat16())
    other.run("sdpa", new=replace(other.arguments["new"], cmp=narrow))
    wide = replace(narrow, k_weights=narrow.k_weights.double(), v_weights=narrow.v_weights.double())
    case.run("sdpa", new=replace(case.arguments["new"], cmp=wide))
    for name in ("k_cmp", "v_cmp"):
        one, two = case.arguments[name].pages, other.arguments[name].pages
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_tensors_are_the_rows_the_weights_and_the_rotation() -> None:
    for kind in KINDS:
        new = make(kind, "halves").arguments["new"]
        expected = [new.k_slc, new.v_slc, new.k_win, new.v_win, new.cmp.k, new.cmp.v]
        if kind == "weights":
            expected += [new.cmp.k_weights, new.cmp.v_weights]
        if kind != "blocks":
            expected += [new.cmp.rotation]
        assert [id(x) for x in new.tensors()] == [id(x) for x in expected]
        rings = [] if kind == "blocks" else [new.cmp.k_tail, new.cmp.v_tail]
        assert [id(x) for x in new.rings()] == [id(x) for x in rings]


def double(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


BAD = [
    *(
        case
        for name, dim in (("k_slc", 8), ("v_slc", 6), ("k_win", 8), ("v_win", 6), ("cmp.k", 8), ("cmp.v", 6))
        for case in (
            ({name: None}, TypeError, rf"^new.{name}: expected a tensor, got NoneType$"),
            ({name: double(7, 9, 2, dim)}, ValueError, rf"^new.{name}: expected shape \[7, 10, 2, {dim}\]"),
            ({name: torch.zeros(7, 10, 2, dim)}, TypeError, rf"^new.{name}: expected dtype torch.float64 of "),
            ({name: double(7, 10, 2, dim).to("meta")}, ValueError, rf"^new.{name}: expected device cpu of "),
        )
    ),
    *(
        (change, error, f"^new.cmp.{message}")
        for name, dim in (("k_tail", 8), ("v_tail", 6))
        for change, error, message in (
            ({f"cmp.{name}": 3}, TypeError, rf"{name}: expected a tensor, got int$"),
            ({f"cmp.{name}": double(7, 16, 2, dim)}, ValueError, rf"{name}: expected a ring of at least 17 rows"),
            ({f"cmp.{name}": double(7, 17, 1, dim)}, ValueError, rf"{name}: expected shape \[7, 17, 2, {dim}\]"),
            ({f"cmp.{name}": torch.zeros(7, 17, 2, dim)}, TypeError, rf"{name}: expected dtype torch.float64 of"),
        )
    ),
    ({"cmp.v_tail": double(7, 18, 2, 6)}, ValueError, r"^new.cmp.v_tail: expected 20 rows of k_tail, got 18$"),
    *(
        case
        for name in ("k_weights", "v_weights")
        for case in (
            ({f"cmp.{name}": 3}, TypeError, rf"^new.cmp.{name}: expected a tensor or None, got int$"),
            ({f"cmp.{name}": double(2, 7)}, ValueError, rf"^new.cmp.{name}: expected floating \[2, 8\] on cpu, "),
            ({f"cmp.{name}": double(2, 8).int()}, ValueError, rf"^new.cmp.{name}: expected floating \[2, 8\] on cpu"),
        )
    ),
    ({"cmp.rotation": 3}, TypeError, r"^new.cmp.rotation: expected a tensor or None, got int$"),
    ({"cmp.rotation": torch.zeros(2, 32, 4)}, ValueError, r"^new.cmp.rotation: expected torch.float64 on cpu, "),
    (
        {"cmp.rotation": double(2, 31, 4)},
        ValueError,
        r"^new.cmp.rotation: expected shape \[2, blocks, 4\] of at least the 32 blocks .* room for, got \[2, 31, 4\]$",
    ),
    ({"cmp.rotation": double(2, 32, 8)}, ValueError, r"^new.cmp.rotation: expected shape \[2, blocks, 4\] of at "),
    ({"cmp.rotation": double(32, 4)}, ValueError, r"^new.cmp.rotation: expected shape \[2, blocks, 4\] of at "),
    ({"cmp": None}, TypeError, r"^new.cmp: expected PooledTokens or CompletedBlocks, got NoneType$"),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("change, error, message", BAD)
def test_rows_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str, run: str) -> None:
    make("weights", "halves").run(run)  # what was found right is remembered
    case = make("weights", "halves")
    new = case.arguments["new"]
    (name, value), *_ = change.items()
    inner = name.removeprefix("cmp.")
    bad = replace(new, cmp=replace(new.cmp, **{inner: value})) if inner != name else replace(new, **{name: value})
    with pytest.raises(error, match=message):
        case.run(run, new=bad)
    assert (case.arguments["k_cmp"].lengths == -7).all()  # nothing has happened


@pytest.mark.parametrize("run", RUNS)
def test_blocks_that_do_not_fit(run: str) -> None:
    make("blocks").run(run)
    case = make("blocks")
    new = case.arguments["new"]
    for name, dim in (("k", 8), ("v", 6)):
        bad = replace(new, cmp=replace(new.cmp, **{name: double(7, 2, 2, dim)}))
        with pytest.raises(ValueError, match=rf"^new.cmp.{name}: expected shape \[7, 3, 2, {dim}\], got \[7, 2, 2, "):
            case.run(run, new=bad)
    with pytest.raises(TypeError, match=r"^new: expected NewTokens or None, got CompletedBlocks$"):
        case.run(run, new=new.cmp)


@pytest.mark.parametrize("run", RUNS)
def test_an_odd_key_cannot_be_rotated(run: str) -> None:
    case = make("mean", dims=(7, 6))
    new = case.arguments["new"]
    case.run(run)
    bad = replace(new, cmp=replace(new.cmp, rotation=double(2, 32, 3)))
    with pytest.raises(ValueError, match=r"^new.cmp.rotation: expected None for keys of odd head_dim 7, got a tensor$"):
        case.run(run, new=bad)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["k_cmp", "k_slc", "k_win"])
def test_tables_without_room(name: str, run: str) -> None:
    case = make()
    kv = case.arguments[name]
    with pytest.raises(ValueError, match=rf"^{name}: expected lengths of at most the 16 rows in block_table, got "):
        case.run(run, **{name: replace(kv, block_table=kv.block_table[:, :1])})


def test_nothing_is_read_from_the_device() -> None:
    """On "meta" nothing could be."""
    for kind in KINDS:
        arguments = make(kind, "interleaved").arguments

        def to_meta(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to("meta")
            if isinstance(x, PagedKV | NewTokens | PooledTokens | CompletedBlocks):
                return type(x)(*(to_meta(value) for value in vars(x).values()))
            return x

        out, indices = BACKEND.decode_attention(**{name: to_meta(x) for name, x in arguments.items()})
        assert (out.shape, indices.shape) == ((7, 10, 4, 6), (7, 10, 2, 4))
