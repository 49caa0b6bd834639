"""Does bench/triton_decode.py time valid steps, and right ones only? Does it count what they read?

What needs no GPU runs here, on sdpa. Scripts of bench/ find each other by name, and so do their tests find them.
"""

import argparse
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import triton_decode
from decoding import Sequences, check
from nsa_kernels_triton import configurations
from nsa_varlen import PagedKV
from nsa_varlen.sdpa import BACKEND
from torch import Tensor

LENGTHS = [1136, 1089, 700, 33]  # 70 blocks, the last of them new; a page's first row; 17 pages; a first block's next
SHAPES = {"g2": (4, 2), "g1": (2, 2)}

Spoil = Callable[[tuple[Any, ...], Tensor, Tensor], None]


@pytest.fixture(params=SHAPES)
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sequences:
    for name, heads in SHAPES.items():
        monkeypatch.setitem(cases.SHAPES, name, heads)
    return Sequences(request.param, LENGTHS, device="cpu")


@pytest.mark.parametrize("back", [0, 1])
def test_sequences_fit_a_step(made: Sequences, back: int) -> None:
    args, kwargs = made.arguments(back)
    out, indices = BACKEND.decode_attention(*args, **kwargs)
    assert out.shape == made.q.shape
    assert bool(out.isfinite().all())
    assert (indices[:, 0] >= 0).sum(-1)[:, 0].tolist() == [min(16, -(-(n - back) // 64)) for n in LENGTHS]
    k_cmp, k_slc, k_win = args[1], args[3], args[5]
    assert k_cmp.lengths.tolist() == [cases.BLOCKS.num_compressed(n - back) for n in LENGTHS]
    used = torch.cat([x.block_table.flatten() for x in (k_cmp, k_slc, k_win)])
    used = used[used >= 0]
    assert torch.equal(used.sort().values, torch.arange(len(made.k_pages), dtype=torch.int32))  # none belongs to two
    assert not torch.equal(used, used.sort().values)
    assert (k_win.block_table[0] >= 0).sum() < (k_slc.block_table[0] >= 0).sum()


@pytest.mark.parametrize("back", [0, 1])
def test_a_right_step_passes(made: Sequences, back: int) -> None:
    check(BACKEND.decode_attention, made, back, range(len(LENGTHS)))
    check(BACKEND.decode_attention, made, back, [3, 1])


def add(row: int | slice, how_much: float) -> Spoil:
    def spoil(args: tuple[Any, ...], out: Tensor, indices: Tensor) -> None:
        out[row] += how_much

    return spoil


def choose(sequence: int, *listed: int) -> Spoil:
    def spoil(args: tuple[Any, ...], out: Tensor, indices: Tensor) -> None:
        indices[sequence, 0, 0, : len(listed)] = torch.tensor(listed, dtype=torch.int32)

    return spoil


def another(args: tuple[Any, ...], out: Tensor, indices: Tensor) -> None:
    """Swap a chosen block of the longest sequence for one that was not; the list stays in order."""
    listed = indices[0, 0, 0].tolist()
    missing = next(block for block in range(1, 17) if block not in listed)
    indices[0, 0, 0] = torch.tensor(sorted([*listed[:1], missing, *listed[2:]]), dtype=torch.int32)


def row(stream: int, position: int) -> Spoil:
    """Zero a row of the first sequence."""

    def spoil(args: tuple[Any, ...], out: Tensor, indices: Tensor) -> None:
        kv: PagedKV = args[stream]
        kv.pages[kv.block_table[0, position // 64], position % 64] = 0

    return spoil


def lengths(args: tuple[Any, ...], out: Tensor, indices: Tensor) -> None:
    args[1].lengths.sub_(1)


LAST = LENGTHS[0] - 1
WRONG: dict[str, tuple[Spoil, str]] = {
    "out": (add(2, 0.05), "out of sequence 2"),
    "NaN": (add(1, torch.nan), "out of sequence 1"),
    "another block": (another, "block_indices of sequence 0"),
    "not ascending": (choose(2, 1, 0), "block_indices of sequence 2"),
    "not all of them": (choose(2, -1), "block_indices of sequence 2"),
    "no new row of k_slc": (row(3, LAST), "k_pages"),
    "no new row of v_slc": (row(4, LAST), "v_pages"),
    "no new row of k_win": (row(5, LAST), "k_pages"),
    "no new block": (row(1, 69), "k_pages"),
    "an old block": (row(2, 68), "v_pages"),
    "an old row": (row(3, 7), "k_pages"),
    "lengths": (lengths, "k_cmp.lengths"),
}


@pytest.mark.parametrize("made", ["g2"], indirect=True)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_step_gets_no_number(made: Sequences, wrong: str) -> None:
    spoil, message = WRONG[wrong]

    def step(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, indices = BACKEND.decode_attention(*args, **kwargs)
        spoil(args, out, indices)
        return out, indices

    with pytest.raises(AssertionError, match=message):
        check(step, made, 0, range(len(LENGTHS)))


@pytest.mark.parametrize("made", ["g2"], indirect=True)
@pytest.mark.parametrize("side", ["k_tail", "v_tail"])
def test_a_raw_row_must_be_kept(made: Sequences, side: str) -> None:
    def step(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = getattr(made, side).clone()
        found = BACKEND.decode_attention(*args, **kwargs)
        getattr(made, side).copy_(before)
        return found

    with pytest.raises(AssertionError, match=side):
        check(step, made, 1, range(len(LENGTHS)))


@pytest.mark.parametrize("made", ["g2"], indirect=True)
@pytest.mark.parametrize("times", [0.5, 1 + 2.0**-6])
def test_a_block_of_other_weights_is_wrong(made: Sequences, times: float) -> None:
    """Emitted by somebody who divides by another number, or rounds twice as far as bf16 does."""

    def step(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = BACKEND.decode_attention(*args, **kwargs)
        kv: PagedKV = args[1]
        kv.pages[kv.block_table[0, 1], 69 % 64] *= times
        return found

    with pytest.raises(AssertionError, match="k_pages"):
        check(step, made, 0, [0])


@pytest.mark.parametrize(
    "tokens, batch, once, twice",
    [
        # rows of K and V: 2 * 4095 + 2 * 1024 + 2 * 512, of 4 kv heads and 256 bytes; q and out: 2 * 64 heads
        (65_536, 8, 8 * 256 * (4 * 11_262 + 128), 8 * 256 * (4 * 15_357 + 128)),
        (65_536, 1, 256 * (4 * 11_262 + 128), 256 * (4 * 15_357 + 128)),
        (8_192, 64, 64 * 256 * (4 * 4_094 + 128), 64 * 256 * (4 * 4_605 + 128)),
        (131_072, 8, 8 * 256 * (4 * 19_454 + 128), 8 * 256 * (4 * 27_645 + 128)),
    ],
)
def test_bytes_of_a_step(tokens: int, batch: int, once: int, twice: int) -> None:
    assert triton_decode.step_bytes("g16", tokens, batch) == once
    assert triton_decode.step_bytes("g16", tokens, batch, 2) == twice


@pytest.mark.parametrize(
    "tokens, batch, once, twice",
    [(65_536, 8, 31, 42), (8_192, 64, 90, 101), (131_072, 8, 53, 76), (65_536, 1, 4, 5)],
)
def test_floors(tokens: int, batch: int, once: int, twice: int) -> None:
    found = [1e6 * triton_decode.step_bytes("g16", tokens, batch, reads) / cases.BANDWIDTH for reads in (1, 2)]
    assert [round(x) for x in found] == [once, twice]


def test_bytes_of_blocks_not_seen() -> None:
    """100 tokens: 5 compressed blocks, all 100 rows of 2 blocks, a window of 100; g1 has 16 heads of each kind."""
    assert triton_decode.step_bytes("g1", 100, 1) == 256 * (16 * (2 * 5 + 2 * 100 + 2 * 100) + 32)
    assert triton_decode.dense_bytes("g1", 100, 3) == 3 * 256 * (16 * 200 + 32)


def test_laps_do_not_fit_into_l2() -> None:
    for shape in cases.SHAPES:
        for tokens, batch in triton_decode.POINTS:
            size = triton_decode.step_bytes(shape, tokens, batch)
            assert triton_decode.copies(size) * size >= 150_000_000
            pages = triton_decode.copies(size) * batch * tokens * cases.SHAPES[shape][1] * 512
            dense = triton_decode.copies(triton_decode.dense_bytes(shape, tokens, batch))
            assert 1.2 * pages + dense * triton_decode.dense_bytes(shape, tokens, batch) < 45e9


def test_the_points_emit() -> None:
    blocks = cases.BLOCKS
    for tokens, _ in triton_decode.POINTS:
        emitted = [blocks.num_compressed(tokens - back) - blocks.num_compressed(tokens - back - 1) for back in (0, 1)]
        assert [triton_decode.EMISSIONS[x] for x in emitted] == [0, 1]


def test_the_table() -> None:
    taken: dict[triton_decode.Case, list[float]] = {
        ("nsa graph", 0): [60.0, 61.0, 62.0],
        ("nsa graph", 1): [92.0, 77.0, 78.0],
        ("slow dense", ""): [2000.0, 2000.0, 2000.0],
        ("fast dense", ""): [1240.0, 1239.0, 1241.0],
    }
    rows = [dict(zip(triton_decode.FIELDS, x, strict=True)) for x in triton_decode.table("g16", 65_536, 8, taken)]
    found = {(x["variant"], x["emission"]): x for x in rows}
    assert len(rows) == 5
    average = found["nsa graph", "avg"]
    assert [average[x] for x in ("median_us", "p25_us", "p75_us")] == ["62.0000", "62.0000", "62.5000"]
    assert average["ratio_to_dense"] == "0.0500"
    assert average["repeats"] == 3
    assert float(str(average["share_of_bandwidth"])) == pytest.approx(30.84 / 62, abs=1e-3)
    assert found["slow dense", ""]["ratio_to_dense"] == "1.6129"
    keys_and_values = 2 * 8 * 65_536 * 4 * 256
    assert float(str(found["fast dense", ""]["floor_us"])) == pytest.approx(1e6 * keys_and_values / 3e12, rel=1e-3)


def test_a_table_without_dense_variants() -> None:
    (row,) = triton_decode.table("g16", 65_536, 8, {("nsa graph", 0): [60.0, 61.0]})
    assert row[-1] == "nan"


def test_points_and_overrides() -> None:
    assert triton_decode.point("65536x8") == (65_536, 8)
    kernel, numbers = triton_decode.override("block_scores:keys=32,num_warps=2")
    assert (kernel, numbers) == ("block_scores", {"keys": 32, "num_warps": 2})
    assert kernel in configurations.table("sm90")


@pytest.mark.parametrize("text", ["nothing:keys=32", "block_scores:kyes=32", "block_scores", "block_scores:keys=many"])
def test_an_override_that_would_do_nothing(text: str) -> None:
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        triton_decode.override(text)
