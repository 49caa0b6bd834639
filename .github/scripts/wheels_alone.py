"""Install each package's wheel on its own and run its own tests against it, one case of each: `hatch run wheels:alone`.

One base environment holds what all need and what is large: torch, numpy, pytest. Each package gets an empty child
environment that sees the base through a .pth file, then its wheel and the wheels of the siblings it declares, by path:
pip then has no other candidate for those names, so no index can supply one. Third-party dependencies come from
the index, under PIP_CONSTRAINT. What the base holds cannot be found missing here; the import table in
tests-integration/test_imports.py covers that.

Packages are tried side by side, as many as there are cores, and what each says is printed once it is through.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from workspace import ROOT, Package, read_packages

DIST = ROOT / "dist"
BASE_REQUIREMENTS = ["torch", "numpy", "pytest>=9", "pytest-randomly", "hypothesis"]
# pip without bytecode: what is imported is compiled then, the rest of torch never.
PIP = ["-m", "pip", "install", "-q", "--no-compile"]
# The longest first; what is not named here is short.
LONGEST_FIRST = ["nsa-kernels-triton", "nsa", "nsa-varlen"]

# Runs in the child. argv: package, its sibling dependencies, all packages (JSON); prints what went wrong, a line each.
CHECK = """
import importlib, importlib.metadata, importlib.util, json, sys, sysconfig
from pathlib import Path
module, expected, modules = sys.argv[1], set(json.loads(sys.argv[2])), json.loads(sys.argv[3])
purelib = Path(sysconfig.get_path("purelib")).resolve()
importable = {m for m in modules if importlib.util.find_spec(m)}
if importable != expected | {module}:
    print(f"importable packages: {sorted(importable)}, declared: {sorted(expected | {module})}")
for name in sorted(importable):
    origin = Path(importlib.util.find_spec(name).origin).resolve()
    if not origin.is_relative_to(purelib):
        print(f"{name} comes from {origin}, not from {purelib}")
    # Only an installation by path or URL leaves this record; one from an index does not.
    record = importlib.metadata.distribution(name.replace("_", "-")).read_text("direct_url.json")
    if record is None or not json.loads(record)["url"].startswith("file:"):
        print(f"{name} was not installed from a local wheel")
package = importlib.import_module(module)
version = importlib.metadata.version(module.replace("_", "-"))
if package.__version__ != version:
    print(f"__version__ is {package.__version__}, the metadata say {version}")
for point in importlib.metadata.distribution(module.replace("_", "-")).entry_points:
    point.load()  # commands, backends: what an entry point names is there, with what it needs
for heavy in ("triton", "flash_attn"):
    if heavy in sys.modules:
        print(f"importing {module} or what its entry points name imports {heavy}")
"""


class Failure(Exception):
    """One package does not stand alone; the message says how."""


def wheel_of(package: Package) -> Path:
    """Where `build` puts its wheel."""
    return DIST / f"{package.module}-{package.version}-py3-none-any.whl"


def siblings(package: Package, packages: dict[str, Package]) -> dict[str, Package]:
    """The packages that `package` needs, directly or not. Raises on an nsa-* name that is no package here."""
    needed: dict[str, Package] = {}
    todo = [package]
    while todo:
        for raw in todo.pop().requirements:
            name = canonicalize_name(Requirement(raw).name)
            if name in packages and name not in needed and name != package.name:
                needed[name] = packages[name]
                todo.append(packages[name])
            elif name not in packages and re.match(r"nsa(-|$)", name):
                raise Failure(f"{name} is required but is no package of this repository")
    return needed


def run(command: list[str | Path], *, cwd: Path | None = None, check: bool = False) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` without the environment variables that would let the checkout in.

    What the command prints is kept; where it fails and `check` is set, it is printed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment["OMP_NUM_THREADS"] = "1"  # as many packages are tried as there are cores
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if check and done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(map(str, command))}: exit status {done.returncode}")
    return done


def build(packages: dict[str, Package]) -> None:
    """What `hatch build --all` does, after removing what earlier builds of these packages left in dist/."""
    for package in packages.values():
        for old in DIST.glob(f"{package.module}-[0-9]*"):
            old.unlink()
        run([sys.executable, "-m", "hatchling", "build", "-d", DIST], cwd=package.folder, check=True)
        if not wheel_of(package).is_file():
            raise SystemExit(f"{package.name}: no {wheel_of(package).name} in dist/ after the build")


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def purelib_of(environment: Path) -> Path:
    """The site-packages of a virtual environment."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run([python_of(environment), "-Ic", ask], check=True).stdout.strip())


def make_base(work: Path) -> Path:
    """An environment with the large, shared requirements and pip, which the children use too."""
    base = work / "base"
    venv.create(base, with_pip=True)
    run([python_of(base), *PIP, *BASE_REQUIREMENTS], check=True)
    return base


# A sibling that is missing is missing for every case of a test: one is enough here, `hatch run test` runs them all.
ONE_CASE = """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    first = {}
    for item in items:
        first.setdefault((item.path, item.parent.name, getattr(item, "originalname", item.name)), item)
    items[:] = first.values()
"""


def try_alone(
    package: Package, packages: dict[str, Package], base: Path, work: Path, say: Callable[[str], None]
) -> int:
    """Install, check and test one package in an environment of its own; returns how many tests passed."""
    needed = siblings(package, packages)
    child = work / package.name / "venv"
    venv.create(child)
    (purelib_of(child) / "base.pth").write_text(f"{purelib_of(base)}\n")
    wheels = [wheel_of(p) for p in (package, *needed.values())]
    installed = run([python_of(child), *PIP, *wheels])
    say(installed.stdout)
    if installed.returncode:
        raise Failure("the wheel does not install")

    names = [json.dumps(sorted(p.module for p in some.values())) for some in (needed, packages)]
    check = run([python_of(child), "-Ic", CHECK, package.module, *names], cwd=work)
    if check.returncode or check.stdout:
        raise Failure(check.stdout.strip() or "the import fails")

    # The root's pytest settings, by the root's own file; tests and settings lie outside the checkout.
    bench = work / package.name / "run"
    bench.mkdir()
    shutil.copy(ROOT / "pyproject.toml", bench)
    if not (package.folder / "tests").is_dir():
        raise Failure("it has no tests")
    shutil.copytree(package.folder / "tests", bench / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (bench / "conftest.py").write_text((ROOT / "conftest.py").read_text(encoding="utf-8") + ONE_CASE)
    report = bench / "report.xml"
    skips = ROOT / ".github" / "skips.toml"
    lane = ["--lane=wheels", f"--skips={skips}"]  # without `=` pytest would look there for tests
    words = ["-q", "-m", "not slow and not once", f"--junitxml={report}", *lane, "tests"]
    tested = run([python_of(child), "-P", "-m", "pytest", *words], cwd=bench)
    say(tested.stdout)
    if tested.returncode:  # 5, no test collected, included
        raise Failure("no test was collected" if tested.returncode == 5 else f"pytest exits {tested.returncode}")
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    passed = sum(int(s.get("tests", 0)) - int(s.get("skipped", 0)) for s in suites)
    if not passed:
        raise Failure("every test was skipped")
    return passed


@dataclass(frozen=True)
class Outcome:
    """What became of one package: how many tests passed, or what is wrong."""

    package: Package
    said: str
    seconds: float
    passed: int = 0
    failure: str = ""


def outcome(package: Package, packages: dict[str, Package], base: Path, work: Path) -> Outcome:
    """`try_alone`, and what it took."""
    said: list[str] = []
    start = time.monotonic()
    try:
        passed = try_alone(package, packages, base, work, said.append)
    except Failure as failure:
        return Outcome(package, "".join(said), time.monotonic() - start, failure=str(failure))
    return Outcome(package, "".join(said), time.monotonic() - start, passed)


def main() -> int:
    """Try the chosen packages, print the closing table, return the exit status."""
    packages = read_packages()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", action="append", choices=packages, help="only this one; repeatable")
    parser.add_argument("--keep", action="store_true", help="leave the environments for inspection")
    arguments = parser.parse_args()

    work = Path(tempfile.mkdtemp(prefix="wheels-alone-")).resolve()
    chosen = [packages[name] for name in arguments.package or packages]
    last = len(LONGEST_FIRST)
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    outcomes = []
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            making: Future[Path] = pool.submit(make_base, work)
            build(packages)
            base = making.result()
            tried = [
                pool.submit(outcome, package, packages, base, work)
                for package in sorted(chosen, key=lambda package: order.get(package.name, last))
            ]
            for future in tried:
                found = future.result()
                print(f"\n=== {found.package.name}\n{found.said}", flush=True)
                outcomes.append(found)
    finally:
        if arguments.keep:
            print(f"\nkept: {work}")
        else:
            shutil.rmtree(work)
    print(f"\n{'package':<20} {'version':<10} {'seconds':>7}  tests passed")
    for found in outcomes:
        result = f"FAILED: {found.failure}" if found.failure else found.passed
        print(f"{found.package.name:<20} {found.package.version:<10} {found.seconds:>7.1f}  {result}")
    return int(any(found.failure for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
