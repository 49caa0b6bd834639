"""Decode steps on a GPU at the sizes of real layers: the oracle's results, in graphs, without a wait, to the last bit.

A compiled signature serves many lengths: they are the device's.
"""

from collections.abc import Iterator

import pytest
import torch
from nsa_kernels_triton.backend import BACKEND
from nsa_varlen import BlockGeometry, NewTokens, PagedKV, PooledTokens
from nsa_varlen.decode_testing import DecodeCase, assert_equal, decode_case
from nsa_varlen.testing import assert_within_budget, poisoned_empty
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BLOCKS = BlockGeometry()
PAGE = 64
SHAPES = {
    "g16": (16, 1, 128, 128),
    "g4": (16, 4, 64, 64),
    "g1": (4, 4, 128, 128),
    "mla": (16, 1, 192, 128),
    "odd": (8, 2, 96, 80),
}
STREAMS = ("cmp", "slc", "win")


class Step:
    """A batch whose raw rows are there for good: every step reads the same pool, in which row p of b is a page's own.

    Compressed rows are the means of raw rows; the step's inputs are random. Nothing of it asks the device anything.
    """

    def __init__(
        self,
        batch: int,
        room: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        tokens: int = 1,
        device: str = "cuda",
        blocks: BlockGeometry = BLOCKS,
        seed: int = 0,
    ) -> None:
        heads, self.kv_heads, *dims = shape
        self.blocks, self.tokens, self.device, self.dtype = blocks, tokens, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self.most = {"cmp": max(1, blocks.num_compressed(room)), "slc": room, "win": room}
        self.raw = {}
        for side, dim in zip("kv", dims, strict=True):
            for name in ("slc", "win"):
                self.raw[f"{side}_{name}"] = self.random(batch, -(-room // PAGE) * PAGE, self.kv_heads, dim)
        self.raw |= {f"{side}_cmp": self.pooled(self.raw[f"{side}_slc"][:, :room]) for side in "kv"}
        self.q, self.q_cmp = (self.random(batch, tokens, heads, dims[0]) for _ in range(2))
        self.gates = self.random(batch, tokens, heads, 3).sigmoid()
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch, dtype=torch.int32, device=device)
        self.cmp_lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.tables = {}
        self.pages = {}
        for name in STREAMS:
            count = -(-self.most[name] // PAGE)
            order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(seed)).to(device)
            self.tables[name] = order.view(batch, count).int()
            for side in "kv":
                rows = self.raw[f"{side}_{name}"]
                rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, count * PAGE - rows.shape[1]))
                pages = torch.empty(batch * count, PAGE, *rows.shape[2:], device=device, dtype=dtype)
                pages[order] = rows.reshape(batch * count, PAGE, *rows.shape[2:])
                self.pages[f"{side}_{name}"] = pages

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def pooled(self, x: Tensor) -> Tensor:
        """Means of raw rows [B, T, H, D], in fp32, rounded once, of a page's multiple of blocks."""
        return x.float().unfold(1, self.blocks.kernel_size, self.blocks.kernel_stride).mean(-1).to(x.dtype)

    def set(self, lengths: list[int], counts: list[int] | None = None) -> None:
        """The step is at these lengths."""
        counts = [min(self.tokens, length) for length in lengths] if counts is None else counts
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.counts.copy_(torch.tensor(counts, dtype=torch.int32))
        self.cmp_lengths.copy_(torch.tensor([self.blocks.num_compressed(x) for x in lengths], dtype=torch.int32))

    def case(self, new: bool = False) -> DecodeCase:
        """The call. `new`: its tokens' rows are given, and the ring of those before, as they are at these lengths."""
        streams = {}
        for name in STREAMS:
            lengths = self.cmp_lengths if name == "cmp" else self.lengths
            for side in "kv":
                streams[f"{side}_{name}"] = PagedKV(self.pages[f"{side}_{name}"], self.tables[name], lengths)
        given = self.new() if new else None
        return DecodeCase(
            {"q": self.q, **streams, "gates": self.gates, "counts": self.counts}
            | {"blocks": self.blocks, "q_cmp": self.q_cmp, "new": given}
        )

    def newest(self, x: Tensor) -> Tensor:
        """The rows of the new tokens; of padding the sequence's first ones."""
        number = (self.lengths - self.counts).long()[:, None] + torch.arange(self.tokens, device=self.device)
        number = number.clamp(0, x.shape[1] - 1)
        return x[torch.arange(len(x), device=self.device)[:, None], number]

    def new(self) -> NewTokens:
        """Rows as `raw` has them. The compressed branch pools the rows of slc."""
        size = self.blocks.kernel_size - 1 + 8
        before = (self.lengths - self.counts).long()[:, None]
        slot = torch.arange(size, device=self.device)
        position = before - 1 - (before - 1 - slot) % size  # the last one before that lies in the slot
        sequence = torch.arange(len(before), device=self.device)[:, None]
        tails = [self.raw[f"{side}_slc"][sequence, position.clamp_min(0)] for side in "kv"]
        rows = [self.newest(self.raw[name]) for name in ("k_slc", "v_slc", "k_win", "v_win")]
        return NewTokens(*rows, PooledTokens(*rows[:2], *tails))


def exact_and_plain(step: Step, sequence: int, row: int, listed: Tensor) -> tuple[Tensor, Tensor]:
    """Of one token, (the result in fp64, what plain torch makes of it in its dtype): [Hq, Dv], at the chosen blocks."""
    blocks, position = step.blocks, int(step.lengths[sequence] - step.counts[sequence]) + row
    number = torch.arange(position + 1, device=step.device)
    chosen = torch.stack([torch.isin(number // blocks.block_size, x[x >= 0]) for x in listed])
    seen = {
        "cmp": torch.ones(1, blocks.num_compressed(position + 1), dtype=torch.bool, device=step.device),
        "slc": chosen,
        "win": (number > position - blocks.window_size)[None],
    }
    results = []
    for wide in (True, False):
        found = 0.0
        for i, (name, mask) in enumerate(seen.items()):
            q = (step.q_cmp if name == "cmp" else step.q)[sequence, row]
            k, v = (step.raw[f"{side}_{name}"][sequence, : mask.shape[1]] for side in "kv")
            gate = step.gates[sequence, row, :, i, None]
            if wide:
                q, k, v, gate = (x.double() for x in (q, k, v, gate))
            grouped = q.unflatten(0, (step.kv_heads, -1))
            logits = torch.einsum("hgd,shd->hgs", grouped, k) * q.shape[-1] ** -0.5
            weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1) if mask.shape[1] else logits
            found = found + gate * torch.einsum("hgs,shd->hgd", weights, v).flatten(0, 1)
        results.append(found)
    return results[0], results[1]


def check_choice(step: Step, sequence: int, row: int, listed: Tensor) -> None:
    """Ascending, as many as there are places for, forced ones among them, and no block that is left out beats one.

    By more than the arithmetic may be off: a score's relative error is bounded as in `selection_margin`.
    """
    blocks, position = step.blocks, int(step.lengths[sequence] - step.counts[sequence]) + row
    total, own = blocks.num_compressed(position + 1), position // blocks.block_size
    q = step.q_cmp[sequence, row].double().unflatten(0, (step.kv_heads, -1))
    k = step.raw["k_cmp"][sequence, :total].double()
    logits = torch.einsum("hgd,shd->hgs", q, k) * q.shape[-1] ** -0.5
    p = logits.softmax(-1).sum(1) if total else logits.sum(1)
    start = torch.arange(total, device=step.device) * blocks.kernel_stride
    block = torch.arange(own + 1, device=step.device)[:, None]
    ends = torch.minimum(start + blocks.kernel_size, (block + 1) * blocks.block_size)
    overlap = (ends - torch.maximum(start, block * blocks.block_size)).clamp_min(0) / blocks.kernel_stride
    scores = p @ overlap.double().T
    sizes = torch.einsum("hgd,shd->hgs", q.abs(), k.abs()) * q.shape[-1] ** -0.5
    relative = 2.0**-24 * (2 * (q.shape[-1] + 2) * float(sizes.amax() if total else 0) + total + 64)
    free = torch.arange(own + 1, device=step.device)
    free = (free >= blocks.init_blocks) & (free <= own - blocks.local_blocks)
    for head, chosen in enumerate(listed.tolist()):
        found = [x for x in chosen if x >= 0]
        assert found == sorted(set(found))
        assert chosen[len(found) :] == [-1] * (blocks.topk - len(found))
        assert len(found) == min(blocks.topk, own + 1)
        mine = torch.zeros(own + 1, dtype=torch.bool, device=step.device)
        mine[found] = True
        assert (mine | free).all()
        left = free & ~mine
        if left.any():
            assert scores[head][mine & free].min() >= scores[head][left].max() * (1 - 2 * relative)


def check(step: Step, case: DecodeCase, sequences: list[int]) -> tuple[Tensor, Tensor]:
    """Of these sequences every token, all of them against one budget."""
    with poisoned_empty():
        out, indices = case.run(BACKEND)
    exact, plain, got = [], [], []
    for sequence in sequences:
        for row in range(int(step.counts[sequence])):
            check_choice(step, sequence, row, indices[sequence, row])
            both = exact_and_plain(step, sequence, row, indices[sequence, row])
            exact.append(both[0])
            plain.append(both[1])
            got.append(out[sequence, row])
    assert_within_budget(torch.stack(got), torch.stack(plain), torch.stack(exact), "out")
    padding = torch.arange(step.tokens, device=step.device) >= step.counts[:, None]
    assert not out[padding].any()
    assert (indices[padding] == -1).all()
    return out, indices


def lengths_of(batch: int, room: int) -> list[int]:
    """Ragged: the longest, short ones, and those of between."""
    spread = [room - 977 * i for i in range(batch)]
    return [room, 7, room // 2 + 1, 1023, 1, *spread[1:]][:batch]


@pytest.mark.parametrize(
    "shape, dtype, batch, room",
    [
        *(("g16", "bfloat16", *sizes) for sizes in ((1, 8192), (8, 8192), (64, 8192), (1, 65_536), (8, 65_536))),
        *(("g4", "bfloat16", *sizes) for sizes in ((8, 8192), (1, 65_536))),
        *(("g1", "bfloat16", *sizes) for sizes in ((1, 8192), (64, 8192))),
        *((shape, "bfloat16", *sizes) for shape in ("mla", "odd") for sizes in ((1, 65_536), (8, 8192))),
        *((shape, "float16", 8, 8192) for shape in ("g16", "g1")),
    ],
)
def test_one_token(shape: str, dtype: str, batch: int, room: int) -> None:
    step = Step(batch, room, SHAPES[shape], getattr(torch, dtype))
    step.set([max(1, length) for length in lengths_of(batch, room)])
    check(step, step.case(), list(range(min(batch, 6))))


@pytest.mark.parametrize(
    "shape, tokens, batch, room",
    [("g16", 2, 1, 8192), ("g16", 8, 1, 65_536), ("g16", 4, 8, 8192), ("g4", 8, 8, 8192), ("g4", 3, 64, 2048)],
)
def test_several_tokens(shape: str, tokens: int, batch: int, room: int) -> None:
    """Ragged counts, one of them none."""
    step = Step(batch, room, SHAPES[shape], torch.bfloat16, tokens)
    lengths = [max(tokens, length) for length in lengths_of(batch, room)]
    step.set(lengths, [tokens, 0, 1, tokens - 1, *[tokens] * batch][:batch])
    check(step, step.case(), list(range(min(batch, 4))))


@pytest.mark.parametrize("batch, room", [(64, 2048), (1, 32_768), (8, 32_768), (64, 32_768)], ids=str)
def test_equal_scores_go_to_the_lower_index(batch: int, room: int) -> None:
    """Of 12 heads, whose probabilities must be summed in one order everywhere, in one chunk and in several."""
    step = Step(batch, room, (12, 1, 64, 64), torch.bfloat16)
    lengths = [max(1500, room - 321 * i) for i in range(batch)]
    step.set(lengths)
    _, indices = step.case().changed(q=step.q.zero_(), q_cmp=step.q_cmp.zero_()).run(BACKEND)
    own = (torch.tensor(lengths, device="cuda")[:, None] - 1) // BLOCKS.block_size
    slot = torch.arange(16, device="cuda")
    expected = torch.where(slot < 14, slot, own - 15 + slot)
    assert torch.equal(indices[:, 0, 0], expected.int())


@pytest.mark.parametrize(
    "tokens, dtype, new, rotated",
    [
        (1, "float32", "mean", None),
        (1, "bfloat16", "weights", "halves"),
        (1, "bfloat16", "blocks", None),
        (8, "bfloat16", "mean", "interleaved"),
        (8, "float32", "weights", "halves"),
        (8, "bfloat16", "blocks", None),
    ],
)
def test_what_is_stored(tokens: int, dtype: str, new: str, rotated: str | None) -> None:
    """Everything as sdpa stores it, and the oracle's result with it."""
    lengths = [32, 48, 64, 65, 127, 1040, 1041, 0, 2055, 9]
    counts = [min(length, tokens - i % 3 if tokens > 2 else tokens) for i, length in enumerate(lengths)]
    case = decode_case(
        *(lengths, counts, BLOCKS),
        **{
            "rows": tokens,
            "heads": 8,
            "kv_heads": 2,
            "head_dim": 64,
            "pages": (64, 64, 64),
            "dtype": getattr(torch, dtype),
        },
        **{"device": "cuda", "new": new, "rotated": rotated, "room": 2100},
    )
    case.check(BACKEND)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch, tokens, room", [(1, 1, 16_384), (8, 2, 16_384), (64, 1, 4096)], ids=str)
def test_a_graph_replays_every_step_bitwise(batch: int, tokens: int, room: int, no_waiting: None) -> None:
    """Over emissions, blocks and pages: lengths advance on the device, new rows come from pools there; nobody waits."""
    graphed, plain = (Step(batch, room, SHAPES["g16"], torch.bfloat16, tokens) for _ in range(2))
    first = [max(tokens, length - 200) for length in lengths_of(batch, room - 8)]
    cases = []
    for step in (graphed, plain):
        step.set(first)
        case = step.case(new=True)
        new = case["new"]
        cases.append(case)
        for name in ("k_slc", "v_slc", "k_win", "v_win", "k_cmp", "v_cmp"):
            step.pages[name][:] = torch.where(beyond(step, name), torch.nan, step.pages[name])
        assert new.cmp.k is new.k_slc

    def load(step: Step, case: DecodeCase) -> None:
        for name in ("k_slc", "v_slc", "k_win", "v_win"):
            getattr(case["new"], name).copy_(step.newest(step.raw[name]))

    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cases[0].run(BACKEND)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = cases[0].run(BACKEND)
    cases[1].run(BACKEND)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(90):
        for step, case in zip((graphed, plain), cases, strict=True):
            step.lengths += tokens
            load(step, case)
        expected = cases[1].run(BACKEND)
        graph.replay()
        for got, right in zip(found, expected, strict=True):
            torch._assert_async((got == right).all())
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for name in graphed.pages:
        assert_equal(name, graphed.pages[name], plain.pages[name])
    assert torch.equal(graphed.cmp_lengths, BLOCKS.num_compressed(graphed.lengths))
    check(plain, plain.case(), [0])  # what 90 steps have stored is what the raw rows say


def beyond(step: Step, name: str) -> Tensor:
    """Rows of pages that no token before the step has filled: bool, as the pages broadcast."""
    before = step.lengths - step.counts
    filled = BLOCKS.num_compressed(before) if "cmp" in name else before
    table = step.tables[name[2:]]
    row = torch.arange(table.shape[1] * PAGE, device=step.device).view(1, -1) >= filled[:, None]
    made = torch.empty(len(step.pages[name]), PAGE, dtype=torch.bool, device=step.device)
    made[table.flatten().long()] = row.view(-1, PAGE)
    return made[:, :, None, None]


@pytest.mark.parametrize("batch, tokens, room", [(1, 1, 16_384), (8, 2, 16_384), (64, 1, 4096)], ids=str)
def test_results_are_bitwise_the_same(batch: int, tokens: int, room: int) -> None:
    step = Step(batch, room, SHAPES["g16"], torch.bfloat16, tokens)
    step.set([max(tokens, length) for length in lengths_of(batch, room)])
    case = step.case(new=True)
    first = case.run(BACKEND)
    for _ in range(20):
        for got, x in zip(case.run(BACKEND), first, strict=True):
            assert torch.equal(got, x)


def test_each_sequence_is_as_alone_and_no_other_is_touched() -> None:
    """NaN in everybody else's pages and queries is nobody's business."""
    step = Step(8, 8192, SHAPES["g16"], torch.bfloat16)
    step.set(lengths_of(8, 8192))
    _, indices = check(step, step.case(), [2])
    mine = {name: set(table[2].tolist()) for name, table in step.tables.items()}
    for name, pages in step.pages.items():
        others = [page for page in range(len(pages)) if page not in mine[name[2:]]]
        pages[others] = torch.nan
    out, again = step.case().run(BACKEND)
    assert torch.equal(again[2], indices[2])
    assert out[2].isfinite().all()


def test_compiled_code_calls_it_as_it_stands() -> None:
    step = Step(8, 8192, SHAPES["g4"], torch.bfloat16)
    step.set(lengths_of(8, 8192))
    case = step.case()

    def double(q: Tensor) -> Tensor:
        return BACKEND.decode_attention(**(case.arguments | {"q": q * 2}))[0] * 2

    compiled = torch.compile(double)
    torch.testing.assert_close(compiled(step.q), double(step.q))
