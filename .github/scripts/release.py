"""Release one package: `hatch run release PACKAGE VERSION`, with VERSION a version, major, minor or patch.

Version, changelog, commit and tag are made in a temporary clone, where the integration suite runs against the wheels
of all packages. Only when it has passed does the checkout take the commit and the tag, both or neither: whatever fails
before leaves the checkout as it was. `--dry-run` takes neither. Nothing is pushed. docs/releasing.md is the manual.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version
from release_checks import (
    Refused,
    check_fragments,
    check_ranges,
    check_siblings,
    named,
    newest_release,
    next_version,
    siblings,
    tag_of,
)
from workspace import ROOT, VERSION, Package, read_packages

MAIN = "main"  # release.yml publishes tags of no other branch: a version released from one would be lost
Suite = Callable[[Path, Path], None]  # given a tree and a folder of wheels; raises Refused


@dataclass(frozen=True)
class Release:
    """A release that can be made, or was."""

    package: str
    before: str
    version: Version
    news: str  # what the changelog says of it
    changes: str  # git's summary of the commit

    @property
    def tag(self) -> str:
        """The name of its tag."""
        return tag_of(self.package, self.version)


def run(what: str, command: list[str | Path], tree: Path) -> str:
    """Standard output of a command, run in the tree."""
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{what} failed:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def git(tree: Path, *words: str | Path) -> str:
    """What git says, without the line's end."""
    return run(f"git {words[0]}", ["git", *words], tree).rstrip("\n")


def behind(scripts: dict[str, str | list[str]], words: list[str]) -> list[list[str]]:
    """The commands that `hatch run` comes to: a script of hatch.toml may name others, and {args} are more words.

    Example:
        >>> behind({"tests": "pytest -q", "unit": ["git status", "tests {args} packages"]}, ["unit", "-x"])
        [['git', 'status'], ['pytest', '-q', '-x', 'packages']]
    """

    def expanded(name: str) -> list[str]:
        lines = scripts[name]
        found = []
        for line in [lines] if isinstance(lines, str) else lines:
            program, _, more = line.partition(" ")
            found += [f"{inner} {more}" for inner in expanded(program)] if program in scripts else [line]
        return found

    name, *more = words
    if name not in scripts:
        return [words]
    return [shlex.split(line.replace("{args}", shlex.join(more))) for line in expanded(name)]


def integration(tree: Path, wheels: Path) -> None:
    """What `hatch run integration --wheels FOLDER` runs there, in this environment."""
    scripts = tomllib.loads((tree / "hatch.toml").read_text(encoding="utf-8"))["envs"]["default"]["scripts"]
    for command in behind(scripts, ["integration", "--wheels", str(wheels)]):
        if subprocess.run(command, cwd=tree).returncode:
            raise Refused("the integration suite failed")


def no_suite(tree: Path, wheels: Path) -> None:
    """For a dry run in a hurry."""


def clean_head(tree: Path, branch: str) -> str:
    """The commit that is checked out, of this branch and with nothing beside it."""
    here = git(tree, "rev-parse", "--abbrev-ref", "HEAD")
    if here != branch:
        raise Refused(f"branch: expected {branch}, got {here}")
    if changed := git(tree, "status", "--porcelain", "--untracked-files=normal"):
        raise Refused(f"checkout: expected no changes and no files that git does not know, got\n{changed}")
    return git(tree, "rev-parse", "HEAD")


def check_sources(tree: Path, packages: dict[str, Package], package: Package, tags: list[str]) -> None:
    """The source of each sibling that it requires is that of the release users get beside it.

    The suite runs against the siblings of the tree: it cannot see that the package uses what no release has.
    """
    wrong = []
    for sibling, requirement in siblings(packages, package):
        version = newest_release(requirement, tags)
        if version is None:
            continue
        tag = tag_of(sibling.name, version)
        # The file of its version says nothing of what it can do.
        paths: list[str | Path] = [sibling.folder / "src", f":(exclude){sibling.about.relative_to(tree).as_posix()}"]
        if git(tree, "diff", "--name-only", f"refs/tags/{tag}", "HEAD", "--", *paths):
            expected = f"expected its source as {tag} has it, got changes since"
            wrong.append(f"{sibling.name}: {expected}: release {sibling.name} first")
    if wrong:
        raise Refused("\n".join(dict.fromkeys(wrong)))


def clone_of(tree: Path, branch: str, folder: Path) -> Path:
    """A clone in which the same person commits and signs as in the tree."""
    git(tree, "var", "GIT_COMMITTER_IDENT")  # says who that is, or what is missing
    # `git config` ends with 1 where nothing matches.
    command = ["git", "config", "--null", "--get-regexp", r"^(user|gpg|commit|tag)\."]
    found = subprocess.run(command, cwd=tree, capture_output=True, text=True).stdout
    settings = [pair.replace("\n", "=", 1) for pair in found.split("\0") if pair]
    options = [word for setting in settings for word in ("--config", setting)]
    git(tree, "clone", "--quiet", "--single-branch", "--branch", branch, *options, tree, folder)
    return folder


def write(tree: Path, package: Package, version: Version) -> str:
    """Version and changelog, committed; returns the changelog's new part."""
    about = package.about.read_text(encoding="utf-8")
    package.about.write_text(VERSION.sub(f'__version__ = "{version}"', about), encoding="utf-8")
    towncrier = [sys.executable, "-m", "towncrier", "build", "--version", str(version)]
    towncrier += ["--config", str(tree / "pyproject.toml"), "--dir", str(package.folder)]
    news = run("towncrier", [*towncrier, "--draft"], tree).strip()
    run("towncrier", [*towncrier, "--yes"], tree)
    git(tree, "add", "--all", package.folder)
    git(tree, "commit", "--quiet", "--message", f"{package.name} {version}")
    return news


def build(packages: dict[str, Package], folder: Path) -> None:
    """A wheel of every package."""
    for package in packages.values():
        run(
            f"the build of {package.name}",
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
            package.folder,
        )


def take(tree: Path, clone: Path, tag: str, head: str, branch: str) -> None:
    """Let the tree have the clone's commit and tag. Refuses where the tree has moved on meanwhile."""
    if clean_head(tree, branch) != head:
        raise Refused(f"{branch} has moved on while the suite ran: release again")
    made = git(clone, "rev-parse", f"refs/tags/{tag}")
    try:
        git(tree, "fetch", "--quiet", "--no-tags", clone, f"refs/tags/{tag}:refs/tags/{tag}")
        git(tree, "merge", "--quiet", "--ff-only", f"{tag}^{{commit}}")
    except BaseException:  # whoever stops it, too
        if git(tree, "rev-parse", "HEAD") == head:  # the commit is not there: neither is the tag, if it is this one
            subprocess.run(["git", "update-ref", "-d", f"refs/tags/{tag}", made], cwd=tree, capture_output=True)
        raise


def release(
    name: str, wanted: str, tree: Path = ROOT, *, branch: str = MAIN, dry: bool = False, suite: Suite = integration
) -> Release:
    """Release a package of the tree.

    Args:
        name, wanted: the package; its version, or the part of the version to count up.
        tree: a git checkout.
        branch: the branch that must be checked out; another than main in a dry run only.
        dry: leave the checkout as it is.
        suite: raises where the wheels must not be released.

    Raises:
        Refused: why not; the checkout is as it was.
    """
    if branch != MAIN and not dry:
        raise Refused(f"--branch: expected {MAIN}, or --dry-run beside it, got {branch}: tags of {MAIN} are published")
    packages = read_packages(tree)
    package = named(packages, name)
    tags = git(tree, "tag", "--list").split()
    version = next_version(package, wanted, tags)
    check_fragments(package, tree)
    check_ranges(packages, package, version, tree)
    check_siblings(packages, package, tags)
    head = clean_head(tree, branch)
    check_sources(tree, packages, package, tags)
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        clone, wheels = clone_of(tree, branch, Path(folder, "tree")), Path(folder, "wheels")
        news = write(clone, read_packages(clone)[name], version)
        made = Release(name, package.version, version, news, git(clone, "show", "--stat", "--format=", "HEAD"))
        build(read_packages(clone), wheels)
        suite(clone, wheels)
        git(clone, "tag", "--annotate", "--message", f"{name} {version}", made.tag)
        if not dry:
            take(tree, clone, made.tag, head, branch)
    return made


def main(words: list[str] | None = None) -> int:
    """Release, say what was done, return the exit status."""
    parser = argparse.ArgumentParser(prog="hatch run release", description=__doc__.splitlines()[0])
    parser.add_argument("package")
    parser.add_argument("version", help="a version such as 0.2.0, or major, minor, patch")
    parser.add_argument("--branch", default=MAIN, help="with --dry-run: the branch that is checked out (main)")
    parser.add_argument("--dry-run", action="store_true", help="say what would change and leave the checkout as it is")
    parser.add_argument("--skip-suite", action="store_true", help="with --dry-run: no integration suite")
    given = parser.parse_args(words)
    if given.skip_suite and not given.dry_run:
        parser.error("--skip-suite: expected --dry-run beside it: a release is tested")
    suite = no_suite if given.skip_suite else integration
    try:
        made = release(given.package, given.version, branch=given.branch, dry=given.dry_run, suite=suite)
    except Refused as refused:
        print(f"release: {refused}\nrelease: nothing was released, the checkout is as it was", file=sys.stderr)
        return 1
    print(f"{made.package} {made.before} -> {made.version}, tag {made.tag}\n\n{made.changes}\n\n{made.news}\n")
    print(f"integration suite: {'skipped' if given.skip_suite else 'passed against the wheels'}")
    if given.dry_run:
        print("dry run: the checkout is as it was")
    else:
        print(f"next: git push --atomic origin {MAIN} {made.tag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
