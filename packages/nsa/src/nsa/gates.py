"""How much each branch contributes to each head (Eq. 5)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa.config import NSAConfig


class GateMLP(nn.Module):
    """gates = sigmoid(W2 silu(W1 x + b1) + b2), one per token, head and branch.

    Example:
        >>> config = NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
        >>> GateMLP(config)(torch.randn(5, 64)).shape
        torch.Size([5, 4, 3])
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        hidden = max(1, config.hidden_size // 4) if config.gate_hidden_size is None else config.gate_hidden_size
        self.hidden = nn.Linear(config.hidden_size, hidden)
        self.out = nn.Linear(hidden, config.num_heads * 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden_size] -> gates [T, Hq, 3] in the order cmp, slc, win."""
        return torch.sigmoid(self.out(F.silu(self.hidden(x)))).unflatten(-1, (-1, 3))
