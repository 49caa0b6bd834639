"""What a test of workloads needs: one run of all but the clocks, a problem that is tiny, a backend with a fault."""

from collections.abc import Callable
from typing import Any

import torch

from nsa_varlen.benchmarks.workload import Value

TINY: dict[str, Value] = {
    **{"S": 90, "batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32"},
    **{"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "topk": 4, "window_size": 20},
}


def tried(workload: Any, device: str = "cpu", seed: int = 0, **changes: Value) -> str:
    """What the check says of all calls, with parameters that differ from the workload's defaults; without gradients.

    Raises:
        AssertionError: a result is wrong, or the workload refuses.

    Example:
        >>> from nsa_varlen.benchmarks import workloads
        >>> dense = next(workload for workload in workloads() if workload.name == "dense.decode")
        >>> "off by" in tried(dense, S=20)
        True
    """
    parameters = {**workload.parameters, **changes}
    refused = workload.refuse(device, **parameters)
    assert refused is None, refused
    with torch.no_grad():
        state = workload.setup(device, seed, **parameters)
        return str(workload.check(state, [workload.call(state, index) for index in range(workload.calls)]))


class FaultyBackend:
    """Another backend, one of whose operations does something to its result.

    Args:
        spoil: of the operation's result, what is returned instead.
    """

    def __init__(self, backend: Any, op: str, spoil: Callable[[Any], Any]) -> None:
        self.backend, self.op, self.spoil = backend, op, spoil
        self.name = backend.name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.backend, name)
        return (lambda *args: self.spoil(found(*args))) if name == self.op else found


def off_by_a_little(result: Any) -> Any:
    """The last row of an output, the first of several, off by 1/4: too far for every dtype."""
    out = (result[0] if isinstance(result, tuple) else result).clone()
    out[-1] += 0.25
    return (out, *result[1:]) if isinstance(result, tuple) else out
