"""Does what surrounds a call (a default device, inference mode) leave what the call computes and keeps alone?"""

import runpy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from nsa_varlen import BlockGeometry, VarlenLayout, buckets, collate_tokens
from nsa_varlen.testing import BACKENDS, Inputs, Results, random_inputs, run_ops, to_pages
from torch import Tensor

BLOCKS = BlockGeometry(4, 2, 4, topk=4, window_size=7)
LENGTHS = [5, 3, 7, 30], [5, 3, 7, 41]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return BACKENDS[request.param]


def trained(backend: Any, inputs: Inputs, layout: VarlenLayout) -> tuple[Results, list[Tensor]]:
    leaves = inputs.leaves()
    results = run_ops(backend, leaves, layout, BLOCKS)
    results.out.sum().backward()
    return results, [x.grad for x in leaves]


def test_a_default_device_moves_nothing_that_the_host_computes(backend: Any) -> None:
    """Nothing can be read on the device "meta": a plan or an offset that landed there would raise."""
    found = []
    for surroundings in (nullcontext(), torch.device("meta")):
        with surroundings:
            layout = VarlenLayout.from_lengths(*LENGTHS)
            inputs = random_inputs(layout)
            results, grads = trained(backend, inputs, layout)
            parts = [layout.positions(), layout.compressed_starts(BLOCKS), *(x.k_rows for x in layout.buckets(BLOCKS))]
            parts += [part.q_rows for bucket in layout.buckets() for part in bucket.split(1)]
            pages = to_pages(inputs.k, LENGTHS[1], 4)
            parts += [pages.rows(layout.sequence_of_keys(), layout.key_positions())]
            batch = collate_tokens([[1, 2, 3], [], [4]])
            found.append([*results, *grads, *parts, batch["input_ids"], batch["labels"], batch["position_ids"]])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_default_device_moves_no_constant_of_an_import() -> None:
    with torch.device("meta"):
        assert runpy.run_path(buckets.__file__)["CLASS_ENDS"].device.type == "cpu"


@pytest.mark.parametrize("made_in", ["training", "inference"])
def test_a_layout_first_used_in_inference_mode_serves_in_training(backend: Any, made_in: str) -> None:
    layout = VarlenLayout.from_lengths(*LENGTHS)
    inputs = random_inputs(layout)
    _, expected = trained(backend, inputs, layout)
    with torch.inference_mode(made_in == "inference"):
        layout = VarlenLayout.from_lengths(*LENGTHS)
    with torch.inference_mode():
        run_ops(backend, inputs, layout, BLOCKS)
        assert torch.is_inference_mode_enabled()
    _, grads = trained(backend, inputs, layout)
    assert all(torch.equal(x, y) for x, y in zip(grads, expected, strict=True))


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["raw", "compressed"])
def test_buckets_first_used_in_inference_mode_serve_in_training(blocks: BlockGeometry | None) -> None:
    layout = VarlenLayout.from_lengths([5, 3, 7], [5, 3, 7])
    with torch.inference_mode():
        for bucket in layout.buckets(blocks):
            for rows in (bucket.queries, bucket.keys):
                rows.gather(torch.randn(15, 2))
                kept = [bucket.positions, rows.rows, *rows.real, rows.padding]
                assert not any(x.is_inference() for x in kept)
    x = torch.randn(15, 2, requires_grad=True)
    out = torch.zeros(15, 2)
    for bucket in layout.buckets(blocks):
        out = bucket.queries.scatter(bucket.queries.gather(x), out)
    out.sum().backward()
    seen = torch.cat([bucket.q_rows[bucket.q_rows >= 0] for bucket in layout.buckets(blocks)])
    assert torch.equal(x.grad[seen], torch.ones(len(seen), 2))


def test_what_a_layout_derives_records_no_gradients() -> None:
    layout, x = VarlenLayout.from_lengths([3]), torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not layout.derive("doubled", lambda: 2 * x).requires_grad
