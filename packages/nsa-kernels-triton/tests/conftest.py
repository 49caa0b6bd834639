"""Where the kernels run: on a GPU, or interpreted on the CPU. Without either, their tests are skipped."""

import pytest
import torch
from nsa_kernels_triton.contracts import interpreted


@pytest.fixture
def device() -> torch.device:
    """What tensors of a kernel's test live on."""
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    return torch.device("cuda")
