"""What a measurement ran on: device, versions, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FAMILY = ("nsa", "nsa-varlen", "nsa-routing", "nsa-kernels-triton", "nsa-fa2", "nsa-bench")


class MachineError(RuntimeError):
    """A device that is not there."""


def find_device(device: str | None = None) -> str:
    """`device` if it is there; None is "cuda" where torch has one, else "cpu".

    Raises:
        MachineError: torch is not installed, or has no CUDA device.
        ValueError: another word.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MachineError("expected torch to be installed: the packages that offer workloads bring it") from error
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise MachineError("device: expected cuda, but torch finds no CUDA device")
    return device or ("cuda" if there else "cpu")


def provenance(device: str, commit: str | None = None) -> dict[str, str]:
    """The columns of `nsa_bench.schema.PROVENANCE` on this machine.

    Args:
        commit: what to call the code; None asks git about the current folder.
    """
    import torch

    cudnn = torch.backends.cudnn.version() if device == "cuda" else None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash_attn": _version("flash-attn"),
        "cudnn": "" if cudnn is None else str(cudnn),
        "packages": " ".join(f"{name}={_version(name)}" for name in FAMILY if _version(name)),
        "commit": head() if commit is None else commit,
        "flags": " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NSA_")),
    }


def cpu_name() -> str:
    """The processor's name and how many threads torch uses, e.g. "AMD EPYC, 2 threads"."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = next(filter(None, [*names, platform.processor(), platform.machine()]), "CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def head() -> str:
    """The commit of the current folder's repository, "+" behind it where files differ; "" outside of one."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
