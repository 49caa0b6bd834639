"""Does a probe say what this machine is, without importing what it looks for?"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from nsa_routing import Environment, environment, probe


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Make these distributions, and no others, the installed ones."""

    def use(installed: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(environment.importlib.metadata, "version", version)

    return use


def test_without_a_gpu(install: Callable, versions: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    install("sdpa", "fa2")
    versions({})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe() == Environment("cpu", None, torch.__version__, None, None, ("fa2", "sdpa"))


@pytest.mark.parametrize("capability, sm", [((8, 0), 80), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((12, 1), 121)])
def test_with_a_gpu(
    capability: tuple[int, int], sm: int, install: Callable, versions: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdpa")
    versions({"triton": "3.7.1", "flash-attn": "2.8.3"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert probe() == Environment("cuda", sm, torch.__version__, "3.7.1", "2.8.3", ("sdpa",))


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
