"""Does a probe say what this machine is, whatever is broken on it, and without importing what it looks for?"""

import ctypes
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from nsa_routing import Environment, backends, probe


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these distributions, and no others, the installed ones; `requires` is what torch's metadata asks for."""

    def use(installed: dict[str, str], requires: tuple[str, ...] | None = ()) -> None:
        def version(name: str) -> str:
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", {"torch": requires}.get)

    return use


class Nvml:
    """The driver's library, which answers every call with `status`."""

    def __init__(self, status: int = 0, version: bytes = b"580.65.06") -> None:
        self.status, self.version = status, version

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlShutdown(self) -> int:
        return self.status

    def nvmlSystemGetDriverVersion(self, text: "ctypes.Array[ctypes.c_char]", size: int) -> int:
        assert size == 80, "NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE"
        text.value = self.version
        return self.status


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Two GPUs of this capability, device 1 the larger."""

    def use(*capability: int, hip: str | None = None, nvml: object | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        memory = {0: 24 << 30, 1: 80 << 30}
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=memory[index])
        )
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)  # on ROCm, MIOpen's
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml() if nvml is None else nvml)

    return use


def test_without_a_gpu(install: Callable, versions: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    install("sdpa", "fa2")
    versions({})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = probe()
    assert (found.device, found.sm, found.torch, found.triton) == ("cpu", None, torch.__version__, None)
    assert (found.flash_attn, found.backends, found.name) == (None, ("fa2", "sdpa"), None)
    assert (found.driver, found.triton_pin, found.cudnn, found.unknown) == (None, None, None, ())
    assert found.memory > 1 << 20, "in bytes"


@pytest.mark.parametrize("capability, sm", [((8, 0), 80), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((12, 1), 121)])
def test_with_a_gpu(capability: tuple[int, int], sm: int, install: Callable, versions: Callable, gpu: Callable) -> None:
    install("sdpa")
    versions({"triton": "3.7.1", "flash-attn": "2.8.3"}, ("filelock", "triton==3.7.1; platform_system == 'Linux'"))
    gpu(*capability)
    expected = ("cuda", sm, torch.__version__, "3.7.1", "2.8.3", ("sdpa",), "GPU 0", 24 << 30, "13.0", "580.65.06")
    assert probe() == Environment(*expected, triton_pin="3.7.1" if sys.platform == "linux" else None, cudnn=91900)


def test_of_several_gpus_one_is_described(install: Callable, gpu: Callable) -> None:
    install("sdpa")
    gpu(9, 0)
    assert (probe("cuda", 1).name, probe("cuda", 1).memory) == ("GPU 1", 80 << 30)


def test_a_named_device_is_described_whatever_else_is_there(install: Callable, gpu: Callable) -> None:
    install("sdpa")
    gpu(9, 0)
    found = probe("cpu")
    assert (found.device, found.sm, found.driver, found.cudnn) == ("cpu", None, None, None)
    other = probe("meta")
    assert (other.device, other.sm, other.memory, other.name, other.unknown) == ("meta", None, None, None, ())


def test_a_torch_without_cudnn(install: Callable, gpu: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    install("sdpa")
    gpu(9, 0)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert (probe().cudnn, probe().unknown) == (None, ())


def test_rocm_is_cuda_without_sm_driver_or_cudnn(install: Callable, gpu: Callable) -> None:
    install("sdpa")
    gpu(9, 4, hip="7.0")
    found = probe()
    assert (found.device, found.sm, found.driver, found.cuda, found.name) == ("cuda", None, None, None, "GPU 0")
    assert found.cudnn is None


@pytest.mark.parametrize("name", ["triton", "pytorch-triton", "triton-windows", "pytorch-triton-rocm"])
def test_triton_has_several_distributions(name: str, install: Callable, versions: Callable) -> None:
    install("sdpa")
    versions({name: "3.6.0"}, (f"{name}==3.6.0",))
    assert (probe("cpu").triton, probe("cpu").triton_pin) == ("3.6.0", "3.6.0")


@pytest.mark.parametrize(
    "requires, pin",
    [
        (None, None),
        ((), None),
        (("numpy>=2", "triton==3.5.0"), "3.5.0"),
        (("triton==3.5.0; python_version < '3'", "triton==3.7.1"), "3.7.1"),
        (("triton==3.5.0; extra == 'gpu'",), None),
        (("triton>=3.5",), None),
        (("not a requirement!", "triton==3.7.1"), "3.7.1"),
        (("tritonclient==2.0",), None),
    ],
)
def test_what_torch_pins(requires: tuple[str, ...] | None, pin: str | None, install: Callable, versions: Callable):
    install("sdpa")
    versions({}, requires)
    assert (probe("cpu").triton_pin, probe("cpu").unknown) == (pin, ())


def broken(*_: object, **__: object) -> object:
    raise ZeroDivisionError("broken")


# What may break: where, the facts that are then unknown, and the fields that fall back to None or ().
BREAKS = {
    "capability": (torch.cuda, "get_device_capability", ("sm",)),
    "name": (torch.cuda, "get_device_name", ("name",)),
    "properties": (torch.cuda, "get_device_properties", ("memory",)),
    "entry points": (backends, "entry_points", ("backends",)),
    "version": (importlib.metadata, "version", ("triton", "flash_attn")),
    "requires": (importlib.metadata, "requires", ("triton_pin",)),
    "nvml": (ctypes, "CDLL", ("driver",)),
    "cudnn": (torch.backends.cudnn, "version", ("cudnn",)),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_breaks_alone_is_unknown_alone(
    what: str, install: Callable, versions: Callable, gpu: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa")
    versions({"triton": "3.7.1", "flash-attn": "2.8.3"}, ("triton==3.7.1",))
    gpu(9, 0)
    whole = probe()
    assert whole.unknown == ()
    owner, attribute, names = BREAKS[what]
    monkeypatch.setattr(owner, attribute, broken)
    found = probe()
    assert found.unknown == tuple(f"{name}: ZeroDivisionError: broken" for name in names)
    for field in whole.__dataclass_fields__:
        if field in names:
            assert getattr(found, field) in (None, ())
        elif field != "unknown":
            assert getattr(found, field) == getattr(whole, field)


def test_a_broken_look_for_a_gpu_leaves_the_cpu(install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    install("sdpa")
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert (probe().device, probe().unknown) == ("cpu", ("device: ZeroDivisionError: broken",))


def test_everything_broken_at_once(
    install: Callable, versions: Callable, gpu: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa")
    versions({})
    gpu(9, 0)
    for owner, attribute, _ in BREAKS.values():
        monkeypatch.setattr(owner, attribute, broken)
    found = probe()
    names = ["sm", "triton", "flash_attn", "backends", "name", "memory", "driver", "triton_pin", "cudnn"]
    assert found.unknown == tuple(f"{name}: ZeroDivisionError: broken" for name in names)
    assert (found.device, found.sm, found.backends) == ("cuda", None, ())


def test_two_backends_with_one_name_are_told(offer: Callable, fake_point: type) -> None:
    offer(fake_point("sdpa", None, "first:BACKEND"), fake_point("sdpa", None, "second:BACKEND"))
    (reason,) = probe("cpu").unknown
    assert reason.startswith("backends: RuntimeError: backend sdpa: expected one distribution")


def test_a_driver_that_answers_with_an_error(install: Callable, gpu: Callable) -> None:
    install("sdpa")
    gpu(9, 0, nvml=Nvml(status=9))
    assert (probe().driver, probe().unknown) == (None, ("driver: OSError: NVML answered with status 9",))


def test_is_frozen_and_equal_by_value() -> None:
    made = Environment("cpu", None, "2.13.0", None, None, ("sdpa",))
    assert made == Environment("cpu", None, "2.13.0", None, None, ("sdpa",))
    assert hash(made) == hash(Environment("cpu", None, "2.13.0", None, None, ("sdpa",)))
    with pytest.raises(FrozenInstanceError):
        made.device = "cuda"


@pytest.mark.parametrize("code", ["import nsa_routing", "import nsa_routing; nsa_routing.probe()"])
def test_imports_nothing_heavy(code: str) -> None:
    """Neither triton and flash_attn nor, before someone asks for it, any backend."""
    code += "; import sys; print(*{'triton', 'flash_attn', 'nsa_varlen', 'nsa_fa2', 'nsa'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
