"""From token lists to the layer: is a collated batch what the layer makes of each sequence alone?"""

from collections.abc import Callable

import torch
from nsa_varlen import collate_tokens
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

FP64 = {"rtol": 0, "atol": 1e-12}  # outputs of order ten, sums of at most 100 terms, a few matmuls deep
LENGTHS = [90, 1, 0, 8, 66]


def test_a_collated_batch_is_each_sequence_alone(make_layer: Callable, certify: Callable) -> None:
    """Outputs and the next-token loss, with a table of embeddings before the layer and its transpose after it."""
    layer, table = make_layer(), torch.randn(50, 24, dtype=torch.float64)
    ids = [torch.randint(50, (length,)) for length in LENGTHS]
    (batch,) = DataLoader(ids, batch_size=len(ids), collate_fn=collate_tokens)
    out = certify(layer, table[batch["input_ids"]], batch["layout"])
    with torch.no_grad():
        alone = [layer(table[x][None])[0] for x in ids]
    torch.testing.assert_close(out, torch.cat(alone), **FP64)
    assert torch.equal(batch["position_ids"], torch.cat([torch.arange(length) for length in LENGTHS]))
    packed = cross_entropy((out @ table.T)[:-1], batch["labels"][1:])
    terms = [cross_entropy(y[:-1] @ table.T, x[1:], reduction="none") for x, y in zip(ids, alone, strict=True)]
    # A logit is 24 products with an embedding below 5: 120 times an output's error. The loss moves twice that.
    torch.testing.assert_close(packed, torch.cat(terms).mean(), rtol=0, atol=2 * 120 * FP64["atol"])
