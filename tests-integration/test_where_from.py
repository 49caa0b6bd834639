"""Does this suite test what it says it tests: the checkout, or with --wheels what was built?"""

import importlib
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from built_packages import PACKAGES, ROOT


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_come_from_where_the_option_says(package: str, pytestconfig: pytest.Config) -> None:
    wheels = pytestconfig.getoption("--wheels") is not None
    module = importlib.import_module(package.replace("-", "_"))
    home = Path(str(module.__file__)).resolve()
    assert home.is_relative_to(ROOT) is not wheels
    first = Path(str(distribution(package).locate_file(""))).resolve()
    assert (home.parents[1] == first) is wheels  # its metadata too: entry points, versions
    code = f"import {module.__name__}; print({module.__name__}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).resolve() == home


def pytest_with(*words: str) -> subprocess.CompletedProcess[str]:
    """This file's first test, under other options."""
    test = f"{__file__}::{test_packages_come_from_where_the_option_says.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, test]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_the_option_takes_the_wheels_of_the_tree(processes: int) -> None:
    """Workers of pytest-xdist do not start with their parent's sys.path."""
    done = pytest_with("--wheels", "build", "-n", str(processes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


def test_the_option_wants_every_package(tmp_path: Path) -> None:
    done = pytest_with("--wheels", str(tmp_path), "-n", "0")
    assert done.returncode == 4
    assert "--wheels: expected one wheel each of ['nsa', " in done.stderr
