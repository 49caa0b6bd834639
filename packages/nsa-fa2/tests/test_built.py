"""Is a flash-attn that does not compute found out, whatever it leaves in its output?"""

from contextlib import nullcontext

import pytest
import torch
from nsa_fa2.providers.built import _memory_apart, computes
from nsa_fa2.testing import PlainKernel
from torch import Tensor

CPU = torch.device("cpu")
DIMS = [8, 32, 40, 64, 128, 256]


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    return PlainKernel().forward(q, k, v, None, scale=scale, causal=True, window=window)[0].to(q.dtype)


def blind_to_windows(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    return plain(q, k, v, scale, None)


def nothing(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """The memory of a tensor that was freed: here one that was right for a single key."""
    return v.repeat_interleave(q.shape[2] // v.shape[2], 2)


def beyond_the_row(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """A kernel of twice the head dim, which takes the next row's numbers for its own."""
    wide = [torch.cat((x, x.roll(-1, 2) if x.shape[2] > 1 else x.roll(-1, 1)), -1) for x in (q, k, v)]
    return plain(*wide, scale, window)[..., : q.shape[-1]]


def parts_upon_each_other(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """A kernel that is right as long as it does not split the keys."""
    return plain(q, *(x[:, -256:] for x in (k, v)), scale, window)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    return torch.full_like(q, torch.nan)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", DIMS)
def test_what_computes_passes(dim: int, dtype: torch.dtype, windowed: bool) -> None:
    assert computes(plain, dim, dtype, CPU, windowed=windowed)


WRONG = [nothing, beyond_the_row, parts_upon_each_other, not_a_number]


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("run", WRONG, ids=lambda run: run.__name__)
@pytest.mark.parametrize("dim", DIMS)
def test_what_does_not_compute_is_found_out(run: object, dim: int, windowed: bool) -> None:
    assert not computes(run, dim, torch.bfloat16, CPU, windowed=windowed)  # type: ignore[arg-type]


def test_windows_are_asked_about_by_themselves() -> None:
    assert computes(blind_to_windows, 64, torch.bfloat16, CPU, windowed=False)
    assert not computes(blind_to_windows, 64, torch.bfloat16, CPU, windowed=True)


def test_the_process_has_its_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    computes(plain, 32, torch.float16, CPU, windowed=True)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(("allocator", "made"), [("native", 1), ("cudaMallocAsync", 0), ("pluggable", 0)])
def test_pools_are_made_where_the_allocator_has_them(
    allocator: str, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cudaMallocAsync raises where one is made, which would fail every call of flash-attn."""
    pools: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: pools.append(1), raising=False)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool, device: nullcontext(), raising=False)
    with _memory_apart(torch.device("cuda", 0)):
        pass
    assert len(pools) == made
