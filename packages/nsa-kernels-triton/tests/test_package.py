"""What is installed: the version, a backend to be found by name, and an import that stays light."""

import subprocess
import sys
from importlib.metadata import distribution

import nsa_kernels_triton
from nsa_kernels_triton.backend import BACKEND


def test_version_is_the_metadata_version() -> None:
    assert nsa_kernels_triton.__version__ == distribution("nsa-kernels-triton").version


def test_the_backend_is_found_by_name() -> None:
    found = distribution("nsa-kernels-triton").entry_points
    assert {point.group for point in found} == {"nsa.backends", "nsa.bench"}
    assert {point.name: point.load() for point in found.select(group="nsa.backends")} == {"triton": BACKEND}
    assert nsa_kernels_triton.BACKEND is BACKEND


def test_import_is_light() -> None:
    code = "import sys, nsa_kernels_triton; print(*{'triton', 'flash_attn'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
