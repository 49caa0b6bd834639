"""What nsa-bench can time of this package, by the entry point `triton` of `nsa.bench`."""

from nsa_varlen.benchmarks import Workload


def workloads() -> list[Workload]:
    """The operations of backend triton: `triton.select_blocks` and so on."""
    from nsa_varlen.benchmarks.operations import op_workloads

    from nsa_kernels_triton.backend import BACKEND

    return op_workloads(BACKEND, dtype="bfloat16")
