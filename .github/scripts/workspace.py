"""The packages of the tree: names, versions, what they require. The scripts beside this file share it."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """A member of the workspace."""

    name: str
    version: str
    folder: Path
    requirements: tuple[str, ...]  # without extras: what a plain installation takes
    extras: dict[str, tuple[str, ...]]

    @property
    def module(self) -> str:
        """The name it is imported by."""
        return self.name.replace("-", "_")

    @property
    def about(self) -> Path:
        """The file that holds its version."""
        return self.folder / "src" / self.module / "__about__.py"

    @property
    def pyproject(self) -> Path:
        """Where it says what it requires."""
        return self.folder / "pyproject.toml"

    def fragments(self) -> list[Path]:
        """What is new in it since its last release."""
        return sorted(self.folder.glob("changelog.d/*.md"))

    def ranges(self) -> list[Requirement]:
        """All that it requires of other packages, extras included; an extra made of its own extras is left out."""
        lines = [*self.requirements, *(line for lines in self.extras.values() for line in lines)]
        return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != self.name]


def read_packages(root: Path = ROOT) -> dict[str, Package]:
    """Every folder of packages/ by project name."""
    found: dict[str, Package] = {}
    for pyproject in sorted(root.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        (about,) = pyproject.parent.glob("src/*/__about__.py")
        (version,) = VERSION.findall(about.read_text(encoding="utf-8"))
        name = canonicalize_name(project["name"])
        extras = {extra: tuple(lines) for extra, lines in project.get("optional-dependencies", {}).items()}
        found[name] = Package(name, version, pyproject.parent, tuple(project.get("dependencies", ())), extras)
    return found
