"""Are pins a file that pip reads, and is it the profile's?"""

import subprocess
import sys
from pathlib import Path

import pytest
from nsa_routing import OPS, Profile, load_profile
from nsa_routing.pins import constraints
from nsa_routing.profile import SHIPPED
from packaging.requirements import Requirement

NAMES = sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def made(**pins: str) -> Profile:
    order = dict.fromkeys(OPS, ("sdpa",))
    return Profile(name="made", source="A test,\nnothing else.", order=order, pins=pins)


def pip_takes(path: Path) -> bool:
    """Whether pip resolves a package that is installed anyway under these constraints."""
    command = ["pip", "install", "--quiet", "--dry-run", "--no-index", "--constraint", str(path), "packaging"]
    return subprocess.run([sys.executable, "-m", *command], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_each_line_is_a_requirement_of_the_profile(name: str) -> None:
    profile = load_profile(name)
    comment, *lines = constraints(profile).splitlines()
    assert comment == f"# profile {name}: {profile.source}"
    read = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {one.name: str(one.specifier) for one in read} == dict(profile.pins)
    assert [one.name for one in read] == sorted(profile.pins)


def test_without_pins_it_says_so() -> None:
    assert constraints(made()) == "# profile made: A test, nothing else.\n# It pins no packages.\n"


def test_pip_takes_the_file(tmp_path: Path) -> None:
    pins = {"nsa-kernels-triton": "==0.1.*", "nsa-fa2": "", "packaging": ">=1,!=2"}
    for number, profile in enumerate((load_profile("cpu"), made(**pins))):
        path = tmp_path / f"{number}.txt"
        path.write_text(constraints(profile))
        assert pip_takes(path), path.read_text()
    path = tmp_path / "refused.txt"
    path.write_text(constraints(made(packaging="<1")))
    assert not pip_takes(path), "pip did not read the constraints"
