"""What a release's tag names: prints `package=`, `version=` and `files=` for a workflow.

Fails unless the tag is that of a package here and of the version that the tree has, and the tree is one that `hatch run
release` made: its changelog has the version, and no fragment is left for the next one.
"""

import argparse
import sys
from pathlib import Path

from release_checks import Refused, named, parse_tag, tag_of
from workspace import ROOT, Package, read_packages


def released(tag: str, tree: Path = ROOT) -> Package:
    """The package that the tag is of, at the tag's version."""
    parsed = parse_tag(tag)
    if parsed is None:
        raise Refused(f"tag: expected PACKAGE-vVERSION, got {tag!r}")
    package = named(read_packages(tree), parsed[0])
    if tag != tag_of(package.name, package.version):
        raise Refused(f"tag: expected that of {package.name} {package.version}, as the tree has it, got {tag!r}")
    if f"\n## {package.version} — " not in (package.folder / "CHANGELOG.md").read_text(encoding="utf-8"):
        raise Refused(f"{package.name}: expected {package.version} in its changelog, got a tag of what no release made")
    if left := sorted(path.name for path in package.fragments()):
        raise Refused(f"{package.name}: expected no fragments beside a release, got {', '.join(left)}")
    return package


def main(words: list[str] | None = None) -> int:
    """Print, return the exit status."""
    parser = argparse.ArgumentParser(prog="hatch run wheels:tag", description=__doc__.splitlines()[0])
    parser.add_argument("tag", help="PACKAGE-vVERSION")
    try:
        package = released(parser.parse_args(words).tag)
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    print(f"package={package.name}\nversion={package.version}\nfiles={package.module}-{package.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
