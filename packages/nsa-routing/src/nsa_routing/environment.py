"""What this machine is: the facts that a plan depends on."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from packaging.requirements import InvalidRequirement, Requirement

from nsa_routing.backends import installed_backends

TRITONS = ("triton", "pytorch-triton", "triton-windows", "pytorch-triton-rocm")  # distributions that hold triton

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Environment:
    """A machine as the planner sees it; tests build their own.

    Fields:
        device: "cpu", "cuda", ...
        sm: compute capability as 10 * major + minor on NVIDIA devices, else None.
        torch, triton, flash_attn: installed versions, None where not installed.
        backends: names in the entry-point group `nsa.backends`.
        name: what the device calls itself.
        memory: of the device, in bytes.
        cuda: the CUDA version that torch was built for.
        driver: the NVIDIA driver's version.
        triton_pin: the Triton version that torch's metadata requires, None where it requires none.
        cudnn: the cuDNN that torch has loaded, as cuDNN counts its versions (91900 is 9.19.0); None off NVIDIA devices.
        unknown: facts that could not be found out, each with its reason.

    Example:
        >>> Environment("cuda", 90, "2.11.0", "3.6.0", None, ("sdpa",)).memory is None
        True
    """

    device: str
    sm: int | None
    torch: str
    triton: str | None
    flash_attn: str | None
    backends: tuple[str, ...]
    name: str | None = None
    memory: int | None = None
    cuda: str | None = None
    driver: str | None = None
    triton_pin: str | None = None
    cudnn: int | None = None
    unknown: tuple[str, ...] = ()


def probe(device: str | None = None, index: int = 0) -> Environment:
    """This machine's environment. Never raises, and imports neither triton nor flash_attn: metadata tells.

    Args:
        device: "cpu", "cuda", ...; None is "cuda" where torch has one, else "cpu".
        index: which of the devices of that kind.

    Example:
        >>> "sdpa" in probe().backends or probe().backends == ()
        True
    """
    unknown: list[str] = []

    def fact(name: str, find: Callable[[], Fact], otherwise: Fact) -> Fact:
        try:
            return find()
        # A broken driver, broken metadata: whatever it is, a machine that cannot tell must still be described.
        except Exception as error:  # noqa: BLE001
            unknown.append(f"{name}: {type(error).__name__}: {error}")
            return otherwise

    if device is None:
        device = "cuda" if fact("device", torch.cuda.is_available, False) else "cpu"
    nvidia = device == "cuda" and torch.version.hip is None
    return Environment(
        device=device,
        sm=fact("sm", lambda: _sm(index), None) if nvidia else None,
        torch=torch.__version__,
        triton=fact("triton", lambda: _version(*TRITONS), None),
        flash_attn=fact("flash_attn", lambda: _version("flash-attn"), None),
        backends=fact("backends", lambda: tuple(installed_backends()), ())
        or fact("backends", lambda: tuple(installed_backends(strict=False)), ()),  # those that one offers alone
        name=fact("name", lambda: torch.cuda.get_device_name(index), None) if device == "cuda" else None,
        memory=fact("memory", lambda: _memory(device, index), None),
        cuda=torch.version.cuda,
        driver=fact("driver", _driver, None) if nvidia else None,
        triton_pin=fact("triton_pin", _triton_pin, None),
        cudnn=fact("cudnn", torch.backends.cudnn.version, None) if nvidia else None,
        unknown=tuple(dict.fromkeys(unknown)),
    )


def cudnn_words(number: int) -> str:
    """A version of cuDNN as people write it.

    Example:
        >>> cudnn_words(91900), cudnn_words(8902)
        ('9.19.0', '8.9.2')
    """
    major = 10_000 if number >= 90_000 else 1_000  # cuDNN 9 made room for more minor versions
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _sm(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _memory(device: str, index: int) -> int | None:
    if device == "cuda":
        return torch.cuda.get_device_properties(index).total_memory
    if device == "cpu":
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _triton_pin() -> str | None:
    for line in importlib.metadata.requires("torch") or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # what torch's metadata says about other packages is not ours to judge
        if requirement.name in TRITONS and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            for specifier in requirement.specifier:
                if specifier.operator == "==":
                    return specifier.version
    return None


def _driver() -> str:
    """From NVML, which the driver installs; torch has no word for it."""
    import ctypes
    import sys

    nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    text = ctypes.create_string_buffer(80)
    for status in (nvml.nvmlInit_v2(), nvml.nvmlSystemGetDriverVersion(text, len(text)), nvml.nvmlShutdown()):
        if status:
            raise OSError(f"NVML answered with status {status}")
    return text.value.decode()
