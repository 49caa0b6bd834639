"""Does a profile show the operations by name while ranges are asked for, and not otherwise?"""

from collections.abc import Callable

import pytest
import torch
from nsa import observe, ops, profiler_ranges
from torch.profiler import ProfilerActivity, profile


def names(run: Callable[[], object]) -> set[str]:
    """The ranges of this family that a profile of `run` holds."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return {event.name for event in found.events() if event.name.startswith("nsa::")}


PREFILL = {
    *("compress_mean", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "combine"),
}


@torch.no_grad()
def test_a_profile_names_the_operations(make_layer: Callable, make_cache: Callable) -> None:
    layer = make_layer()
    cache = make_cache(layer.config)
    x = torch.randn(1, 40, 24, dtype=torch.float64)

    def step() -> None:
        cache.reserve(1)
        layer.decode(x[:, :1], cache)
        cache.advance(1)

    assert names(lambda: (layer(x), step())) == set()
    with observe(layer):
        assert names(lambda: (layer(x), step())) == set()
    with observe(layer, ranges=True):
        assert names(lambda: layer(x)) == {f"nsa::{op}" for op in PREFILL}
        assert names(step) == {"nsa::decode_attention"}
    assert names(lambda: (layer(x), step())) == set()


def test_every_operation_is_a_range() -> None:
    for op in ops.__all__:
        assert getattr(ops, op).__wrapped__.__name__ == op


def test_two_who_ask(make_layer: Callable) -> None:
    """The first to leave takes no ranges from the other."""
    one, other = observe(make_layer(), ranges=True), observe(make_layer(), ranges=True)
    ones = torch.ones(2, 1, 3, dtype=torch.float64)

    def combine() -> None:
        ops.combine(ones, ones, ones, ones)

    one.close()
    one.close()
    assert names(combine) == {"nsa::combine"}
    other.close()
    assert names(combine) == set()


def test_a_range_ends_with_an_exception() -> None:
    @profiler_ranges.ranged
    def fail() -> None:
        raise ZeroDivisionError

    profiler_ranges.switch_on()
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert names(lambda: ops.combine(*[torch.ones(2, 1, 3)] * 4)) == {"nsa::combine"}
    finally:
        profiler_ranges.switch_off()
