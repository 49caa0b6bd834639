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
