"""Does every block of code on every page run, and print what it says? What cannot run here is parsed at least."""

import contextlib
import doctest
import io
import json
import re
import shlex
import shutil
import tomllib
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import nsa_bench.cli
import nsa_routing.cli
import pytest
import torch
import typer
import yaml
from commands import behind, parse, read, run
from nsa_routing import load_profile
from pages import BLOCKS, PAGES, ROOT, Block, of_language

LANGUAGES = ("python", "console", "yaml", "toml", "json", "csv", "text")  # text: figures, formulas, logs
DIFFER = doctest.OutputChecker().check_output

# Commands that are parsed only: their program is asked whether it understands them.
NOT_RUN = {
    "hatch run demo": "minutes, and a model from an index",
    "hatch run test": "minutes: it would be this suite itself",
    "hatch run integration --wheels build": "minutes: this suite, against wheels",
    "hatch run bench run *": "measures for minutes",
    "hatch run gpu:*": "needs a GPU",
    "hatch run kernels:compile": "minutes, and an environment of its own",
    "hatch run release *": "minutes, and makes a release: test_release.py does, in checkouts of its own",
    "hatch run wheels:*": "an environment of its own; test_release.py covers what they ask",
    "git *": "of the checkout that the tests run in",
    "nsa-bench run *": "measures for minutes",
    "nsa-routing tune *": "measures for minutes, or wants the oracle to be an installed backend",
    "pip install fla-core": "takes from an index",
    "pip install native-sparse-attention-pytorch": "takes from an index",
    "pip install nsa*": "takes from an index",
    "pip install 'nsa*": "takes from an index",
    "pytest -m gpu *": "needs a GPU",
    "python .github/scripts/lane.py *": "needs a GPU",
    "python bench/*": "needs a GPU",
}
# Files that commands above would have made, or that readers bring along: here each is this one.
MEASURED = ROOT / "bench" / "results" / "decode-h200-2026-11-29.csv"
MADE = (
    *("decode.csv", "before.csv", "out/decode.csv", "bench/results/BEFORE.csv"),
    *("out/bench_decode-cpu-DATE.csv", "out/bench_decode-GPU-DATE.csv"),
)
PROGRAMS = {"serve.py": "import nsa_routing\n\nnsa_routing.Policy.from_env()\n"}
# Output that is shown and not compared.
OF_ANOTHER_MACHINE = {
    "nsa-routing check": "it has other versions, and sdpa alone",
    "nsa-routing explain --sm 90 --op window_attention": "it has no package of Triton kernels",
}


def console(block: Block) -> list[tuple[str, str]]:
    """(command, what is shown below it) of a block, a command on several lines as one."""
    parts = re.split(r"^\$ ", block.text.replace("\\\n", ""), flags=re.MULTILINE)[1:]
    lines = [(shlex.split(line, comments=True), shown) for line, _, shown in (part.partition("\n") for part in parts)]
    return [(shlex.join(words).replace("'>'", ">"), shown) for words, shown in lines]


COMMANDS = [(command, shown) for block in of_language("console") for command, shown in console(block)]


COMMAND = re.compile(r"^ *(?:\$|>>>) ", re.MULTILINE)  # what a block of text has not: it would not be run
HIDDEN = re.compile(
    r"^ *~~~.*|^(?:[>\t]|[-*+] |\d+\. )[^`\n]{0,3}```.*|(?<=\n\n)(?: {4}|\t)[^\s`].*|<(?:pre|code)\b.*", re.MULTILINE
)


def hidden_code(text: str) -> list[str]:
    """Where code begins that is in no fence. No list here has a second paragraph as deep as a block of code."""
    return HIDDEN.findall(re.sub(r"^( *)```.*\n(?:.*\n)*?\1```$", "", text, flags=re.MULTILINE))


def listed(command: str, table: dict[str, str]) -> list[str]:
    """Entries of a table that speak of it."""
    return [pattern for pattern in table if fnmatchcase(command, pattern)]


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_says_what_is_in_it(page: str) -> None:
    blocks = [block for block in BLOCKS if block.page == page]
    fences = re.findall(r"^ *```", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(blocks)
    assert [f"{block.name}: {block.language!r}" for block in blocks if block.language not in LANGUAGES] == []
    assert [b.name for b in blocks if b.language == "console" and not b.text.startswith("$ ")] == []
    assert [b.name for b in blocks if b.language == "text" and COMMAND.search(b.text)] == []


@pytest.mark.parametrize("page", PAGES)
def test_there_is_no_code_but_in_fences(page: str) -> None:
    """Markdown knows other ways to write a block, which nothing here would run."""
    assert hidden_code(PAGES[page].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "~~~python\nx\n~~~\n",
        "> ```python\n> x\n> ```\n",
        "- ```python\n  x\n  ```\n",
        "1. ```python\n   x\n   ```\n",
        "\t```python\n\tx\n\t```\n",
        "So:\n\n    import nsa\n",
        "<pre>import nsa</pre>\n",
    ],
)
def test_code_in_no_fence_is_found(text: str) -> None:
    assert hidden_code(text) != []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("page", sorted({block.page for block in of_language("python")}))
def test_the_python_of_a_page_prints_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block, as one program whose lines have the numbers that they have on the page."""
    monkeypatch.chdir(tmp_path)
    # Dynamo traces what the page compiles. What Inductor makes of it takes a minute: test_compiled_layer.py.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    code = ""
    for block in of_language("python"):
        if block.page == page:
            code += "\n" * (block.line - code.count("\n")) + block.text
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, PAGES[page], "exec"), {"__name__": "__main__"})
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(expected) == len(re.findall(r"\bprint\(", code)) > 0
    assert printed.getvalue().splitlines() == expected


def test_there_is_python_of_the_family_and_of_routing_alone() -> None:
    assert {"README.md", "packages/nsa-routing/README.md"} <= {block.page for block in of_language("python")}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, less what is made in it."""
    without = shutil.ignore_patterns(".git", "dist", "out", "site", "__pycache__", ".*_cache", ".hypothesis")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("repository") / "copied", symlinks=True, ignore=without))


@pytest.fixture
def checkout(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of the repository, in which commands may write."""
    for path in copied.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
        elif path.name != "bench":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(copied / "bench", tmp_path / "bench", symlinks=True)
    (tmp_path / "out").mkdir()
    for name in MADE:
        shutil.copy(MEASURED, tmp_path / name)
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.mark.parametrize("block", of_language("console"), ids=lambda block: block.name)
def test_the_commands_of_a_block_run_or_are_understood(
    block: Block, checkout: Path, request: pytest.FixtureRequest
) -> None:
    exported: dict[str, str] = {}
    for line, shown in console(block):
        command, reasons = read(line), listed(line, NOT_RUN)
        parts = behind(command.words)
        if reasons or command.words[0] == "export":
            for environment, words in parts:
                parse(environment, words, request.config)
            if not reasons:
                exported |= dict(word.split("=", 1) for word in command.words[1:])
            continue
        assert {environment for environment, _ in parts} == {"default"}, f"{line}: NOT_RUN says why it is not run here"
        printed = "".join(run(words, exported | command.variables) for _, words in parts)
        if command.into:
            Path(command.into).write_text(printed)
            printed = ""
        if shown and not listed(line, OF_ANOTHER_MACHINE):
            assert DIFFER(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), printed


def test_what_is_not_run_is_on_a_page() -> None:
    stale = [pattern for pattern in NOT_RUN if not any(listed(command, {pattern: ""}) for command, _ in COMMANDS)]
    shown = [command for command, shown in COMMANDS if shown.strip()]
    stale += [pattern for pattern in OF_ANOTHER_MACHINE if not any(listed(c, {pattern: ""}) for c in shown)]
    words = " ".join(command for command, _ in COMMANDS).replace("bench_*", "bench_decode").split()
    assert stale + [name for name in (*MADE, *PROGRAMS) if name not in words] == []


def test_commands_in_sentences_and_tables_name_scripts_that_exist() -> None:
    texts = [re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in PAGES.values()]
    named = {name for text in texts for name in re.findall(r"`hatch run ([\w:.-]+)[^`]*`", text)}
    programs = {words[0] for name in named for _, words in behind(["hatch", "run", name])}
    assert {"docs:build", "test"} <= named
    checkers = {"check-jsonschema", "mkdocs", "mypy", "pytest", "ruff", "shellcheck", "twine", "zizmor"}
    assert programs <= {"python", "pip", "nsa-bench", "nsa-routing"} | checkers


@pytest.mark.parametrize(("program", "app"), [("nsa-bench", nsa_bench.cli.app), ("nsa-routing", nsa_routing.cli.app)])
def test_commands_in_sentences_and_tables_have_their_options(program: str, app: typer.Typer) -> None:
    texts = [re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in PAGES.values()]
    said = {command for text in texts for command in re.findall(rf"`(?:[A-Z_]+=\S+\s+)*{program}\s+([^`]+)`", text)}
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert len(said) > 3
    for name, *words in map(str.split, said):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, (program, name, words)


@pytest.mark.parametrize("block", of_language("yaml"), ids=lambda block: block.name)
def test_yaml_is_sound(block: Block, tmp_path: Path) -> None:
    """As a profile, if it is one."""
    document = yaml.safe_load(block.text)
    assert document
    if document.keys() & {"extends", "order", "presets", "thresholds"}:
        file = tmp_path / "profile.yaml"
        file.write_text(block.text)
        assert load_profile(file).name == document["name"]


@pytest.mark.parametrize("block", of_language("toml") + of_language("json"), ids=lambda block: block.name)
def test_toml_and_json_are_sound(block: Block) -> None:
    assert {"toml": tomllib.loads, "json": json.loads}[block.language](block.text)
