"""Rows as an H100 would give them, from a model of a decode step: nothing here was measured."""

import random
from collections.abc import Callable, Sequence

import pytest
from nsa_bench.schema import Row

LENGTHS = (8192, 16384, 32768, 65536, 131072)
BANDWIDTH, PEAK = 2.9e12, 7.9e14
HEADS, KV_HEADS, DIM, CALLS = 64, 4, 128, 16
KERNEL, STRIDE, BLOCK, TOPK, WINDOW = 32, 16, 64, 16, 512

Rows = Callable[..., list[Row]]


def compressed(S: int) -> int:
    return 0 if S < KERNEL else (S - KERNEL) // STRIDE + 1


def budget(S: int) -> int:
    return compressed(S) + TOPK * BLOCK + min(WINDOW, S)


def counted(S: int) -> int:
    blocks = -(-S // BLOCK)
    return compressed(S) + (min(TOPK, blocks) - 1) * BLOCK + (S - 1) % BLOCK + 1 + min(WINDOW, S)


def sampled(ms: float, noise: float, source: random.Random, repeats: int) -> dict[str, float | int]:
    samples = sorted(source.gauss(ms, ms * noise) for _ in range(repeats))
    return {
        "ms_total": samples[repeats // 2],
        "p25_ms": samples[repeats // 4],
        "p75_ms": samples[3 * repeats // 4],
        "repeats": repeats,
    }


def decode_rows(
    lengths: Sequence[int] = LENGTHS,
    *,
    batches: Sequence[int] = (8,),
    clocks: Sequence[str] = ("graph",),
    backends: Sequence[str] = ("triton",),
    anchors: Sequence[str] = ("cudnn", "flash-attn"),
    time: Callable[[int], float] | None = None,
    slower: float = 1.0,
    noise: float = 0.01,
    seed: int = 0,
    repeats: int = 41,
    commit: str = "1f0c2ab94d",
    date: str = "2026-11-29T10:00:00",
) -> list[Row]:
    """Decode steps beside dense ones.

    Args:
        time: ms of a step of nsa.decode at S, instead of the model's.
        slower: what every time of nsa.decode is multiplied by.
    """
    source = random.Random(seed)
    rows = []
    for batch in batches:
        for S in lengths:
            for clock in clocks:
                ran = [("nsa.decode", backend) for backend in backends] + [("dense.decode", name) for name in anchors]
                for workload, backend in ran:
                    keys = counted(S) if workload == "nsa.decode" else S
                    moved = batch * KV_HEADS * DIM * 4.0 * keys
                    flops = batch * HEADS * DIM * 4.0 * keys
                    floor = max(moved / BANDWIDTH, flops / PEAK) * 1e3
                    launch = {"graph": 0.004, "host": 0.06}.get(clock, 0.01)
                    kind = {"triton": 1.5, "sdpa": 30, "cudnn": 1.05, "flash-attn": 1.12}.get(backend, 1.3)
                    ms = floor * kind + launch
                    facts = {}
                    if workload == "nsa.decode":
                        ms = (time(S) if time else ms) * slower
                        sums = batch * CALLS * KV_HEADS
                        facts = {
                            "reads_actual_decode": sums * counted(S),
                            "reads_expected_decode": sums * budget(S),
                            "ms_cmp": ms * 0.5 * compressed(S) / keys,
                            "ms_slc_win": ms * 0.8 * (keys - compressed(S)) / keys,
                            "ms_combine": 0.002,
                        }
                    rows.append(
                        Row(
                            S=S,
                            **facts,
                            **sampled(ms, noise, source, repeats),
                            calls=CALLS,
                            suite="bench_decode",
                            workload=workload,
                            clock=clock,
                            batch=batch,
                            num_heads=HEADS,
                            num_kv_heads=KV_HEADS,
                            head_dim=DIM,
                            v_head_dim=DIM,
                            dtype="bfloat16",
                            parameters=f"backend={backend}",
                            backend=backend,
                            why="asked for",
                            flops=flops,
                            bytes=moved,
                            ceiling_flops=PEAK,
                            ceiling_bandwidth=BANDWIDTH,
                            floor_ms=floor,
                            device="NVIDIA H100 80GB HBM3",
                            python="3.11.9",
                            torch="2.11.0+cu130",
                            triton="3.6.0",
                            flash_attn="2.8.3.post2",
                            cudnn="91900",
                            packages="nsa 0.1.0",
                            commit=commit,
                            date=date,
                        )
                    )
    return rows


@pytest.fixture
def measured() -> Rows:
    """`decode_rows`."""
    return decode_rows
