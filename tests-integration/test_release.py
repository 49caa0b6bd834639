"""Is a release one package's, whole or not at all? In small checkouts with the packages of the tree."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import release as releasing
import yaml
from packaging.version import Version
from release import Refused, no_suite, release
from release_checks import next_version, parse_tag
from release_tag import released
from workspace import ROOT, Package, read_packages

NAMES = list(read_packages())
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
IGNORED = shutil.ignore_patterns("tests", "__pycache__", "*.egg-info")


def git(tree: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=tree, check=True, capture_output=True, text=True).stdout.strip()


def commit(tree: Path) -> None:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "as it was")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of main with a fragment for every package, all of them released but nsa, which requires the others.

    Whoever commits here is known to this checkout alone.
    """
    made = tmp_path / "checkout"
    for folder in ("packages", "profiles", "bench/suites", ".github"):
        shutil.copytree(ROOT / folder, made / folder, symlinks=True, ignore=IGNORED)
    for name in ("pyproject.toml", "hatch.toml", ".gitignore"):
        shutil.copy(ROOT / name, made)
    for name in NAMES:
        (made / "packages" / name / "changelog.d" / "+planted.added.md").write_text(f"What is new in {name}.\n")
    git(made, "init", "--quiet", "--initial-branch", "main")
    git(made, "config", "user.name", "Somebody")
    git(made, "config", "user.email", "somebody@example.org")
    commit(made)
    for name, package in read_packages(made).items():
        if name != "nsa":
            git(made, "tag", f"{name}-v{package.version}")
    return made


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels take seconds, and not every test is about them."""
    monkeypatch.setattr(releasing, "build", lambda packages, folder: None)


def state(tree: Path) -> tuple[str, str, dict[str, bytes]]:
    """References, what is not committed, and every file."""
    files = git(tree, "ls-files", "--cached", "--others", "-z").split("\0")
    content = {name: (tree / name).read_bytes() for name in files if (tree / name).is_file()}
    return git(tree, "for-each-ref") + git(tree, "rev-parse", "HEAD"), git(tree, "status", "--porcelain"), content


def later(tree: Path, name: str, patches: int = 1) -> str:
    version = Version(read_packages(tree)[name].version)
    return f"{version.major}.{version.minor}.{version.micro + patches}"


def minor(tree: Path, name: str) -> str:
    version = Version(read_packages(tree)[name].version)
    return f"{version.major}.{version.minor + 1}.0"


def never(tree: Path, wheels: Path) -> None:
    pytest.fail("nothing is tested that is refused")


def test_two_packages_at_versions_of_their_own(tree: Path) -> None:
    """And the others as they were, byte for byte."""
    tested: list[list[str]] = []

    def suite(clone: Path, wheels: Path) -> None:
        assert clone != tree
        tested.append(sorted(wheel.name for wheel in wheels.iterdir()))

    versions = {name: package.version for name, package in read_packages(tree).items()}
    tags = {*git(tree, "tag").split()}
    for name, patches in (("nsa-bench", 1), ("nsa-varlen", 7)):
        before, old = state(tree), read_packages(tree)[name]
        fragments = [f.relative_to(tree).as_posix() for f in old.folder.glob("changelog.d/*.md")]
        version = later(tree, name, patches)

        made = release(name, version, tree, suite=suite)

        versions[name] = version
        assert (made.package, made.before, str(made.version), made.tag) == (
            name,
            old.version,
            version,
            f"{name}-v{version}",
        )
        assert {name: package.version for name, package in read_packages(tree).items()} == versions
        assert tested.pop() == sorted(f"{n.replace('-', '_')}-{v}-py3-none-any.whl" for n, v in versions.items())

        after = state(tree)
        changelog, about = (path.relative_to(tree).as_posix() for path in (old.folder / "CHANGELOG.md", old.about))
        gone, there = before[2].keys() - after[2].keys(), before[2].keys() & after[2].keys()
        assert sorted(gone) == sorted(fragments)
        assert after[2].keys() <= before[2].keys()
        assert {n for n in there if before[2][n] != after[2][n]} == {changelog, about}
        assert after[2][about] == f'__version__ = "{version}"\n'.encode()
        head, start, rest = before[2][changelog].decode().partition("<!-- towncrier release notes start -->\n")
        assert after[2][changelog].decode().startswith(f"{head}{start}\n## {version} — ")
        assert after[2][changelog].decode().endswith(rest)
        assert f"- What is new in {name}." in after[2][changelog].decode()
        assert f"- What is new in {name}." in made.news

        assert after[1] == "", "nothing is left to commit"
        assert git(tree, "log", "-1", "--format=%s|%an|%ce") == f"{name} {version}|Somebody|somebody@example.org"
        assert git(tree, "cat-file", "-t", made.tag) == "tag"
        assert git(tree, "rev-parse", f"{made.tag}^{{commit}}") == git(tree, "rev-parse", "main")
        assert git(tree, "for-each-ref", "--format=%(contents)", f"refs/tags/{made.tag}") == f"{name} {version}"
    assert {*git(tree, "tag").split()} - tags == {f"{n}-v{versions[n]}" for n in ("nsa-bench", "nsa-varlen")}
    assert git(tree, "rev-list", "--count", "HEAD") == "3"


@pytest.mark.usefixtures("no_wheels")
def test_a_dry_run_leaves_everything(tree: Path) -> None:
    before = state(tree)
    tested: list[str] = []

    def suite(clone: Path, wheels: Path) -> None:
        tested.append(git(clone, "log", "-1", "--format=%s"))

    made = release("nsa", "patch", tree, dry=True, suite=suite)
    assert tested == [f"nsa {later(tree, 'nsa')}"]
    assert "packages/nsa/CHANGELOG.md" in made.changes
    assert "- What is new in nsa." in made.news
    assert state(tree) == before


@pytest.mark.usefixtures("no_wheels")
@pytest.mark.parametrize("error", [Refused("it is red"), RuntimeError("it broke"), KeyboardInterrupt("stopped")])
def test_a_failing_suite_leaves_everything(tree: Path, error: BaseException) -> None:
    before, clones = state(tree), []

    def suite(clone: Path, wheels: Path) -> None:
        clones.append(clone)
        raise error

    with pytest.raises(type(error), match=re.escape(str(error))):
        release("nsa", "patch", tree, suite=suite)
    assert state(tree) == before
    assert [clone.exists() for clone in clones] == [False]


def test_a_failing_build_leaves_everything(tree: Path) -> None:
    pyproject = tree / "packages" / "nsa-fa2" / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('readme = "README.md"', 'readme = "gone.md"'))
    commit(tree)
    before = state(tree)
    with pytest.raises(Refused, match=r"the build of nsa-fa2 failed:\n(.|\n)*gone.md"):
        release("nsa", "patch", tree, suite=never)
    assert state(tree) == before


@pytest.mark.usefixtures("no_wheels")
def test_a_checkout_that_moved_on_is_left(tree: Path) -> None:
    def suite(clone: Path, wheels: Path) -> None:
        git(tree, "commit", "--quiet", "--allow-empty", "--message", "meanwhile")

    with pytest.raises(Refused, match="main has moved on while the suite ran"):
        release("nsa", "patch", tree, suite=suite)
    assert git(tree, "tag", "--list", "nsa-v[0-9]*") == ""
    assert git(tree, "log", "-1", "--format=%s") == "meanwhile"


@pytest.mark.usefixtures("no_wheels")
def test_commit_and_tag_come_together(tree: Path) -> None:
    """A lock of the index lets git take the tag, and not the commit."""
    before, lock = state(tree), tree / ".git" / "index.lock"
    with pytest.raises(Refused, match="git merge failed:"):
        release("nsa", "patch", tree, suite=lambda clone, wheels: lock.touch())
    lock.unlink()
    assert state(tree) == before


@pytest.mark.usefixtures("no_wheels")
@pytest.mark.parametrize("word", ["fetch", "merge"])
@pytest.mark.parametrize("late", [False, True], ids=["before it is done", "when it is done"])
def test_who_stops_it_at_the_end_gets_both_or_neither(
    tree: Path, word: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = state(tree), releasing.git

    def stopped(where: Path, *words: str | Path) -> str:
        if where != tree or words[0] != word:
            return real(where, *words)
        if late:
            real(where, *words)
        raise KeyboardInterrupt

    monkeypatch.setattr(releasing, "git", stopped)
    with pytest.raises(KeyboardInterrupt):
        release("nsa", "patch", tree, suite=no_suite)
    if (word, late) == ("merge", True):
        assert git(tree, "rev-parse", f"nsa-v{later(tree, 'nsa', 0)}^{{commit}}") == git(tree, "rev-parse", "main")
        assert git(tree, "status", "--porcelain") == ""
    else:
        assert state(tree) == before


@pytest.mark.usefixtures("no_wheels")
def test_somebody_else_s_tag_is_left(tree: Path) -> None:
    tag = f"nsa-v{later(tree, 'nsa')}"
    with pytest.raises(Refused, match="git fetch failed:"):
        release("nsa", "patch", tree, suite=lambda clone, wheels: git(tree, "tag", tag) and None)
    assert git(tree, "rev-parse", tag) == git(tree, "rev-parse", "main")


@pytest.mark.usefixtures("no_wheels")
def test_the_version_of_the_tree_is_released_once(tree: Path) -> None:
    version = read_packages(tree)["nsa"].version
    assert release("nsa", version, tree, suite=no_suite).tag == f"nsa-v{version}"
    (tree / "packages" / "nsa" / "changelog.d" / "+more.fixed.md").write_text("More.\n")
    commit(tree)
    with pytest.raises(Refused, match=f"^tag nsa-v{version} is there already$"):
        release("nsa", version, tree, suite=never)


def with_dirt(tree: Path) -> None:
    (tree / "hatch.toml").write_text("")


def with_a_stray_file(tree: Path) -> None:
    (tree / "notes.txt").write_text("")


def on_a_branch(tree: Path) -> None:
    git(tree, "checkout", "--quiet", "-b", "topic")


def with_a_stray_file_that_status_hides(tree: Path) -> None:
    git(tree, "config", "status.showUntrackedFiles", "no")
    with_a_stray_file(tree)


def with_a_misspelt_fragment(tree: Path) -> None:
    (tree / "packages" / "nsa" / "changelog.d" / "+more.feature.md").write_text("More.\n")
    commit(tree)


def without_fragments(tree: Path) -> None:
    for fragment in (tree / "packages" / "nsa" / "changelog.d").glob("*.md"):
        fragment.unlink()
    commit(tree)


def with_a_tag(tree: Path) -> None:
    git(tree, "tag", f"nsa-v{later(tree, 'nsa')}")


def with_a_later_tag(tree: Path) -> None:
    git(tree, "tag", f"nsa-v{later(tree, 'nsa', 5)}")


def needing_what_is_not_there(tree: Path) -> None:
    pyproject = tree / "packages" / "nsa" / "pyproject.toml"
    pyproject.write_text(re.sub(r"nsa-routing>=[^\"]+", "nsa-routing>=8.1,<8.2", pyproject.read_text()))
    commit(tree)


def before_a_sibling(tree: Path) -> None:
    git(tree, "tag", "--delete", f"nsa-routing-v{read_packages(tree)['nsa-routing'].version}")


def before_a_sibling_of_an_extra(tree: Path) -> None:
    git(tree, "tag", "--delete", f"nsa-bench-v{read_packages(tree)['nsa-bench'].version}")
    git(tree, "tag", "nsa-bench-v0.0.1")


def add_to(tree: Path, name: str) -> None:
    """A name that no release of the package has."""
    package = read_packages(tree)[name]
    with (package.about.parent / "__init__.py").open("a") as module:
        module.write("UNRELEASED = True\n")
    commit(tree)


def with_news_in_a_sibling(tree: Path) -> None:
    add_to(tree, "nsa-varlen")


def with_news_in_a_sibling_of_an_extra(tree: Path) -> None:
    add_to(tree, "nsa-fa2")


def with_news_in_a_sibling_s_pre_release(tree: Path) -> None:
    """pip leaves it out where there is another."""
    add_to(tree, "nsa-varlen")
    git(tree, "tag", f"nsa-varlen-v{later(tree, 'nsa-varlen')}rc1")


def as_it_is(tree: Path) -> None:
    pass


def as_released(name: str) -> str:
    """What is said where its source is not."""
    return rf"^{name}: expected its source as {name}-v[\d.]+ has it, got changes since: release {name} first$"


@pytest.mark.parametrize(
    ("name", "wanted", "prepare", "why"),
    [
        ("nsa-nothing", "patch", as_it_is, r"package: expected one of nsa, nsa-bench, .*, got 'nsa-nothing'"),
        ("nsa", "0.1", as_it_is, r"version: expected .*, got '0\.1'"),
        ("nsa", "v99.0.0", as_it_is, r"version: expected .*, got 'v99\.0\.0'"),
        ("nsa", "99.0.0+mine", as_it_is, r"version: expected .*, got '99\.0\.0\+mine'"),
        ("nsa", "next", as_it_is, r"version: expected major, minor, patch or .*, got 'next'"),
        ("nsa", "0.0.1", as_it_is, r"version: expected one newer than nsa [\d.]+, got 0\.0\.1"),
        ("nsa", "patch", with_a_tag, r"tag nsa-v[\d.]+ is there already"),
        ("nsa", "patch", with_a_later_tag, r"version: expected one newer than nsa [\d.]+, got [\d.]+"),
        ("nsa", "patch", without_fragments, r"packages/nsa/changelog.d: expected fragments, got none"),
        ("nsa", "patch", with_dirt, r"checkout: expected no changes .*\n M hatch.toml"),
        ("nsa", "patch", with_a_stray_file, r"checkout: expected no changes .*\n\?\? notes.txt"),
        ("nsa", "patch", with_a_stray_file_that_status_hides, r"checkout: expected no changes .*\n\?\? notes.txt"),
        ("nsa", "patch", with_a_misspelt_fragment, r"towncrier failed:\n(.|\n)*name: \+more\.feature\.md"),
        ("nsa", "patch", on_a_branch, r"branch: expected main, got topic"),
        ("nsa", "patch", before_a_sibling, r"^nsa-routing<[\d.]+,>=[\d.]+: expected a release of it, got none: who is"),
        ("nsa", "patch", before_a_sibling_of_an_extra, r"^nsa-bench<[\d.]+,>=[\d.]+: expected a release of it, got"),
        ("nsa", "patch", with_news_in_a_sibling, as_released("nsa-varlen")),
        ("nsa", "patch", with_news_in_a_sibling_of_an_extra, as_released("nsa-fa2")),
        ("nsa-fa2", "patch", with_news_in_a_sibling_s_pre_release, as_released("nsa-varlen")),
        (
            "nsa",
            "patch",
            needing_what_is_not_there,
            r"packages/nsa/pyproject.toml: nsa-routing<8\.2,>=8\.1 does not admit nsa-routing [\d.]+",
        ),
    ],
)
def test_what_is_refused(name: str, wanted: str, prepare: Callable[[Path], None], why: str, tree: Path) -> None:
    prepare(tree)
    before = state(tree)
    with pytest.raises(Refused, match=why):
        release(name, wanted, tree, suite=never)
    assert state(tree) == before


@pytest.mark.usefixtures("no_wheels")
def test_a_sibling_with_news_goes_first(tree: Path) -> None:
    """Then its users get what the package was tested with. Nobody waits for who does not require it."""
    add_to(tree, "nsa-varlen")
    assert release("nsa-bench", "patch", tree, suite=no_suite).package == "nsa-bench"
    with pytest.raises(Refused, match=as_released("nsa-varlen")):
        release("nsa", "patch", tree, suite=never)
    for name in ("nsa-varlen", "nsa"):
        assert release(name, "patch", tree, suite=no_suite).package == name


@pytest.mark.usefixtures("no_wheels")
def test_what_users_do_not_import_of_a_sibling_may_be_unreleased(tree: Path) -> None:
    for name, package in read_packages(tree).items():
        if name != "nsa":
            (package.folder / "tests").mkdir()
            (package.folder / "tests" / "test_more.py").write_text("")
            (package.folder / "changelog.d" / "+more.fixed.md").write_text("More.\n")
            (package.folder / "CHANGELOG.md").write_text("<!-- towncrier release notes start -->\n")
            package.about.write_text(f'__version__ = "{later(tree, name)}"\n')
    commit(tree)
    assert release("nsa", "patch", tree, suite=no_suite).package == "nsa"


@pytest.mark.usefixtures("no_wheels")
def test_another_branch_has_dry_runs_only(tree: Path) -> None:
    """A tag of it would never be published."""
    on_a_branch(tree)
    before = state(tree)
    with pytest.raises(Refused, match=r"^--branch: expected main, or --dry-run beside it, got topic"):
        release("nsa", "patch", tree, branch="topic", suite=never)
    assert release("nsa", "patch", tree, branch="topic", dry=True, suite=no_suite).package == "nsa"
    assert state(tree) == before


def test_a_version_that_siblings_and_pins_do_not_admit(tree: Path) -> None:
    version, before = minor(tree, "nsa-fa2"), state(tree)
    with pytest.raises(Refused) as refused:
        release("nsa-fa2", "minor", tree, suite=never)
    first, *others = str(refused.value).splitlines()
    assert re.fullmatch(
        rf"packages/nsa/pyproject.toml: nsa-fa2<[\d.]+,>=[\d.]+ does not admit nsa-fa2 {re.escape(version)}", first
    )
    pins = [
        f"profiles/{profile.name}: pin nsa-fa2{yaml.safe_load(profile.read_text())['pins']['nsa-fa2']}"
        for profile in sorted((tree / "profiles").glob("sm*.yaml"))
    ]
    assert others == [f"{pin} does not admit nsa-fa2 {version}" for pin in pins]
    assert state(tree) == before


@pytest.mark.parametrize(
    ("current", "wanted", "tags", "version"),
    [
        ("0.1.0", "patch", [], "0.1.1"),
        ("0.1.3", "minor", [], "0.2.0"),
        ("0.1.3", "major", [], "1.0.0"),
        ("0.1.0", "0.1.0", [], "0.1.0"),
        ("0.1.0", "0.2.0rc1", [], "0.2.0rc1"),
        ("0.2.0rc1", "0.2.0", ["nsa-v0.2.0rc1"], "0.2.0"),
        ("0.1.0", "patch", ["nsa-varlen-v0.1.1", "nsa-v0.1.0", "v3", "nsa-vnext"], "0.1.1"),
    ],
)
def test_next_version(current: str, wanted: str, tags: list[str], version: str) -> None:
    package = Package("nsa", current, Path(), (), {})
    assert next_version(package, wanted, tags) == Version(version)


def test_a_part_of_a_pre_release_is_not_counted_up() -> None:
    with pytest.raises(Refused, match=r"0\.2\.0rc1 is a pre-release, got 'patch'"):
        next_version(Package("nsa", "0.2.0rc1", Path(), (), {}), "patch", [])


@pytest.mark.parametrize("code", [0, 1])
def test_the_suite_is_that_of_the_tree_with_these_wheels(tmp_path: Path, code: int) -> None:
    (tmp_path / "hatch.toml").write_text(
        '[envs.default.scripts]\nsuite = "python suite.py"\nintegration = ["git --version", "suite {args}"]\n'
    )
    (tmp_path / "suite.py").write_text(f"import sys\nassert sys.argv[1:] == ['--wheels', 'a b']\nsys.exit({code})\n")
    if code:
        with pytest.raises(Refused, match=r"^the integration suite failed$"):
            releasing.integration(tmp_path, Path("a b"))
    else:
        releasing.integration(tmp_path, Path("a b"))
    scripts = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]["default"]["scripts"]
    *_, last = releasing.behind(scripts, ["integration", "--wheels", "a b"])
    assert (last[0], last[-3:]) == ("pytest", ["tests-integration", "--wheels", "a b"])


def test_the_command_line(tree: Path) -> None:
    before, version = state(tree), later(tree, "nsa-bench")
    script = [sys.executable, tree / ".github" / "scripts" / "release.py"]
    done = subprocess.run([*script, "nsa-bench", "patch", "--dry-run", "--skip-suite"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.endswith(f" -> {version}, tag nsa-bench-v{version}")
    assert "- What is new in nsa-bench." in lines
    assert lines[-2:] == ["integration suite: skipped", "dry run: the checkout is as it was"]

    done = subprocess.run([*script, "nsa-bench", "minor"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("release: packages/nsa/pyproject.toml: nsa-bench")
    assert done.stderr.endswith("release: nothing was released, the checkout is as it was\n")

    done = subprocess.run([*script, "nsa-bench", "patch", "--skip-suite"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--skip-suite: expected --dry-run beside it" in done.stderr

    done = subprocess.run([*script, "nsa-bench", "patch", "--branch", "topic"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("release: --branch: expected main, or --dry-run beside it, got topic")
    assert state(tree) == before


@pytest.mark.usefixtures("no_wheels")
def test_the_tag_of_a_release_names_its_package(tree: Path) -> None:
    for name in NAMES:
        made = release(name, "patch", tree, suite=no_suite)
        assert parse_tag(made.tag) == (name, made.version)
        assert released(made.tag, tree).name == name


@pytest.mark.usefixtures("no_wheels")
@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("v1.0.0", "expected PACKAGE-vVERSION, got 'v1.0.0'"),
        ("nsa-vnext", "expected PACKAGE-vVERSION, got 'nsa-vnext'"),
        ("nsa-v99.0.0", r"expected that of nsa [\d.]+, as the tree has it, got 'nsa-v99\.0\.0'"),
        ("nsa-vv{nsa}", r"expected that of nsa [\d.]+, as the tree has it, got 'nsa-vv[\d.]+'"),
        ("nsa-v0{nsa}", r"expected that of nsa [\d.]+, as the tree has it, got 'nsa-v0[\d.]+'"),
        ("nsa-nothing-v0.1.0", "package: expected one of nsa, .*, got 'nsa-nothing'"),
        ("nsa-varlen-v{varlen}", r"nsa-varlen: expected [\d.]+ in its changelog, got a tag of what no release made"),
    ],
)
def test_a_tag_that_is_no_release(tag: str, why: str, tree: Path) -> None:
    version = release("nsa", "patch", tree, suite=no_suite).version
    by_hand = later(tree, "nsa-varlen")
    read_packages(tree)["nsa-varlen"].about.write_text(f'__version__ = "{by_hand}"\n')
    with pytest.raises(Refused, match=why):
        released(tag.format(nsa=version, varlen=by_hand), tree)


@pytest.mark.usefixtures("no_wheels")
def test_a_tag_moved_to_a_later_commit_is_no_release(tree: Path) -> None:
    made = release("nsa", "patch", tree, suite=no_suite)
    (tree / "packages" / "nsa" / "changelog.d" / "+more.fixed.md").write_text("More.\n")
    with pytest.raises(Refused, match=r"^nsa: expected no fragments beside a release, got \+more\.fixed\.md$"):
        released(made.tag, tree)


def test_the_workflow_publishes_without_secrets() -> None:
    """One job may ask for an identity, it runs nothing of the tree, and every action is a commit."""
    text = WORKFLOW.read_text()
    workflow = yaml.safe_load(text)
    assert "secrets" not in text
    assert workflow["permissions"] == {"contents": "read"}
    assert {name: job.get("permissions") for name, job in workflow["jobs"].items()} == {
        "build": None,
        "publish": {"id-token": "write"},
    }
    publish = workflow["jobs"]["publish"]
    assert (publish["environment"], publish["needs"]) == ("pypi", "build")
    assert [step for step in publish["steps"] if "run" in step] == []
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    assert [action for action in uses if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)] == []


def test_the_workflow_runs_what_hatch_has() -> None:
    """And nothing that a tag's name could smuggle in: values reach commands through the environment."""
    environments = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]
    runs = [step["run"] for step in yaml.safe_load(WORKFLOW.read_text())["jobs"]["build"]["steps"] if "run" in step]
    named = [match.groups() for run in runs if (match := re.match(r"hatch run (\w+):(\w+)", run))]
    assert [name for _, name in named] == ["tag", "alone", "check"]
    assert all(script in environments[environment]["scripts"] for environment, script in named)
    assert not any("${{" in run for run in runs)


def test_the_workflow_installs_from_the_index_before_it_publishes() -> None:
    """The wheel that was built and nothing else of the tree; CPU torch first, or pip would fetch the CUDA build."""
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    steps = jobs["build"]["steps"]
    commands = [step.get("run", step.get("uses", "")) for step in steps]
    build, install, hand_on = (
        next(place for place, command in enumerate(commands) if word in command)
        for word in ("wheels:alone", "-m venv", "upload-artifact")
    )
    assert build < install < hand_on, "what is handed on is what is published"
    assert jobs["publish"]["needs"] == "build"
    step = steps[install]
    assert "if" not in step
    _, torch, wheel, imported = step["run"].splitlines()
    assert torch.endswith(" install --index-url https://download.pytorch.org/whl/cpu torch")
    assert wheel.endswith(' install "dist/$FILES-py3-none-any.whl"')
    assert imported.endswith(' -Ic "import ${PACKAGE//-/_}"')
    assert step["env"]["PIP_EXTRA_INDEX_URL"] == ""


def test_the_workflow_takes_tags_of_main_only(tree: Path, tmp_path: Path) -> None:
    """In a clone with all of the history, as the step before it makes one."""
    checkout, asks = yaml.safe_load(WORKFLOW.read_text())["jobs"]["build"]["steps"][:2]
    assert checkout["with"]["fetch-depth"] == 0
    commit_of_main = git(tree, "rev-parse", "HEAD")
    git(tree, "commit", "--quiet", "--allow-empty", "--message", "later, on main")
    git(tree, "checkout", "--quiet", "-b", "beside")
    git(tree, "commit", "--quiet", "--allow-empty", "--message", "on a branch")
    beside = git(tree, "rev-parse", "HEAD")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(tree), str(clone))
    for tagged, accepted in ((commit_of_main, True), (beside, False)):
        git(clone, "checkout", "--quiet", "--detach", tagged)
        assert (subprocess.run(asks["run"].split(), cwd=clone).returncode == 0) == accepted
