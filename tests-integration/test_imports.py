"""Who may import whom. The table below is the rule; every module of every package is parsed and held against it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGES = Path(__file__).parents[1] / "packages"


@dataclass(frozen=True)
class Allowed:
    """What a package may import besides the standard library and itself.

    `lazy` modules come from extras or are slow to import: only inside functions, never while a module loads.
    """

    siblings: frozenset[str] = frozenset()
    third_party: frozenset[str] = frozenset()
    lazy: frozenset[str] = frozenset()


ALLOWED = {
    "nsa_varlen": Allowed(third_party=frozenset({"torch"})),
    "nsa_kernels_triton": Allowed(frozenset({"nsa_varlen"}), frozenset({"torch", "triton"})),
    "nsa_fa2": Allowed(frozenset({"nsa_varlen"}), frozenset({"torch", "flash_attn"})),
    "nsa_routing": Allowed(third_party=frozenset({"torch", "packaging", "pydantic", "rich", "typer", "yaml"})),
    "nsa": Allowed(
        frozenset({"nsa_varlen", "nsa_routing"}),
        frozenset({"torch"}),
        lazy=frozenset({"transformers", "prometheus_client", "fla", "native_sparse_attention_pytorch"}),
    ),
    "nsa_bench": Allowed(third_party=frozenset({"numpy", "matplotlib", "typer", "rich"}), lazy=frozenset({"torch"})),
}
DISTRIBUTIONS = {  # where the names differ
    "yaml": "pyyaml",
    "flash_attn": "flash-attn",
    "prometheus_client": "prometheus-client",
}
UNDECLARED = {
    ("nsa_bench", "torch"),  # met through the workloads, which bring it
    ("nsa", "fla"),  # peers to be timed beside, where somebody installed them
    ("nsa", "native_sparse_attention_pytorch"),
}


@dataclass(frozen=True)
class Import:
    """One imported top-level name; `lazy` when a function has to run first."""

    name: str
    line: int
    lazy: bool


def imports(node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every absolute import below `node`, `import_module("name")` and `__import__("name")` included."""
    for child in ast.iter_child_nodes(node):
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            names = [child.module or ""]
        elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
            called = ast.unparse(child.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(child.args[0].value, str):
                names = [child.args[0].value]
        yield from (Import(name.partition(".")[0], child.lineno, lazy) for name in names if not name.startswith("."))
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, lazy or inside)


def violations(packages: Path) -> list[str]:
    """What the table forbids, as `package/module.py:line imports name`."""
    found = []
    for package, allowed in ALLOWED.items():
        (source,) = packages.glob(f"*/src/{package}")
        always = {package} | allowed.siblings | allowed.third_party | sys.stdlib_module_names
        for module in sorted(source.rglob("*.py")):
            for item in imports(ast.parse(module.read_text(encoding="utf-8"))):
                if item.name not in always and not (item.lazy and item.name in allowed.lazy):
                    found.append(f"{module.relative_to(source.parent).as_posix()}:{item.line} imports {item.name}")
    return found


def test_the_table_names_every_package() -> None:
    assert {p.name for p in PACKAGES.glob("*/src/*") if (p / "__init__.py").exists()} == ALLOWED.keys()


def test_imports_keep_to_the_table() -> None:
    assert violations(PACKAGES) == []


@pytest.mark.parametrize("package", ALLOWED)
def test_the_table_and_the_metadata_agree(package: str) -> None:
    project = tomllib.loads((PACKAGES / package.replace("_", "-") / "pyproject.toml").read_text())["project"]
    plain = {Requirement(r).name.lower() for r in project.get("dependencies", [])}
    extras = {Requirement(r).name.lower() for rs in project.get("optional-dependencies", {}).values() for r in rs}
    allowed = ALLOWED[package]
    assert {name.replace("-", "_") for name in plain if re.match(r"nsa(-|$)", name)} == allowed.siblings
    outside = {name for name in allowed.third_party | allowed.lazy if (package, name) not in UNDECLARED}
    assert {DISTRIBUTIONS.get(name, name) for name in outside} <= plain | extras


PLANTED = {
    "nsa_routing": "import nsa\n",
    "nsa_fa2": "def f():\n    from nsa_kernels_triton import x\n",
    "nsa_kernels_triton": "import importlib\nm = importlib.import_module('nsa.ops')\n",
    "nsa_varlen": "try:\n    import triton.language as tl\nexcept ImportError:\n    tl = None\n",
    "nsa": "import transformers\n\n\ndef f():\n    import transformers\n    import flash_attn\n",
    "nsa_bench": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from nsa_varlen import pack\n",
}


def test_planted_imports_are_reported(tmp_path: Path) -> None:
    copy = tmp_path / "packages"
    shutil.copytree(PACKAGES, copy, ignore=shutil.ignore_patterns("tests", "profiles", "__pycache__"))
    for package, source in PLANTED.items():
        (folder,) = copy.glob(f"*/src/{package}")
        (folder / "deeper").mkdir()
        (folder / "deeper" / "planted.py").write_text(source)
    assert sorted(violations(copy)) == [
        "nsa/deeper/planted.py:1 imports transformers",
        "nsa/deeper/planted.py:6 imports flash_attn",
        "nsa_bench/deeper/planted.py:4 imports nsa_varlen",
        "nsa_fa2/deeper/planted.py:2 imports nsa_kernels_triton",
        "nsa_kernels_triton/deeper/planted.py:2 imports nsa",
        "nsa_routing/deeper/planted.py:1 imports nsa",
        "nsa_varlen/deeper/planted.py:2 imports triton",
    ]


def heavy_after(statement: str, stubs: Path) -> set[str]:
    """Which of triton and flash_attn a fresh interpreter has loaded after `statement`.

    flash_attn is not installed here and `try: import flash_attn` would leave no trace: an empty stub stands in for it.
    """
    (stubs / "flash_attn.py").write_text("")
    code = f"import sys\n{statement}\nprint(*({{'triton', 'flash_attn'}} & sys.modules.keys()))"
    environment = os.environ | {"PYTHONPATH": str(stubs)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("package", ALLOWED)
def test_importing_a_package_is_light(package: str, tmp_path: Path) -> None:
    assert heavy_after(f"import {package}", tmp_path) == set()


def test_a_heavy_import_is_seen(tmp_path: Path) -> None:
    assert heavy_after("try:\n    import flash_attn\nexcept ImportError:\n    pass", tmp_path) == {"flash_attn"}
