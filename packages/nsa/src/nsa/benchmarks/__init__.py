"""What nsa-bench can time of this package, by the entry point `nsa` of `nsa.bench`."""

from nsa_varlen.benchmarks import Workload

__all__ = ["workloads"]


def workloads() -> list[Workload]:
    """Prefill, training and decode of the whole of Native Sparse Attention."""
    from nsa.benchmarks import decode, prefill

    return [*prefill.workloads(), decode.workload()]
