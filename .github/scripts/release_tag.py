"""What a release's tag names: prints `package=`, `version=` and `files=` for a workflow.

Fails unless the tag is that of a package here and of the version that the tree has.
"""

import argparse
import sys
from pathlib import Path

from release_checks import Refused, named, parse_tag
from workspace import ROOT, Package, read_packages


def released(tag: str, tree: Path = ROOT) -> Package:
    """The package that the tag is of, at the tag's version."""
    parsed = parse_tag(tag)
    if parsed is None:
        raise Refused(f"tag: expected PACKAGE-vVERSION, got {tag!r}")
    package = named(read_packages(tree), parsed[0])
    if package.version != str(parsed[1]):
        raise Refused(f"tag: expected that of {package.name} {package.version}, as the tree has it, got {tag!r}")
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
