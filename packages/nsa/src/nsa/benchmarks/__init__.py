"""What nsa-bench can time of this package, by the entry point `nsa` of `nsa.bench`."""

from nsa_varlen.benchmarks import Workload

__all__ = ["workloads"]


def workloads() -> list[Workload]:
    """Prefill, training and decode of the whole of Native Sparse Attention; what there is of others' kernels."""
    from nsa.benchmarks import decode, peers, prefill

    return [*prefill.workloads(), decode.workload(), *peers.workloads()]
