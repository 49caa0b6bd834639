"""`nsa_attention` looks at what its operations come to, and at each of them once something was not finite."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from nsa import nsa_attention
from nsa_routing import closed, poll
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor

OPERATIONS = ("compressed_attention", "selected_attention", "window_attention", "combine")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each tensor was looked at, by its address."""
    found: Counter[int] = Counter()
    norm = torch.linalg.vector_norm

    def noted(x: Tensor, *args: object) -> Tensor:
        found[x.data_ptr()] += 1
        return norm(x, *args)

    monkeypatch.setattr(torch.linalg, "vector_norm", noted)
    return found


def attend(q_value: float = 1.0, backend: str | None = "fast") -> tuple[Tensor, tuple[Tensor, ...]]:
    layout, blocks = VarlenLayout.from_lengths([40]), BlockGeometry()
    q, k, k_cmp, gates = torch.randn(40, 4, 8), torch.randn(40, 2, 8), torch.randn(1, 2, 8), torch.rand(40, 4, 3)
    q[-1] *= q_value
    return nsa_attention(q, k_cmp, k_cmp, k, k, k, k, gates, layout, blocks, backend=backend), (q, k, k_cmp, gates)


def test_one_look_while_all_is_well(install: Callable, flags: Callable, seen: Counter[int]) -> None:
    install("fast")
    flags(CHECK_FINITE="flag")
    out, _ = attend()
    assert seen == {out.data_ptr(): 1}
    assert poll() == frozenset()


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_operation_at_fault_is_found(op: str, install: Callable, delegate: type, flags: Callable) -> None:
    """Whichever it is, its NaN reaches the output; the next call finds out whose it was."""

    def spoil(result: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        out = result if isinstance(result, Tensor) else result[0]
        out[7, 3, 5] = torch.nan
        return result

    install(delegate("fast", **{op: spoil}))
    flags(CHECK_FINITE="flag")
    out, _ = attend()
    assert bool(out[7, 3, 5].isnan())
    assert poll() == frozenset()
    attend()
    assert poll() == {("fast", op, "cpu")}


@pytest.mark.parametrize("op", ["combine", "compressed_attention", "select_blocks"])
def test_one_guarded_operation_is_enough(op: str, install: Callable, flags: Callable, seen: Counter[int]) -> None:
    """The others run on the last resort, which nobody judges."""
    install("fast")
    flags(CHECK_FINITE="flag", BACKEND=f"{op}=fast")
    out, _ = attend(backend=None)
    assert seen == {out.data_ptr(): 1}
    assert poll() == frozenset()


def test_after_an_alarm_each_tensor_is_looked_at_once(install: Callable, flags: Callable, seen: Counter[int]) -> None:
    install("fast")
    flags(CHECK_FINITE="flag")
    attend(q_value=torch.nan)
    seen.clear()
    out, inputs = attend()
    assert set(seen.values()) == {1}
    assert {x.data_ptr() for x in (*inputs, out)} <= set(seen)
    assert len(seen) == 5 + 3, "and what the three branches returned"
    assert closed() == frozenset(), "the caller's NaN was nobody's fault"
