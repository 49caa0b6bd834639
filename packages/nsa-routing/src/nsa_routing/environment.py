"""What this machine is: the facts that a plan depends on."""

import importlib.metadata
from dataclasses import dataclass

import torch

from nsa_routing.backends import installed_backends


@dataclass(frozen=True)
class Environment:
    """A machine as the planner sees it; tests build their own.

    Fields:
        device: "cpu", "cuda", ...
        sm: compute capability as 10 * major + minor on CUDA, else None.
        torch, triton, flash_attn: installed versions, None where not installed.
        backends: names in the entry-point group `nsa.backends`.
    """

    device: str
    sm: int | None
    torch: str
    triton: str | None
    flash_attn: str | None
    backends: tuple[str, ...]


def probe() -> Environment:
    """This machine's environment. Imports neither triton nor flash_attn: their versions come from their metadata.

    Example:
        >>> "sdpa" in probe().backends or probe().backends == ()
        True
    """
    sm = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        sm = 10 * major + minor
    return Environment(
        device="cuda" if sm is not None else "cpu",
        sm=sm,
        torch=torch.__version__,
        triton=_version("triton"),
        flash_attn=_version("flash-attn"),
        backends=tuple(installed_backends()),
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
