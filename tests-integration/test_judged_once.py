"""`nsa_attention` checks results without reading a tensor twice."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from nsa import nsa_attention
from nsa_varlen import BlockGeometry, VarlenLayout


def test_each_tensor_is_looked_at_once(install: Callable, flags: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    install("fast")
    flags(CHECK_FINITE="flag")
    seen: Counter[int] = Counter()
    norm = torch.linalg.vector_norm

    def noted(x: torch.Tensor, *args: object) -> torch.Tensor:
        seen[x.data_ptr()] += 1
        return norm(x, *args)

    monkeypatch.setattr(torch.linalg, "vector_norm", noted)
    layout, blocks = VarlenLayout.from_lengths([40]), BlockGeometry()
    q, k, k_cmp, gates = torch.randn(40, 4, 8), torch.randn(40, 2, 8), torch.randn(1, 2, 8), torch.rand(40, 4, 3)
    out = nsa_attention(q, k_cmp, k_cmp, k, k, k, k, gates, layout, blocks, backend="fast")
    assert set(seen.values()) == {1}
    assert {x.data_ptr() for x in (q, k, k_cmp, gates, out)} <= set(seen)
    assert len(seen) == 5 + 3, "and what the three branches returned"
