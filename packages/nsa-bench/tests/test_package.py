"""What the package is before anybody measures."""

import subprocess
import sys
from importlib.metadata import distribution

import nsa_bench


def test_version_is_the_metadata_version() -> None:
    assert nsa_bench.__version__ == distribution("nsa-bench").version


def test_import_is_light() -> None:
    code = "import sys, nsa_bench; print(*{'triton', 'flash_attn', 'torch', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_command_is_an_entry_point() -> None:
    (point,) = distribution("nsa-bench").entry_points
    assert (point.group, point.name, point.value) == ("console_scripts", "nsa-bench", "nsa_bench.cli:app")


def test_the_command_needs_no_torch_to_start() -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom nsa_bench.cli import app\napp(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("nsa-bench "), done.stderr
