"""What the six packages say of themselves, read from the wheels and sdists that the tree builds.

The editable installation is no witness: it keeps the metadata of the day it was made.
"""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml"))
ENTRY_POINTS = {  # the others have none
    "nsa-varlen": {
        ("nsa.backends", "sdpa", "nsa_varlen.sdpa:BACKEND"),
        ("nsa.op_inputs", "varlen", "nsa_varlen.op_inputs:op_inputs"),
    },
    "nsa-routing": {("console_scripts", "nsa-routing", "nsa_routing.cli:app")},
    "nsa-fa2": {
        ("nsa.backends", "fa2", "nsa_fa2:FA2"),
        ("nsa.backends", "fa2-torch", "nsa_fa2:FA2_TORCH"),
        ("nsa.backends", "cudnn", "nsa_fa2:CUDNN"),
    },
    "nsa-kernels-triton": {("nsa.backends", "triton", "nsa_kernels_triton:BACKEND")},
}
EXTRAS = {
    "nsa": {"triton", "fa2", "bench", "hf", "prometheus", "all"},
    "nsa-fa2": {"flash-attn"},
}


def build(package: Path, out: Path, *targets: str) -> None:
    """Run hatchling, the build backend, in this environment: no network."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *(f"-t{t}" for t in targets)]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Built:
    """One package's wheel and sdist."""

    wheel: Path
    sdist: Path

    def files(self) -> set[str]:
        """The wheel's paths."""
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def sdist_files(self) -> set[str]:
        """The sdist's paths, less its top folder. A link is no file: it may point out of the archive."""
        with tarfile.open(self.sdist) as archive:
            return {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}

    def text(self, name: str) -> str:
        """A file of the wheel's .dist-info, empty where there is none."""
        with zipfile.ZipFile(self.wheel) as archive:
            (path,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")] or [None]
            return archive.read(path).decode() if path else ""

    @property
    def metadata(self) -> Message:
        """The core metadata."""
        return email.message_from_string(self.text("METADATA"))

    @property
    def entry_points(self) -> set[tuple[str, str, str]]:
        """(group, name, object)."""
        parser = ConfigParser(delimiters=("=",))
        parser.read_string(self.text("entry_points.txt"))
        return {(group, name, value) for group in parser.sections() for name, value in parser.items(group)}


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Every package of the tree, built once."""
    result = {}
    for name in PACKAGES:
        out = tmp_path_factory.mktemp(name)
        build(ROOT / "packages" / name, out)
        result[name] = Built(only(out, "*.whl"), only(out, "*.tar.gz"))
    return result


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
