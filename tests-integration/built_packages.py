"""The packages of the tree, built: what is in their wheels and sdists, and folders that Python imports wheels from."""

import email
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from configparser import ConfigParser
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml"))


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


def build_all(folder: Path, *targets: str) -> dict[str, Built]:
    """Every package of the tree."""
    result = {}
    for name in PACKAGES:
        out = folder / name
        build(ROOT / "packages" / name, out, *targets)
        sdists = list(out.glob("*.tar.gz"))
        result[name] = Built(only(out, "*.whl"), sdists[0] if sdists else out)
    return result


def siblings(package: str, built: dict[str, Built]) -> set[str]:
    """The package and those of the family that it requires, whatever extras ask for left out."""
    requirements = [Requirement(line) for line in built[package].metadata.get_all("Requires-Dist", [])]
    needed = {r.name for r in requirements if r.name in built and not (r.marker and "extra" in str(r.marker))}
    return {package}.union(*(siblings(name, built) for name in needed))


def unpack(wheels: Iterable[Path], folder: Path) -> None:
    """Pure Python wheels, where an entry of sys.path finds their modules and their metadata."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def without_the_family(folder: Path) -> None:
    """Links to all that is installed here but this family: with `python -S` nothing else is found."""
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not re.match(r"_?nsa[_.-]|nsa$|__editable__", entry.name) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
