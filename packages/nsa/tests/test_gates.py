"""Are gates the sigmoid MLP of the input, one per token, head and branch?"""

from collections.abc import Callable

import torch
from nsa import NSAConfig
from nsa.gates import GateMLP


def test_is_its_formula(make_config: Callable[..., NSAConfig]) -> None:
    gates, x = GateMLP(make_config()).double(), torch.randn(5, 24, dtype=torch.float64)
    hidden = x @ gates.hidden.weight.T + gates.hidden.bias
    hidden = hidden / (1 + torch.exp(-hidden))
    expected = 1 / (1 + torch.exp(-(hidden @ gates.out.weight.T + gates.out.bias)))
    got = gates(x)
    assert got.shape == (5, 4, 3)
    # Column head * 3 + branch of the output layer; a few dozen fp64 roundings of values of order one.
    torch.testing.assert_close(got, expected.reshape(5, 4, 3), rtol=0, atol=1e-14)


def test_gate_hidden_size(make_config: Callable[..., NSAConfig]) -> None:
    assert GateMLP(make_config()).hidden.out_features == 24 // 4
    assert GateMLP(make_config(gate_hidden_size=5)).hidden.out_features == 5
    assert GateMLP(make_config(hidden_size=3)).hidden.out_features == 1


def test_tokens_heads_and_branches_are_independent(make_config: Callable[..., NSAConfig]) -> None:
    gates, x = GateMLP(make_config()).double(), torch.randn(5, 24, dtype=torch.float64)
    edited = x.clone()
    edited[3] += 1
    changed = (gates(x) != gates(edited)).flatten(1)
    assert changed[3].all()
    assert not changed[[0, 1, 2, 4]].any()
    before = gates(x)
    with torch.no_grad():
        gates.out.bias[2 * 3 + 1] += 1  # head 2, branch slc
    where = (before != gates(x)).nonzero()[:, 1:].unique(dim=0)
    assert where.tolist() == [[2, 1]]


def test_gradients(make_config: Callable[..., NSAConfig]) -> None:
    gates = GateMLP(make_config()).double()
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in gates.named_parameters()]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(gates, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *gates.parameters()), fast_mode=True)
