"""What a backend's `refuse` is asked with where no routing is there: a machine, and a problem."""

import importlib.metadata
from collections.abc import Mapping
from types import SimpleNamespace

import torch

from nsa_varlen.benchmarks.workload import Value

TRITONS = ("triton", "pytorch-triton", "triton-windows", "pytorch-triton-rocm")  # distributions that hold triton
DTYPES = ("float16", "bfloat16", "float32", "float64")


def environment(device: str) -> SimpleNamespace:
    """The facts of this machine that backends judge by, named as `nsa_routing.Environment` names them.

    Neither triton nor flash_attn is imported for them.

    Example:
        >>> machine = environment("cpu")
        >>> machine.device, machine.sm, machine.torch == torch.__version__
        ('cpu', None, True)
    """
    nvidia = device == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if nvidia else (0, 0)
    return SimpleNamespace(
        device=device,
        sm=10 * major + minor if nvidia else None,
        torch=torch.__version__,
        triton=installed(*TRITONS),
        flash_attn=installed("flash-attn"),
        cudnn=torch.backends.cudnn.version() if nvidia else None,
    )


def installed(*distributions: str) -> str | None:
    """The version of the first of some distributions that is installed; None if none is."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def problem(device: str, parameters: Mapping[str, Value], **facts: object) -> SimpleNamespace:
    """A call on sequences of one length, named as `nsa_routing.Problem` names it.

    Args:
        parameters: num_heads, num_kv_heads, head_dim, dtype, and of `BlockGeometry` what there is.
        facts: what else there is to say: needs_grad, paged.

    Raises:
        ValueError: a dtype that is none of DTYPES.
    """
    if parameters["dtype"] not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {parameters['dtype']!r}")
    listing = ("block_size", "topk", "init_blocks", "local_blocks")
    sizes = {name: parameters[name] for name in listing if name in parameters}
    return SimpleNamespace(
        device=device,
        dtype=getattr(torch, str(parameters["dtype"])),
        head_dim=parameters["head_dim"],
        v_head_dim=parameters["head_dim"],
        group_size=int(parameters["num_heads"]) // max(1, int(parameters["num_kv_heads"])),
        uniform=True,
        **(sizes | facts),
    )
