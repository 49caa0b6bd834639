"""Does packing drop the padding, wherever it lies, and unpacking put it back, gradients included?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_varlen import VarlenLayout, pack, unpack


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.integers(0, 4), st.integers(0, 6), st.data())
def test_packing_keeps_the_real_tokens_in_order_and_unpacking_undoes_it(
    batch: int, length: int, data: st.DataObject
) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    mask = torch.tensor(bits, dtype=torch.bool).reshape(batch, length)
    x = torch.arange(1.0, batch * length * 2 + 1).reshape(batch, length, 2)
    packed, layout, pad_index = pack(x, mask)
    real = [(b, s) for b in range(batch) for s in range(length) if mask[b, s]]
    assert packed.tolist() == [x[b, s].tolist() for b, s in real]
    assert layout.cu_seqlens_q.diff().tolist() == [sum(b == row for b, _ in real) for row in range(batch)]
    for b in range(batch):
        for s in range(length):
            assert int(pad_index[b, s]) == (real.index((b, s)) if mask[b, s] else -1)
    assert torch.equal(unpack(packed, pad_index), x * mask[..., None])


@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_given_numbers_change_nothing(side: str) -> None:
    rows = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0], "interior": [1, 0, 1, 0, 1]}[side]
    mask = torch.tensor([rows, [1] * 5, [0] * 5], dtype=torch.bool)
    x = torch.randn(3, 5, 2)
    packed, layout, pad_index = pack(x, mask, max_seqlen=5, total=8)
    assert torch.equal(packed, x[mask])
    assert layout.cu_seqlens_q.tolist() == [0, 3, 8, 8]
    assert torch.equal(pad_index, pack(x, mask)[2])
    with pytest.raises(ValueError, match=r"expected the last offset to be total_q=9, got 8"):
        pack(x, mask, max_seqlen=5, total=9)


def test_with_both_numbers_given_nothing_is_read() -> None:
    """On the device "meta" there is nothing to read: what works there synchronises nowhere."""
    x, mask = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, dtype=torch.bool, device="meta")
    packed, layout, pad_index = pack(x, mask, max_seqlen=3, total=5)
    assert (packed.shape, layout.total_q, pad_index.shape) == ((5, 4), 5, (2, 3))
    assert unpack(packed, pad_index).shape == x.shape
    with pytest.raises(NotImplementedError, match="meta"):
        pack(x, mask, max_seqlen=3)


@pytest.mark.parametrize("real", [True, False], ids=["some-real", "all-padding"])
def test_gradients_reach_real_tokens_alone(real: bool) -> None:
    mask = torch.tensor([[False, real, real], [real, False, real]])
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    packed, _, pad_index = pack(x, mask)
    padded = unpack(packed, pad_index)
    (padded * torch.arange(1.0, 4.0)[:, None]).sum().backward()
    assert torch.equal(x.grad, (mask * torch.arange(1.0, 4.0))[..., None].expand_as(x).double())


@pytest.mark.parametrize(("real", "padding"), [(3, 1000), (1000, 3), (1, 7)])
def test_the_gradient_adds_padding_to_no_row_in_particular(real: int, padding: int) -> None:
    """Thousands of rows of padding added to one row go one after another on a GPU, although each adds 0."""
    mask = torch.arange(real + padding) >= padding
    x = torch.randn(1, real + padding, 2, dtype=torch.float64)
    packed, _, pad_index = pack(x, mask[None])
    packed.requires_grad_()
    padded = unpack(packed, pad_index)
    nodes, indices = [padded.grad_fn], []
    while nodes:
        node = nodes.pop()
        indices += [node._saved_index] if hasattr(node, "_saved_index") else getattr(node, "_saved_indices", ())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    (index,) = indices
    times = index.flatten().bincount(minlength=real)
    assert int(times.max()) <= 1 + -(-padding // real)
    direction = torch.randn_like(padded)
    direction[0, :padding] = torch.nan  # of padding, no gradient is asked
    padded.backward(direction)
    assert torch.equal(packed.grad, direction[0, padding:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("real", [True, False], ids=["some-real", "all-padding"])
def test_unpacking_takes_any_dtype(dtype: torch.dtype, real: bool) -> None:
    mask = torch.tensor([[False, real, real], [real, False, real]])
    x = torch.ones(2, 3, 4).to(dtype)
    packed, _, pad_index = pack(x, mask)
    padded = unpack(packed, pad_index)
    assert padded.dtype == dtype
    assert torch.equal(padded, x * mask[..., None].to(dtype))


def test_unpacking_keeps_trailing_dimensions_and_dtype() -> None:
    packed, _, pad_index = pack(torch.ones(2, 3, 4, 5, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bool))
    assert packed.shape == (6, 4, 5)
    assert unpack(packed, pad_index).shape == (2, 3, 4, 5)
    assert unpack(packed, pad_index).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), TypeError, r"mask: expected a bool tensor \[B, S\], got torch\.float32"),
        (torch.ones(2, 3), [[True]], TypeError, r"mask: expected a bool tensor \[B, S\], got list"),
        (torch.ones(2, 3), torch.ones(2, dtype=torch.bool), ValueError, r"mask: expected shape \[B, S\], got \[2\]"),
        (
            torch.ones(2, 3, 5),
            torch.ones(2, 4, dtype=torch.bool),
            ValueError,
            r"mask: expected shape \[2, 3\].*got \[2, 4\]",
        ),
        (
            torch.ones(2, 3, device="meta"),
            torch.ones(2, 3, dtype=torch.bool),
            ValueError,
            r"mask: expected device meta of x, got cpu",
        ),
    ],
)
def test_pack_refuses(x: torch.Tensor, mask: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(x, mask)


def test_unpack_refuses() -> None:
    with pytest.raises(TypeError, match=r"pad_index: expected dtype torch\.int64, got torch\.int32"):
        unpack(torch.ones(2, 3), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"pad_index: expected shape \[B, S\], got \[2\]"):
        unpack(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    for pad_index, kind in ((5, "int"), (VarlenLayout.from_lengths([2]), "VarlenLayout")):
        with pytest.raises(TypeError, match=rf"^pad_index: expected a tensor, got {kind}$"):
            unpack(torch.ones(2, 3), pad_index)
    with pytest.raises(TypeError, match=r"^packed: expected a tensor, got list$"):
        unpack([[1.0]], torch.zeros(1, 1, dtype=torch.int64))
