"""What the six packages say of themselves, read from the wheels and sdists that the tree builds.

The editable installation is no witness: it keeps the metadata of the day it was made.
"""

import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from built_packages import PACKAGES, ROOT, Built, build, only
from packaging.requirements import Requirement

ENTRY_POINTS = {  # the others have none
    "nsa-varlen": {
        ("nsa.backends", "sdpa", "nsa_varlen.sdpa:BACKEND"),
        ("nsa.op_inputs", "varlen", "nsa_varlen.op_inputs:op_inputs"),
        ("nsa.bench", "varlen", "nsa_varlen.benchmarks:workloads"),
    },
    "nsa": {("nsa.bench", "nsa", "nsa.benchmarks:workloads")},
    "nsa-bench": {("console_scripts", "nsa-bench", "nsa_bench.cli:app")},
    "nsa-routing": {("console_scripts", "nsa-routing", "nsa_routing.cli:app")},
    "nsa-fa2": {
        ("nsa.backends", "fa2", "nsa_fa2:FA2"),
        ("nsa.backends", "fa2-torch", "nsa_fa2:FA2_TORCH"),
        ("nsa.backends", "cudnn", "nsa_fa2:CUDNN"),
        ("nsa.bench", "fa2", "nsa_fa2.benchmarks:workloads"),
    },
    "nsa-kernels-triton": {
        ("nsa.backends", "triton", "nsa_kernels_triton:BACKEND"),
        ("nsa.bench", "triton", "nsa_kernels_triton.benchmarks:workloads"),
    },
}
EXTRAS = {
    "nsa": {"triton", "fa2", "bench", "hf", "prometheus", "all"},
    "nsa-fa2": {"flash-attn"},
}


def version_of(package: str) -> str:
    (about,) = ROOT.glob(f"packages/{package}/src/*/__about__.py")
    (version,) = re.findall(r'^__version__ = "(.+)"$', about.read_text(), re.MULTILINE)
    return version


def test_six_packages() -> None:
    assert PACKAGES == ["nsa", "nsa-bench", "nsa-fa2", "nsa-kernels-triton", "nsa-routing", "nsa-varlen"]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_has_its_own_papers(package: str) -> None:
    folder = ROOT / "packages" / package
    assert not (folder / "LICENSE").is_symlink(), "a link ships as a link that points out of the sdist"
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (folder / "README.md").read_text().startswith(f"# {package}\n")
    assert f"pip install {package}" in (folder / "README.md").read_text()
    assert "\n<!-- towncrier release notes start -->\n" in (folder / "CHANGELOG.md").read_text()
    assert (folder / "changelog.d").is_dir()
    assert list((folder / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_towncrier_reads_every_fragment(package: str) -> None:
    fragments = [f for f in (ROOT / "packages" / package / "changelog.d").iterdir() if f.suffix == ".md"]
    command = ["towncrier", "build", "--draft", "--version=0", "--config", str(ROOT / "pyproject.toml")]
    command += ["--dir", str(ROOT / "packages" / package)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    news = " ".join(done.stdout.split())
    assert all(" ".join(f.read_text().split()) in news for f in fragments), news


@pytest.mark.parametrize("package", PACKAGES)
def test_metadata(package: str, built: dict[str, Built]) -> None:
    metadata = built[package].metadata
    assert metadata["Name"] == package
    assert metadata["Version"] == version_of(package)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS.get(package, set())
    assert "License" in built[package].text("licenses/LICENSE")


@pytest.mark.parametrize("package", PACKAGES)
def test_flash_attn_is_asked_for_by_one_extra_only(package: str, built: dict[str, Built]) -> None:
    requirements = map(Requirement, built[package].metadata.get_all("Requires-Dist", []))
    flash = [(str(r.specifier), str(r.marker)) for r in requirements if r.name == "flash-attn"]
    expected = ("<3,>=2.8", 'platform_system == "Linux" and extra == "flash-attn"')
    assert flash == ([expected] if package == "nsa-fa2" else [])


@pytest.mark.parametrize("package", PACKAGES)
def test_entry_points(package: str, built: dict[str, Built]) -> None:
    expected = ENTRY_POINTS.get(package, set())
    assert built[package].entry_points == expected
    for group, name, value in expected:
        assert EntryPoint(name, value, group).load() is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_and_sdist_hold_the_tree(package: str, built: dict[str, Built]) -> None:
    """Every source file is in both, the tests are in the sdist, and the wheel has one top-level package."""
    folder = ROOT / "packages" / package
    module = package.replace("-", "_")
    source = {f.relative_to(folder / "src").as_posix() for f in (folder / "src" / module).rglob("*") if f.is_file()}
    source = {name for name in source if "__pycache__" not in name}
    assert f"{module}/py.typed" in source
    files = built[package].files()
    assert source <= files
    assert {name.split("/")[0] for name in files} == {module, f"{module}-{version_of(package)}.dist-info"}
    tests = {f.relative_to(folder).as_posix() for f in (folder / "tests").rglob("*.py")}
    assert {f"src/{name}" for name in source} | tests <= built[package].sdist_files()


def test_profiles_ship_through_a_directory_link(tmp_path: Path) -> None:
    """The top-level profiles/ reaches wheel, sdist and wheel-from-sdist through a link in nsa_routing.

    The copy of the tree has the link and one more profile of its own, so this asks of the build what it needs to ask
    whether or not the tree has profiles.
    """
    package = tmp_path / "packages" / "nsa-routing"
    shutil.copytree(ROOT / "packages" / "nsa-routing", package, symlinks=True)
    shutil.copyfile(ROOT / ".gitignore", tmp_path / ".gitignore")
    profiles = tmp_path / "profiles"
    if (ROOT / "profiles").is_dir():
        shutil.copytree(ROOT / "profiles", profiles)
    profiles.mkdir(exist_ok=True)
    (profiles / "planted.yaml").write_text("planted: true\n")
    link = package / "src" / "nsa_routing" / "profiles"
    if not link.is_symlink():
        link.symlink_to("../../../../profiles", target_is_directory=True)
    expected = {f"nsa_routing/profiles/{f.name}" for f in profiles.glob("*.yaml")}

    build(package, tmp_path / "out")
    direct = Built(only(tmp_path / "out", "*.whl"), only(tmp_path / "out", "*.tar.gz"))
    assert expected <= direct.files()
    assert {f"src/{name}" for name in expected} <= direct.sdist_files()

    with tarfile.open(direct.sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    build(only(tmp_path / "unpacked", "*"), tmp_path / "again", "wheel")
    assert Built(only(tmp_path / "again", "*.whl"), direct.sdist).files() == direct.files()


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_the_sdist_builds_the_same_wheel(package: str, built: dict[str, Built], tmp_path: Path) -> None:
    """As pip does it for a user without our wheel: an isolated build that takes its requirements from the index."""
    command = ["wheel", "-q", "--no-deps", "-w", str(tmp_path), str(built[package].sdist)]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Built(only(tmp_path, "*.whl"), built[package].sdist).files() == built[package].files()
