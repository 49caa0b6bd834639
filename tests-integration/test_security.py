"""Does the code keep what SECURITY.md promises? Every module that ships is parsed, and so are planted faults."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from nsa_routing import load_profile

ROOT = Path(__file__).parents[1]
MODULES = sorted(ROOT.glob("packages/*/src/**/*.py"))

# Top-level modules, or modules of packages, that no module here imports.
FORBIDDEN = {
    "pickle": {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"},
    "network": {
        "aiohttp", "asyncio", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket",
        "socketserver", "telnetlib", "torch.hub", "urllib", "urllib3", "webbrowser", "xmlrpc",
    },
    "code": {"code", "codeop", "runpy", "torch.utils.cpp_extension"},
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Calls by their dotted name, as imports in the same module spell it out.
CALLS = {
    "numpy.load": "pickle",
    "numpy.save": "pickle",
    "torch.save": "pickle",
    "torch.jit.load": "pickle",
    "torch.package.PackageImporter": "pickle",
    "yaml.unsafe_load": "yaml",
    "yaml.unsafe_load_all": "yaml",
    "yaml.full_load": "yaml",
    "yaml.full_load_all": "yaml",
    "os.system": "shell",
    "os.popen": "shell",
    "subprocess.getoutput": "shell",
    "subprocess.getstatusoutput": "shell",
    "importlib.import_module": "code",
}
PROGRAMS = {"git"}  # what may be run: nsa-bench notes the commit that it measures


def names_of(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`t.load` as `torch.load` where t is torch; an empty string for what is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (value := dotted(node.value, names)):
        return f"{value}.{node.attr}"
    return ""


def is_true(call: ast.Call, keyword: str) -> bool:
    """Whether the call says keyword=True, in so many words."""
    given = {k.arg: k.value for k in call.keywords}.get(keyword)
    return isinstance(given, ast.Constant) and given.value is True


def safe_loaders(tree: ast.Module, names: dict[str, str]) -> set[str]:
    """SafeLoader, and the module's own classes that are made of it alone."""
    own = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [dotted(base, names) for base in node.bases] == ["yaml.SafeLoader"]
    }
    return own | {"yaml.SafeLoader", "yaml.CSafeLoader"}


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Lines that break a promise, with the promise's name."""
    tree = ast.parse(source)
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            )
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            for kind, modules in FORBIDDEN.items():
                if any(name == module or name.startswith(f"{module}.") for name in imported for module in modules):
                    yield node.lineno, kind
        elif isinstance(node, ast.Attribute) and dotted(node, names) in FORBIDDEN["network"] | FORBIDDEN["code"]:
            yield node.lineno, "network" if dotted(node, names) in FORBIDDEN["network"] else "code"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, kind) for kind in kinds_of(node, tree, names))


def kinds_of(call: ast.Call, tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    """The promises that a call breaks."""
    name = dotted(call.func, names)
    keywords = {k.arg for k in call.keywords}
    if name in BUILTINS:
        yield "code"
    elif name in CALLS:
        yield CALLS[name]
    elif name in ("yaml.load", "yaml.load_all"):
        loaders = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "Loader")]
        if [dotted(loader, names) in safe_loaders(tree, names) for loader in loaders] != [True]:
            yield "yaml"
    elif name == "torch.load" and not is_true(call, "weights_only"):
        yield "pickle"
    elif name.startswith("subprocess."):
        arguments = [*call.args[:1], *(k.value for k in call.keywords if k.arg == "args")]
        first = arguments[0].elts[:1] if arguments and isinstance(arguments[0], ast.List) else []
        programs = [element.value for element in first if isinstance(element, ast.Constant)]
        if "shell" in keywords or None in keywords or len(programs) != 1 or programs[0] not in PROGRAMS:
            yield "shell"
    if "trust_remote_code" in keywords:
        yield "network"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.relative_to(ROOT / "packages").as_posix())
def test_a_module_keeps_the_promises(module: Path) -> None:
    assert list(faults(module.read_text(encoding="utf-8"))) == []


def test_every_package_was_looked_at() -> None:
    assert {module.relative_to(ROOT).parts[1] for module in MODULES} == {
        folder.name for folder in (ROOT / "packages").iterdir() if (folder / "pyproject.toml").is_file()
    }


@pytest.mark.parametrize(
    ("source", "promise"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import marshal as m", "pickle"),
        ("def f():\n    import joblib", "pickle"),
        ("import torch\ntorch.load('x')", "pickle"),
        ("from torch import load\nload('x', weights_only=False)", "pickle"),
        ("import torch\ntorch.load('x', weights_only=only)", "pickle"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "pickle"),
        ("import torch as t\nt.save({}, 'x')", "pickle"),
        ("import yaml\nyaml.load(text)", "yaml"),
        ("import yaml\nyaml.load(text, yaml.Loader)", "yaml"),
        ("import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)", "yaml"),
        ("from yaml import load, FullLoader\nload(text, FullLoader)", "yaml"),
        ("import yaml\nclass L(yaml.Loader): pass\nyaml.load(text, L)", "yaml"),
        ("import yaml\nclass L(yaml.SafeLoader, yaml.Loader): pass\nyaml.load(text, L)", "yaml"),
        ("import yaml\nyaml.unsafe_load(text)", "yaml"),
        ("from yaml import full_load as read\nread(text)", "yaml"),
        ("eval('1')", "code"),
        ("def f(text):\n    exec(text)", "code"),
        ("compile(text, 'x', 'exec')", "code"),
        ("__import__(name)", "code"),
        ("import importlib\nimportlib.import_module(name)", "code"),
        ("from importlib import import_module\nimport_module(name)", "code"),
        ("import runpy", "code"),
        ("from torch.utils import cpp_extension", "code"),
        ("import torch\ntorch.utils.cpp_extension.load('x')", "code"),
        ("import urllib.request", "network"),
        ("from urllib import request", "network"),
        ("import requests", "network"),
        ("from http.client import HTTPConnection", "network"),
        ("import socket", "network"),
        ("from torch import hub", "network"),
        ("import torch\ntorch.hub.load('x', 'y')", "network"),
        ("model.from_pretrained('x', trust_remote_code=True)", "network"),
        ("import os\nos.system('ls')", "shell"),
        ("from subprocess import run\nrun('git status', shell=True)", "shell"),
        ("import subprocess\nsubprocess.run(['git'], shell=on)", "shell"),
        ("import subprocess\nsubprocess.run(['sh', '-c', text])", "shell"),
        ("import subprocess\nsubprocess.Popen(words)", "shell"),
        ("import subprocess\nsubprocess.run(['git'], **options)", "shell"),
    ],
)
def test_a_planted_fault_is_found(source: str, promise: str) -> None:
    assert promise in {kind for _, kind in faults(source)}


@pytest.mark.parametrize(
    "source",
    [
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, yaml.SafeLoader)",
        "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load(text, Loader=L)",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch\ntorch.compile(f)",
        "import re\nre.compile('x')",
        "model.eval()",
        "import subprocess\nsubprocess.run(['git', *words])",
        "import importlib.metadata\nimportlib.metadata.version('nsa')",
        "from .http import page",
    ],
)
def test_what_is_harmless_is_let_be(source: str) -> None:
    assert list(faults(source)) == []


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system ['touch planted']", "!!python/name:os.system", "!!python/module:os"]
)
def test_a_profile_cannot_run_code(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"name: mine\nextends: base\nsource: {value}\n")
    with pytest.raises(ValueError, match=r"could not determine a constructor for the tag 'tag:yaml\.org,2002:python/"):
        load_profile(tmp_path / "mine.yaml")
    assert not (tmp_path / "planted").exists()
