"""The model that the tests share."""

from typing import Any

import pytest
import smollm2
import torch


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    """(model, tokenizer) of the real weights."""
    torch.set_num_threads(1)  # threads that wait for a busy core cost more than they bring
    return smollm2.load()
