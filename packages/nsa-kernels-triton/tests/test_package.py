"""nsa-kernels-triton holds its metadata so far: what can be wrong with that."""

import subprocess
import sys
from importlib.metadata import distribution

import nsa_kernels_triton


def test_version_is_the_metadata_version() -> None:
    assert nsa_kernels_triton.__version__ == distribution("nsa-kernels-triton").version


def test_import_is_light() -> None:
    code = "import sys, nsa_kernels_triton; print(*{'triton', 'flash_attn'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_entry_points_yet() -> None:
    assert list(distribution("nsa-kernels-triton").entry_points) == []
