"""Commands as pages show them: read, looked through down to what `hatch run` names, parsed without running, run.

Programs of Python run in this process, in the folder that it is in and with its environment: the import of torch is
paid once. Those that other packages' paths are set for, and those of the shell, run by themselves.
"""

import argparse
import contextlib
import glob
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import release
import typer.core
from built_packages import PACKAGES
from nsa_bench.suite import load_suite
from nsa_routing import Policy, reset
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import ROOT
from public_kernels import all_kernels

ENVIRONMENTS = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]
SHELL = ("git", "mkdir")  # taken as they are


class Command(NamedTuple):
    """A line after the `$`: variables before it, its words, the file that its output goes to."""

    variables: dict[str, str]
    words: list[str]
    into: str | None


def read(line: str) -> Command:
    """As a shell does, comments apart."""
    words = shlex.split(line, comments=True)
    variables = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    into = words.pop() if words[-2:-1] == [">"] else None
    return Command(variables, words[:-1] if into else words, into)


def behind(words: list[str]) -> list[tuple[str, list[str]]]:
    """What runs in the end, each in which environment of Hatch: a script of hatch.toml may name others."""
    if words[:2] != ["hatch", "run"]:
        return [("default", words)]
    environment, _, script = words[2].rpartition(":")
    environment = environment.partition(".")[0] or "default"  # "matrix.py3.12-newest" is one of "matrix"
    assert environment in ENVIRONMENTS, f"hatch.toml has no environment {environment}"
    scripts = ENVIRONMENTS[ENVIRONMENTS[environment].get("template", environment)].get("scripts", {})
    commands = release.behind(scripts | ENVIRONMENTS[environment].get("scripts", {}), [script, *words[3:]])
    return [found for command in commands for found in _within(environment, command)]


def _within(environment: str, words: list[str]) -> list[tuple[str, list[str]]]:
    return behind(words) if words[0] == "hatch" else [(environment, words)]


def parse(environment: str, words: list[str], config: pytest.Config) -> None:
    """Raise unless the program would understand its arguments."""
    program, *arguments = words
    if program == "python" and arguments[:2] == ["-m", "pip"]:
        program, arguments = "pip", arguments[2:]
    if program == "export":
        flags = dict(argument.split("=", 1) for argument in arguments)
        Policy.from_env({name: value for name, value in flags.items() if name.startswith("NSA_")})
    elif program == "pytest":
        _parse_pytest(arguments, config)
    elif program == "pip":
        _parse_pip(arguments)
    elif program == "python" or _entry_point(program):
        parsed = _parsed(words)
        if "suite" in parsed:
            load_suite(parsed["suite"])
    elif program not in SHELL:
        named = {canonicalize_name(Requirement(x).name) for x in ENVIRONMENTS[environment]["dependencies"]}
        assert program in named, f"{program}: no program that a test knows, nor one of environment {environment}"


def _parse_pytest(arguments: list[str], config: pytest.Config) -> None:
    known, unknown = config._parser.parse_known_and_unknown_args(arguments)  # it has no public one
    assert not unknown, f"pytest has no {unknown}"
    paths = [Path(path) for path in known.file_or_dir]
    assert all(path.exists() for path in paths), f"not all of {known.file_or_dir} are there"
    markers = {line.partition(":")[0] for line in config.getini("markers")}
    asked = set(re.findall(r"\w+", known.markexpr or "")) - {"not", "and", "or"}
    assert asked <= markers, f"no marker is called {asked - markers}"
    if known.keyword:
        texts = [file.read_text() for path in paths for file in path.glob("**/test_*.py")]
        assert any(re.search(rf"def test_\w*{known.keyword}", text) for text in texts), f"no test has {known.keyword}"


def _parse_pip(arguments: list[str]) -> None:
    from pip._internal.commands import create_command  # pip has no public parser

    command, *rest = arguments
    _, targets = create_command(command).parse_args(rest)
    for target in targets:
        path, _, extra = target.partition("[")
        if "/" in path:
            folder, extras = Path(path), {*filter(None, extra.rstrip("]").split(","))}
        else:
            requirement = Requirement(target)
            if canonicalize_name(requirement.name) not in PACKAGES:
                assert not requirement.name.startswith("nsa"), f"{target} is no package of this repository"
                continue
            folder, extras = ROOT / "packages" / requirement.name, requirement.extras
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        missing = extras - project.get("optional-dependencies", {}).keys()
        assert not missing, f"{target}: it has no extra {missing}"


class _Parsed(Exception):
    """Arguments were understood; what they say."""


def _parsed(words: list[str]) -> dict[str, Any]:
    """What a program makes of its arguments, stopped before it does anything."""
    # Some scripts want compiled kernels. Those that were imported before stay interpreted, as tests after this want.
    all_kernels()
    understand = argparse.ArgumentParser.parse_args

    def by_argparse(*given: Any, **more: Any) -> NoReturn:
        raise _Parsed(vars(understand(*given, **more)))

    def by_typer(command: object, context: Any) -> NoReturn:
        raise _Parsed(context.params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", by_argparse)
        patch.setattr(typer.core.TyperCommand, "invoke", by_typer)
        with pytest.raises(_Parsed) as parsed:
            run(words, {})
    return parsed.value.args[0]


def run(words: list[str], variables: dict[str, str]) -> str:
    """What it prints; it raises where the exit status is not 0."""
    words = [found for word in words for found in sorted(glob.glob(word)) or [word]]
    program = _entry_point(words[0])
    if words[0] == "python" and Path(words[1]).suffix == ".py":
        words = words[1:]
        program = lambda: runpy.run_path(words[0], run_name="__main__")  # noqa: E731
    if program is None or "PYTHONPATH" in variables:
        here = {**os.environ, **variables, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(words, env=here, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)} exits {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout
    printed, errors = io.StringIO(), io.StringIO()
    with _as_a_process(words, variables), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            program()
            status = None
        except SystemExit as end:
            status = end.code
    assert status in (0, None), f"{shlex.join(words)} exits {status}:\n{printed.getvalue()}{errors.getvalue()}"
    return printed.getvalue()


@contextlib.contextmanager
def _as_a_process(words: list[str], variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(words))
        os.environ.update(variables)
        reset()  # flags are read anew
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _entry_point(program: str) -> Callable[[], object] | None:
    """What the installed command of that name calls, of this family."""
    for point in entry_points(group="console_scripts", name=program):
        if point.dist is not None and point.dist.name in PACKAGES:
            return point.load()
    return None
