"""What this machine reaches at best: products of matrices, copies and sums. Floors are taken against these."""

from functools import cache

from nsa_bench.timing import Timing, sample

REPEATS = 7
SIDES = {"cuda": 8192, "cpu": 2048}  # of the matrices
MOVED = {"cuda": 2 << 30, "cpu": 256 << 20}  # bytes


@cache
def flops_per_second(device: str, dtype: str) -> float:
    """Floating-point operations a second of a square product in `dtype`, on normal numbers (zeros run faster)."""
    import torch

    side = SIDES[device]
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in "ab")
    return 2.0 * side**3 / _seconds(device, lambda: a @ b)


@cache
def bytes_per_second(device: str) -> float:
    """Bytes a second, the better of a copy, read and written ones both counted, and of a sum, which only reads."""
    import torch

    source = torch.ones(MOVED[device] // 4, device=device)
    target, size = torch.empty_like(source), 4.0 * len(source)
    return max(2 * size / _seconds(device, lambda: target.copy_(source)), size / _seconds(device, source.sum))


def _seconds(device: str, call: object) -> float:
    run, _ = sample("events" if device == "cuda" else "host", device, [call])  # type: ignore[list-item]
    run()
    return 1e-3 * Timing.of([run() for _ in range(REPEATS)]).median
