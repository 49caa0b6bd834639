"""Is a decode step looked at once where nothing but values changes, and anew wherever anything else does?"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, CompletedBlocks, NewTokens, PagedKV, PooledTokens, arguments, decode_facts
from nsa_varlen.decode_facts import Checked

BLOCKS = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=12)


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    decode_facts._accepted.clear()
    yield
    decode_facts._accepted.clear()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which checks ran: of facts, of values."""
    found: list[str] = []
    for name in ("_check_decode", "_check_lengths"):
        run = getattr(arguments, name)

        def noted(*args: Any, name: str = name, run: Any = run, **kwargs: Any) -> None:
            found.append(name)
            run(*args, **kwargs)

        monkeypatch.setattr(arguments, name, noted)
    return found


def pages(length: int) -> tuple[PagedKV, PagedKV]:
    table, lengths = torch.zeros(2, 4, dtype=torch.int32), torch.full((2,), length, dtype=torch.int32)
    return tuple(PagedKV(torch.zeros(3, 16, 1, dim), table, lengths) for dim in (4, 6))


def case(kind: str = "pooled") -> list[Any]:
    """Arguments of `check_decode`: 20 tokens of each of two sequences, one of them new."""
    k, v = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 6)
    ring_k, ring_v = torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 6)
    cmp = PooledTokens(k, v, ring_k, ring_v, torch.ones(1, 8), None, torch.zeros(2, 64, 2))
    made: Any = CompletedBlocks(k, v) if kind == "completed" else cmp
    new = None if kind == "stored" else NewTokens(k, v, k, v, made)
    q, gates = torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 3)
    return [q, q, pages(4), pages(20), pages(20), gates, torch.ones(2, dtype=torch.int32), BLOCKS, new]


@pytest.mark.parametrize("kind", ["pooled", "completed", "stored"])
def test_equal_facts_are_looked_at_once_and_values_always(kind: str, looks: list[str]) -> None:
    accepted = arguments.check_decode(*case(kind))
    assert looks == ["_check_decode", "_check_lengths"]
    assert arguments.check_decode(*case(kind)) is accepted
    assert looks == ["_check_decode", "_check_lengths", "_check_lengths"]
    bad = case(kind)
    bad[6] = torch.full((2,), 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^counts: expected 0 to 1"):
        arguments.check_decode(*bad)


def changed(x: Any) -> list[Any]:
    """An argument's like with another shape, another dtype, on another device, of another type."""
    if isinstance(x, torch.Tensor):
        return [x[..., :0], x.double() if x.is_floating_point() else x.long(), x.to("meta"), x.numpy(), None]
    if isinstance(x, PagedKV):
        other = [replace(x, pages=y) for y in (x.pages[:, :, :0], x.pages.double(), x.pages[..., :1])]
        return [*other, replace(x, k_scale=torch.ones(1)), replace(x, v_scale=torch.ones(1)), x.pages]
    return [64, None]


@pytest.mark.parametrize("kind", ["pooled", "completed", "stored"])
def test_whatever_else_changes_is_looked_at(kind: str, looks: list[str]) -> None:
    good = case(kind)
    arguments.check_decode(*good)
    tried = []
    for i, x in enumerate(good[:8]):
        if isinstance(x, tuple):
            for side in range(2):
                tried += [[*good[:i], (y, x[1]) if side == 0 else (x[0], y), *good[i + 1 :]] for y in changed(x[side])]
        else:
            tried += [[*good[:i], y, *good[i + 1 :]] for y in changed(x)]
    new = good[8]
    if new is not None:
        inner = [
            replace(new, cmp=replace(new.cmp, **{n: y}))
            for n, x in vars(new.cmp).items()
            for y in changed(x)
            if isinstance(x, torch.Tensor)
        ]
        outer = [replace(new, **{n: y}) for n, x in vars(new).items() if n != "cmp" for y in changed(x)]
        tried += [[*good[:8], y] for y in (*inner, *outer, replace(new, cmp=None), 64)]
    for bad in tried:
        looks.clear()
        with suppress(TypeError, ValueError, AttributeError):
            arguments.check_decode(*bad)
        assert looks[:1] == ["_check_decode"]


def test_within_a_checked_call_the_same_objects_are_not_looked_at_and_others_are(looks: list[str]) -> None:
    good = case()
    accepted = arguments.check_decode(*good)
    flat = (*good[:2], *good[2], *good[3], *good[4], *good[5:])
    looks.clear()
    with Checked(flat, accepted):
        assert arguments.check_decode(*good) is accepted
        assert looks == []
        arguments.check_decode(*case())
        assert looks == ["_check_lengths"]
    arguments.check_decode(*good)
    assert looks == ["_check_lengths"] * 2


def test_no_tensor_is_kept_alive_and_not_more_is_remembered_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    good = case()
    arguments.check_decode(*good)
    alive = weakref.ref(good[0])
    del good
    gc.collect()
    assert alive() is None
    monkeypatch.setattr(decode_facts, "MOST_ACCEPTED", 2)
    for topk in (4, 5, 6, 7):
        arguments.check_decode(*[replace(BLOCKS, topk=topk) if x is BLOCKS else x for x in case()])
        assert len(decode_facts._accepted) <= 2
