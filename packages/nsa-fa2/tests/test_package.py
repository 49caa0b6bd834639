"""nsa-fa2 holds its metadata so far: what can be wrong with that."""

import subprocess
import sys
from importlib.metadata import distribution

import nsa_fa2


def test_version_is_the_metadata_version() -> None:
    assert nsa_fa2.__version__ == distribution("nsa-fa2").version


def test_import_is_light() -> None:
    code = "import sys, nsa_fa2; print(*{'triton', 'flash_attn'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_entry_points_yet() -> None:
    assert list(distribution("nsa-fa2").entry_points) == []
