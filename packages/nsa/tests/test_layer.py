"""Is the layer its formula, causal, blind to how a batch is laid out, and trainable in every parameter?"""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from nsa import NSAAttention
from nsa.config import COMPRESSIONS
from nsa_varlen import VarlenLayout, pack, reference, unpack
from torch import Tensor
from torch.nn import functional as F

FP64 = {"rtol": 0, "atol": 1e-12}  # outputs of order ten, sums of at most 100 terms, a few matmuls deep


def rotate(x: Tensor, positions: Tensor, layer: NSAAttention) -> Tensor:
    """Pairs as complex numbers; frequencies are those of the layer, which test_rope.py checks."""
    if layer.rope is None or not len(x):
        return x
    pairs = x.unflatten(-1, (-1, 2)) if layer.config.rope_interleaved else x.unflatten(-1, (2, -1)).mT
    turn = layer.rope.attention_factor * torch.exp(1j * positions.double()[:, None, None] * layer.rope.frequency)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return turned.flatten(-2) if layer.config.rope_interleaved else turned.mT.flatten(-2)


def by_hand(layer: NSAAttention, x: Tensor) -> Tensor:
    """One sequence x [S, hidden] through the formulas, with the oracle for each branch."""
    config, layout = layer.config, VarlenLayout.from_lengths([len(x)])
    blocks, positions = config.blocks, torch.arange(len(x))

    def linear(projection: torch.nn.Linear) -> Tensor:
        return x @ projection.weight.T + (0 if projection.bias is None else projection.bias)

    q = linear(layer.q_proj).view(len(x), config.num_heads, config.head_dim)
    keys, values = (
        [
            part.view(len(x), config.num_kv_heads, dim)
            for part in linear(projection).split(config.num_kv_heads * dim, -1)
        ]
        for projection, dim in ((layer.k_proj, config.head_dim), (layer.v_proj, config.value_dim))
    )
    if config.shared_kv:
        keys, values = keys * 3, values * 3
    starts = torch.arange(blocks.num_compressed(len(x))) * config.kernel_stride
    k_cmp = rotate(keys[0], positions, layer) if config.rope_cmp == "before" else keys[0]
    k_cmp, v_cmp = layer.compress_k(k_cmp, layout, blocks), layer.compress_v(values[0], layout, blocks)
    k_cmp = rotate(k_cmp, starts, layer) if config.rope_cmp == "after" else k_cmp
    turned = rotate(q, positions, layer)
    q_cmp = q if config.rope_cmp == "none" else turned
    o_cmp, lse = reference.compressed_attention(q_cmp, k_cmp, v_cmp, layout, blocks)
    indices = reference.select_blocks(q_cmp, k_cmp, lse, layout, blocks)
    k_slc, k_win = rotate(keys[1], positions, layer), rotate(keys[2], positions, layer)
    o_slc, _ = reference.selected_attention(turned, k_slc, values[1], indices, layout, blocks)
    o_win, _ = reference.window_attention(turned, k_win, values[2], layout, blocks)
    gates = layer.gates(x)
    out = sum(gates[..., c, None] * o for c, o in enumerate((o_cmp, o_slc, o_win)))
    return out.flatten(1) @ layer.o_proj.weight.T


def test_is_its_formula(variant: dict, make_layer: Callable, certify: Callable) -> None:
    layer, lengths = make_layer(**variant), [90, 7, 0, 33]
    x = torch.randn(sum(lengths), 24, dtype=torch.float64)
    out = certify(layer, x, VarlenLayout.from_lengths(lengths))
    with torch.no_grad():
        expected = torch.cat([by_hand(layer, part) for part in x.split(lengths) if len(part)])
    torch.testing.assert_close(out, expected, **FP64)


# Tokens at and around the edges of compressed blocks (8/4), selection blocks (16) and the window (12).
EDITED = (0, 3, 7, 8, 15, 16, 31, 47, 64, 71, 79)


@torch.no_grad()
def test_editing_a_token_changes_nothing_before_it(variant: dict, make_layer: Callable) -> None:
    layer, x = make_layer(**variant), torch.randn(1, 80, 24, dtype=torch.float64)
    before = layer(x)
    for t in EDITED:
        edited = x.clone()
        edited[0, t] = 10 * torch.randn(24, dtype=torch.float64)
        change = (layer(edited) - before)[0].abs().amax(-1)
        assert (change[:t] < 1e-12).all(), f"token {t} is seen before it"
        assert change[t] > 1e-3, f"token {t} does not see itself"


@torch.no_grad()
def test_a_far_change_is_carried_forward(make_layer: Callable) -> None:
    """Token 3 of 80 reaches the last query, far outside its window, as a compressed and as an initial block."""
    layer, x = make_layer(), torch.randn(1, 80, 24, dtype=torch.float64)
    edited = x.clone()
    edited[0, 3] += 1
    assert (layer(edited) - layer(x))[0, -1].abs().max() > 1e-6


@pytest.mark.parametrize("kind", COMPRESSIONS)
@torch.no_grad()
def test_sequences_of_a_batch_do_not_meet(kind: str, make_layer: Callable) -> None:
    layer, lengths = make_layer(compression=kind), [70, 1, 0, 9, 66]
    layout, x = VarlenLayout.from_lengths(lengths), torch.randn(146, 24, dtype=torch.float64)
    before = layer(x, layout=layout).split(lengths)
    for sequence in (0, 1, 3, 4):
        parts = list(x.split(lengths))
        parts[sequence] = parts[sequence] + 1
        after = layer(torch.cat(parts), layout=layout).split(lengths)
        changed = [bool(len(a)) and (a - b).abs().max().item() > 1e-12 for a, b in zip(after, before, strict=True)]
        assert changed == [other == sequence for other in range(5)]


def test_a_ragged_batch_is_each_sequence_alone(variant: dict, make_layer: Callable, certify: Callable) -> None:
    layer, lengths = make_layer(**variant), [90, 1, 0, 8, 66]
    x = torch.randn(sum(lengths), 24, dtype=torch.float64)
    out = certify(layer, x, VarlenLayout.from_lengths(lengths)).split(lengths)
    for part, rows in zip(x.split(lengths), out, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(layer(part[None])[0], rows, **FP64)


def padding(kind: str) -> Tensor:
    """True where a token is real: sequences of 70, 9, 0 and 66 tokens in 80 places."""
    mask = torch.zeros(4, 80, dtype=torch.bool)
    for row, length in zip(mask, (70, 9, 0, 66), strict=True):
        places = {
            "left": torch.arange(80 - length, 80),
            "right": torch.arange(length),
            "interior": torch.randperm(80)[:length],
        }[kind]
        row[places] = True
    return mask


@pytest.mark.parametrize("kind", ["left", "right", "interior"])
def test_a_padded_batch_is_the_packed_one(kind: str, make_layer: Callable, certify: Callable) -> None:
    layer, mask = make_layer(), padding(kind)
    x = torch.randn(4, 80, 24, dtype=torch.float64)
    x[~mask] = torch.nan  # padding is never read
    packed, layout, pad_index = pack(x, mask)
    expected = unpack(certify(layer, packed, layout), pad_index)
    with torch.no_grad():
        out = layer(x, padding_mask=mask)
    assert torch.equal(out, expected)
    assert (out[~mask] == 0).all()


@torch.no_grad()
def test_a_full_batch_is_the_packed_one(make_layer: Callable) -> None:
    layer, x = make_layer(), torch.randn(3, 70, 24, dtype=torch.float64)
    expected = layer(x.flatten(0, 1), layout=VarlenLayout.from_lengths([70] * 3)).unflatten(0, (3, 70))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x, padding_mask=torch.ones(3, 70, dtype=torch.bool)), expected)


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24), (0, 0, 24)])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_no_tokens_give_no_rows(kind: str, shape: tuple, make_layer: Callable) -> None:
    layer, x = make_layer(compression=kind), torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


def name_of(variant: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in variant.items())


PARAMETERS = [
    {"compression": kind, "shared_kv": shared, "bias": True} for kind in COMPRESSIONS for shared in (False, True)
]


@pytest.mark.parametrize("variant", PARAMETERS, ids=name_of)
def test_every_entry_of_every_parameter_gets_a_gradient(variant: dict, make_layer: Callable) -> None:
    layer, x = make_layer(**variant), torch.randn(1, 90, 24, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in layer.named_parameters():
        silent = (parameter.grad == 0).sum().item()
        assert silent == 0, f"{name}: {silent} of {parameter.numel()} entries got no gradient"
    assert (x.grad != 0).all()


@pytest.mark.parametrize("variant", PARAMETERS, ids=name_of)
@torch.no_grad()
def test_every_parameter_changes_the_output(variant: dict, make_layer: Callable) -> None:
    layer, x = make_layer(**variant), torch.randn(1, 90, 24, dtype=torch.float64)
    before = layer(x)
    for name, parameter in layer.named_parameters():
        old = parameter.clone()
        parameter.add_(0.1 * torch.randn_like(parameter))
        assert (layer(x) - before).abs().max() > 1e-6, f"{name} does not matter"
        parameter.copy_(old)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    "variant", [{"compression": "mlp"}, {"compression": "weighted_pool", "shared_kv": True}], ids=name_of
)
def test_gradients_of_a_tiny_layer(variant: dict, make_layer: Callable, certify: Callable) -> None:
    """gradcheck in fp64; its steps of 1e-6 move no score by the margin that `certify` and the gap here leave."""
    sizes = {"hidden_size": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 2, "v_head_dim": 3, "kernel_size": 2}
    sizes |= {"kernel_stride": 1, "block_size": 2, "topk": 2, "local_blocks": 1, "window_size": 2, "init_blocks": 0}
    layer = make_layer(**sizes, compression_hidden_size=3, **variant)
    x, layout = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), VarlenLayout.from_lengths([6, 3])
    certify(layer, x, layout)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"layout": layout})

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


@torch.no_grad()
def test_a_checkpoint_restores_the_layer(make_layer: Callable) -> None:
    for kind in COMPRESSIONS:
        layer, x = make_layer(compression=kind), torch.randn(1, 70, 24, dtype=torch.float64)
        torch.manual_seed(9)
        other = NSAAttention(layer.config).double()
        assert not torch.equal(other(x), layer(x))
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_copies_give_the_same_and_share_nothing(
    duplicate: Callable[[NSAAttention], NSAAttention], make_layer: Callable
) -> None:
    layer, x = make_layer(compression="mlp"), torch.randn(1, 70, 24, dtype=torch.float64)
    again = duplicate(layer)
    assert again.config == layer.config
    assert torch.equal(again(x), layer(x))
    for parameter in again.parameters():
        parameter.zero_()
    assert layer(x).abs().max() > 0


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_runs_in_lower_precision(kind: str, dtype: torch.dtype, make_layer: Callable) -> None:
    """50 tokens are 4 blocks, so all are selected and only rounding separates the dtypes."""
    layer, x = make_layer(compression=kind), torch.randn(2, 50, 24, dtype=torch.float64)
    exact = layer(x).detach()
    x = x.to(dtype).requires_grad_()
    out = layer.to(dtype)(x)
    assert out.dtype == dtype
    # A projection (24 terms), a softmax, a weighted sum, a gate and a projection (24 terms) in `dtype`, logits below 30
    # in magnitude whose rounding the softmax turns into a relative error: the RMS stays within 30 units of the values'.
    error = (out.double() - exact).square().mean().sqrt()
    assert error < 30 * torch.finfo(dtype).eps * exact.square().mean().sqrt()
    out.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == dtype


@pytest.mark.parametrize("variant", PARAMETERS, ids=name_of)
def test_runs_under_autocast(variant: dict, make_layer: Callable) -> None:
    """As the layer converted to bfloat16, up to bfloat16; parameters and their gradients stay fp32."""
    layer, x = make_layer(**variant), torch.randn(2, 50, 24, dtype=torch.float64)
    exact = layer(x).detach()
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    error = (out.double() - exact).square().mean().sqrt()
    assert error < 30 * torch.finfo(torch.bfloat16).eps * exact.square().mean().sqrt()  # as above
    F.mse_loss(out.float(), torch.zeros_like(x)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_a_layer_made_on_meta_comes_alive(make_config: Callable) -> None:
    """As large models are loaded: no memory at first, then empty parameters, then a checkpoint."""
    torch.manual_seed(1)
    layer, x = NSAAttention(make_config()), torch.randn(1, 70, 24)
    with torch.device("meta"):
        ghost = NSAAttention(make_config())
    ghost = ghost.to_empty(device="cpu")
    ghost.load_state_dict(layer.state_dict())
    assert torch.equal(ghost(x), layer(x))


@torch.no_grad()
def test_the_same_input_gives_the_same_output(make_layer: Callable) -> None:
    layer, x = make_layer(), torch.randn(2, 90, 24, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x))
