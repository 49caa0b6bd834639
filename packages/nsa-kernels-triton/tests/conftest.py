"""Where the kernels run: on a GPU, or interpreted on the CPU. Without either, their tests are skipped."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nsa_kernels_triton.contracts import interpreted
from nsa_kernels_triton.ops import spread


@pytest.fixture
def device() -> torch.device:
    """What tensors of a kernel's test live on."""
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    return torch.device("cuda")


@pytest.fixture(params=[100, spread.UNKNOWN], ids=["neighbours-agree", "nothing-known"])
def known_spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every call knows of neighbouring queries' lists: of selected attention it chooses the organisation."""
    monkeypatch.setattr(spread, "_known", {})
    monkeypatch.setattr(spread.Spread, "read", lambda self, num_slots: setattr(self, "percent", request.param))


@pytest.fixture(autouse=True)
def boolean_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted loads and stores refuse a mask that numpy has as integers, as `vector & scalar` is.

    Triton 3.9 does so itself. Earlier versions take it; so it is found with any.
    """
    if not interpreted():
        return
    from triton.runtime.interpreter import InterpreterBuilder

    def strict(method: Callable[..., object], mask_at: int) -> Callable[..., object]:
        def checked(self: InterpreterBuilder, *arguments: object, **others: object) -> object:
            mask = np.asarray(arguments[mask_at].data)
            if mask.dtype != np.bool_:
                raise TypeError(f"mask: expected bool, got {mask.dtype}")
            return method(self, *arguments, **others)

        return checked

    for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
        monkeypatch.setattr(InterpreterBuilder, name, strict(getattr(InterpreterBuilder, name), mask_at))
