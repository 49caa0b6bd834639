"""What must hold before a package is released. Each check raises `Refused`; none writes."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from workspace import Package

PARTS = ("major", "minor", "patch")


class Refused(Exception):
    """Why there is no release; the checkout is as it was."""


def tag_of(package: str, version: Version | str) -> str:
    """The tag of a release.

    Example:
        >>> tag_of("nsa-varlen", "0.1.1")
        'nsa-varlen-v0.1.1'
    """
    return f"{package}-v{version}"


def parse_tag(tag: str) -> tuple[str, Version] | None:
    """Package and version of a tag; None if it is not that of a release.

    Example:
        >>> parse_tag("nsa-varlen-v0.1.1")
        ('nsa-varlen', <Version('0.1.1')>)
    """
    package, separator, version = tag.rpartition("-v")
    try:
        return (package, Version(version)) if separator else None
    except InvalidVersion:
        return None


def releases(package: str, tags: Iterable[str]) -> list[Version]:
    """Versions of a package that have a tag.

    Example:
        >>> releases("nsa", ["nsa-v0.1.0", "nsa-varlen-v0.2.0", "v3"])
        [<Version('0.1.0')>]
    """
    return [version for name, version in filter(None, map(parse_tag, tags)) if name == package]


def named(packages: dict[str, Package], name: str) -> Package:
    """The package of this name."""
    if name not in packages:
        raise Refused(f"package: expected one of {', '.join(packages)}, got {name!r}")
    return packages[name]


def next_version(package: Package, wanted: str, tags: Iterable[str]) -> Version:
    """The version that is asked for: newer than every release, not older than the tree.

    The tree's own version may be released if it was not yet: it is that of a first release, or of a breaking change
    whose commit set it together with the ranges of the siblings.
    """
    current = Version(package.version)
    version = _bumped(current, wanted) if wanted in PARTS else _parsed(wanted)
    released = releases(package.name, tags)
    if version in released:
        raise Refused(f"tag {tag_of(package.name, version)} is there already")
    newest = max([current, *released])
    if version < newest:
        raise Refused(f"version: expected one newer than {package.name} {newest}, got {version}")
    return version


def _bumped(version: Version, part: str) -> Version:
    if version.is_prerelease:
        raise Refused(f"version: expected a version spelled out, since {version} is a pre-release, got {part!r}")
    numbers = [version.major, version.minor, version.micro]
    place = PARTS.index(part)
    return Version(".".join(map(str, [*numbers[:place], numbers[place] + 1, *[0] * (2 - place)])))


def _parsed(text: str) -> Version:
    expected = f"version: expected {', '.join(PARTS)} or a version such as 0.2.0"
    try:
        version = Version(text)
    except InvalidVersion:
        raise Refused(f"{expected}, got {text!r}") from None
    if str(version) != text or version.local or version.epoch or len(version.release) != 3:
        raise Refused(f"{expected}, got {text!r}")
    return version


def check_fragments(package: Package, tree: Path) -> None:
    """There is something to say about the release."""
    if not package.fragments():
        folder = (package.folder / "changelog.d").relative_to(tree)
        raise Refused(f"{folder}: expected fragments, got none: what is new in {package.name}?")


def check_ranges(packages: dict[str, Package], package: Package, version: Version, tree: Path) -> None:
    """All that the family says of its versions holds with this one: ranges of siblings, its own, pins of profiles."""
    versions = {name: Version(sibling.version) for name, sibling in packages.items()} | {package.name: version}
    wrong = [
        f"{sibling.pyproject.relative_to(tree)}: {requirement} does not admit {name} {versions[name]}"
        for sibling in packages.values()
        for requirement in sibling.ranges()
        if (name := canonicalize_name(requirement.name)) in versions
        and (name == package.name or sibling is package)
        and not admits(requirement.specifier, versions[name])
    ]
    wrong += [
        f"{profile.relative_to(tree)}: pin {pin} does not admit {package.name} {version}"
        for profile in sorted(tree.glob("profiles/*.yaml"))
        for pin in pins_of(profile)
        if pin.name == package.name and not admits(pin.specifier, version)
    ]
    if wrong:
        raise Refused("\n".join(wrong))


def siblings(packages: dict[str, Package], package: Package) -> Iterator[tuple[Package, Requirement]]:
    """Those that it requires, also by an extra, with the range."""
    for requirement in package.ranges():
        if sibling := packages.get(canonicalize_name(requirement.name)):
            yield sibling, requirement


def check_siblings(packages: dict[str, Package], package: Package, tags: Iterable[str]) -> None:
    """Each sibling that it requires has a release that it may be installed with."""
    tags = list(tags)
    wrong = [
        f"{requirement.name}{requirement.specifier}: expected a release of it, got none: who is required goes first"
        for sibling, requirement in siblings(packages, package)
        if not any(admits(requirement.specifier, version) for version in releases(sibling.name, tags))
    ]
    if wrong:
        raise Refused("\n".join(dict.fromkeys(wrong)))


def newest_release(requirement: Requirement, tags: Iterable[str]) -> Version | None:
    """The release that an installer takes for it: a pre-release only where there is nothing else.

    Example:
        >>> tags = ["nsa-varlen-v0.1.0", "nsa-varlen-v0.1.2rc1", "nsa-varlen-v0.2.0"]
        >>> newest_release(Requirement("nsa-varlen>=0.1,<0.2"), tags)
        <Version('0.1.0')>
    """
    return max(requirement.specifier.filter(releases(canonicalize_name(requirement.name), tags)), default=None)


def admits(specifier: SpecifierSet, version: Version) -> bool:
    """Whether the version lies in the range. A pre-release may; `<0.2` still leaves out 0.2.0rc1."""
    return specifier.contains(version, prereleases=True)


def pins_of(profile: Path) -> list[Requirement]:
    """What this file pins, less what it inherits."""
    pins = yaml.safe_load(profile.read_text(encoding="utf-8")).get("pins") or {}
    return [Requirement(f"{name}{specifier or ''}") for name, specifier in pins.items()]
