"""Does the code keep what SECURITY.md promises? Every module that ships is parsed, and so are planted faults."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from nsa_routing import load_profile

ROOT = Path(__file__).parents[1]
MODULES = sorted(ROOT.glob("packages/*/src/**/*.py"))

# Modules that no module here imports, and neither what is in them.
FORBIDDEN = {
    "pickle": {
        "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "multiprocessing", "pickle", "shelve",
        "torch.multiprocessing",
    },
    "network": {
        "aiohttp", "asyncio", "ftplib", "http", "httpx", "huggingface_hub", "imaplib", "poplib", "requests", "smtplib",
        "socket", "socketserver", "ssl", "telnetlib", "torch.distributed", "torch.hub", "torch.utils.model_zoo",
        "urllib", "urllib3", "webbrowser", "wsgiref", "xmlrpc",
    },
    "code": {
        "code", "codeop", "imp", "importlib.machinery", "importlib.util", "pkgutil", "pydoc", "runpy",
        "torch.utils.cpp_extension", "zipimport",
    },
    "shell": {"pty"},
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
# What no module here names, called or handed on: dotted, as imports in the same module spell it out.
NAMES = {
    **{f"builtins.{name}": "code" for name in BUILTINS},
    "importlib.import_module": "code",
    "importlib.__import__": "code",
    "torch.ops.load_library": "code",
    "torch.classes.load_library": "code",
    "numpy.load": "pickle",
    "numpy.save": "pickle",
    "pandas.read_pickle": "pickle",
    "torch.save": "pickle",
    "torch.serialization.load": "pickle",
    "torch.serialization.save": "pickle",
    "torch.export.load": "pickle",
    "torch.jit.load": "pickle",
    "torch.package.PackageImporter": "pickle",
    **{f"yaml.{kind}Loader": "yaml" for kind in ("", "C", "Full", "CFull", "Unsafe", "CUnsafe")},
    **{f"yaml.{kind}_load{how}": "yaml" for kind in ("unsafe", "full") for how in ("", "_all")},
    "prometheus_client.push_to_gateway": "network",
    "prometheus_client.start_http_server": "network",
    "prometheus_client.start_wsgi_server": "network",
    "os.system": "shell",
    "os.popen": "shell",
    "os.startfile": "shell",
    "subprocess.getoutput": "shell",
    "subprocess.getstatusoutput": "shell",
}
FAMILIES = ("os.exec", "os.spawn", "os.posix_spawn")  # so begin the names of ways to run a program
# What is named only where it is called, for what it does is up to its arguments.
CALLED = {
    "torch.load": "pickle",
    "yaml.load": "yaml",
    "yaml.load_all": "yaml",
    **{f"subprocess.{name}": "shell" for name in ("run", "call", "check_call", "check_output", "Popen")},
    **{f"ctypes.{name}": "code" for name in ("CDLL", "WinDLL", "OleDLL", "PyDLL")},
    **{f"ctypes.{name}": "code" for name in ("cdll", "windll", "oledll", "pydll")},
}
PROGRAMS = {"git"}  # what may be run: nsa-bench notes the commit that it measures
LIBRARIES = {"libnvidia-ml.so.1", "nvml.dll"}  # what may be loaded: nsa-routing asks NVIDIA's for the driver


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


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`t.load` as `torch.load` where t is torch, getattr with a name in it too; an empty string for what is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, f"builtins.{node.id}" if node.id in BUILTINS else node.id)
    if isinstance(node, ast.Attribute) and (value := dotted(node.value, names)):
        return f"{value}.{node.attr}"
    if isinstance(node, ast.Call) and dotted(node.func, names) == "getattr" and len(node.args) > 1:
        value, name = dotted(node.args[0], names), node.args[1]
        if value and isinstance(name, ast.Constant):
            return f"{value}.{name.value}"
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


def of_modules(name: str) -> Iterator[str]:
    """The promises that a dotted name breaks by the module that it is, or is in."""
    for kind, modules in FORBIDDEN.items():
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            yield kind


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Lines that break a promise, with the promise's name."""
    tree = ast.parse(source)
    names = names_of(tree)
    imported = {name.partition(".")[0] for name in names.values()}
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, kind) for alias in node.names for kind in of_modules(alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, kind) for name in whole for kind in of_modules(name))
        elif isinstance(node, ast.Name | ast.Attribute | ast.Call) and (name := dotted(node, names)):
            if name.partition(".")[0] in imported:  # a variable may be called `code`
                yield from ((node.lineno, kind) for kind in of_modules(name))
            if name in NAMES or (name in CALLED and node not in called):
                yield node.lineno, (NAMES | CALLED)[name]
            if name.startswith(FAMILIES):
                yield node.lineno, "shell"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, kind) for kind in kinds_of(node, tree, names))


def kinds_of(call: ast.Call, tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    """The promises that a call breaks by its arguments."""
    name = dotted(call.func, names)
    keywords = {k.arg for k in call.keywords}
    if name in ("yaml.load", "yaml.load_all"):
        loaders = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "Loader")]
        if [dotted(loader, names) in safe_loaders(tree, names) for loader in loaders] != [True]:
            yield "yaml"
    elif name == "torch.load" and not is_true(call, "weights_only"):
        yield "pickle"
    elif name in CALLED and name.startswith("subprocess."):
        arguments = [*call.args[:1], *(k.value for k in call.keywords if k.arg == "args")]
        first = arguments[0].elts[:1] if arguments and isinstance(arguments[0], ast.List) else []
        programs = [element.value for element in first if isinstance(element, ast.Constant)]
        if keywords & {"shell", "executable", None} or len(programs) != 1 or programs[0] not in PROGRAMS:
            yield "shell"
    elif name in CALLED and name.startswith("ctypes."):
        given = call.args[0] if len(call.args) == 1 and not keywords else None
        libraries = [given.body, given.orelse] if isinstance(given, ast.IfExp) else [given]
        if not all(isinstance(library, ast.Constant) and library.value in LIBRARIES for library in libraries):
            yield "code"
    if "allow_pickle" in keywords:
        yield "pickle"
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
        ("import subprocess\nsubprocess.run(['git'], executable='/bin/sh')", "shell"),
        ("import subprocess\nrun = subprocess.run\nrun('ls')", "shell"),
        ("import os\nos.execvp('sh', words)", "shell"),
        ("from os import spawnlp\nspawnlp(os.P_WAIT, 'sh', 'sh')", "shell"),
        ("import os\nos.posix_spawn('/bin/sh', words, {})", "shell"),
        ("import pty", "shell"),
        ("from multiprocessing import Pool", "pickle"),
        ("import torch\nload = torch.load\nload('x')", "pickle"),
        ("import torch\ngetattr(torch, 'load')('x')", "pickle"),
        ("from torch.serialization import load\nload('x')", "pickle"),
        ("import numpy as np\nnp.lib.format.read_array(file, allow_pickle=True)", "pickle"),
        ("import yaml\nyaml.UnsafeLoader(text).get_data()", "yaml"),
        ("import yaml\nload = yaml.load\nload(text, yaml.SafeLoader)", "yaml"),
        ("import builtins\nbuiltins.eval(text)", "code"),
        ("from builtins import exec as run\nrun(text)", "code"),
        ("list(map(eval, texts))", "code"),
        ("import importlib.util\nimportlib.util.spec_from_file_location('x', path)", "code"),
        ("from importlib.machinery import SourceFileLoader", "code"),
        ("from pkgutil import resolve_name", "code"),
        ("import torch\ntorch.ops.load_library(path)", "code"),
        ("import ctypes\nctypes.CDLL(path)", "code"),
        ("import ctypes\nctypes.cdll.LoadLibrary(path)", "code"),
        ("import ctypes\nctypes.CDLL('nvml.dll' if windows else path)", "code"),
        ("from prometheus_client import start_http_server\nstart_http_server(8000)", "network"),
        ("import torch\ntorch.distributed.init_process_group()", "network"),
        ("from torch.utils import model_zoo", "network"),
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
        "import torch\ngetattr(torch, name)",
        "import ctypes\nctypes.CDLL('nvml.dll' if windows else 'libnvidia-ml.so.1')",
        "code = f(code)\ncode.append(1)",
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
