"""What nsa-bench can time of this package, by the entry point `varlen` of `nsa.bench`.

`Workload` is what such an entry point offers, here and in the packages that build on this one.
"""

from nsa_varlen.benchmarks.workload import Workload

__all__ = ["Workload", "workloads"]


def workloads() -> list[Workload]:
    """Dense attention by torch, and the operations of backend sdpa."""
    from nsa_varlen.benchmarks import dense, operations

    return [*dense.workloads(), *operations.workloads()]
