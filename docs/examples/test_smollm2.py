"""Does the swapped attention compute what it claims? With the real weights: `hatch run demo:test`."""

import needle
import pytest
import smollm2
import torch
from nsa_varlen import BlockGeometry
from torch import Tensor

LENGTH = 400


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokens(loaded) -> Tensor:
    ids = loaded[1](needle.GAP.join(needle.paragraphs(["statistics"]))).input_ids
    assert len(ids) > LENGTH
    return torch.tensor(ids[:LENGTH])


@pytest.fixture(scope="module")
def own_logits(model, tokens) -> Tensor:
    """What transformers' own attention computes."""
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        logits = model(tokens.unsqueeze(0)).logits[0]
    model.set_attn_implementation("nsa_example")
    return logits


@torch.inference_mode()
def run(model, tokens: Tensor, attention: smollm2.Attention, *ends: int) -> Tensor:
    """Logits of all tokens, computed in calls that stop at `ends`."""
    pieces = zip((0, *ends), (*ends, len(tokens)), strict=True)
    return torch.cat([smollm2.forward(model, tokens[a:b], a, attention) for a, b in pieces])


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for fp32 rounding (6e-8) that 30 layers amplify: 2e-6 of the largest logit was measured."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5 * expected.abs().max().item())


def test_dense_equals_transformers(model, tokens, own_logits):
    close(run(model, tokens, smollm2.DenseAttention(model.config, LENGTH), 150, 151), own_logits)


def test_selecting_every_block_equals_dense(model, tokens, own_logits):
    everything = BlockGeometry(topk=-(-LENGTH // 64))
    close(run(model, tokens, smollm2.SelectedAttention(model.config, LENGTH, everything)), own_logits)


def test_selecting_some_blocks_differs_from_dense(model, tokens, own_logits):
    some = smollm2.SelectedAttention(model.config, LENGTH, BlockGeometry(topk=4))
    assert (run(model, tokens, some) - own_logits).abs().max() > 0.1


def test_chunks_and_decode_equal_one_prefill(model, tokens):
    whole, parts = (smollm2.SelectedAttention(model.config, LENGTH, BlockGeometry(topk=4)) for _ in range(2))
    expected = run(model, tokens, whole)
    # A chunk shorter than a compressed block, ends that cut blocks, then one token at a time.
    close(run(model, tokens, parts, 10, 40, 200, *range(361, LENGTH)), expected)
    for calls, (indices,) in zip(parts.selected, whole.selected, strict=True):
        assert torch.equal(torch.cat(calls), indices)
