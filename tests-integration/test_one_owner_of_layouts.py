"""Does `VarlenLayout` alone decide where the sequences of a packed batch begin and end? Every module is parsed."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGES = Path(__file__).parents[1] / "packages"
OWNERS = ("nsa_varlen/layout.py", "nsa_varlen/buckets.py", "nsa_varlen/benchmarks/inputs.py")  # the last: random walks
# What turns lengths into offsets, offsets into rows, or rows into sequences.
LAYING_OUT = {
    "accumulate",
    "bucketize",
    "cumsum",
    "cumsum_",
    "cumulative_sum",
    "digitize",
    "repeat_interleave",
    "searchsorted",
}
OFFSETS = "cu_seqlens"


def last_name(node: ast.AST) -> str:
    """The name that an expression ends in: `x` of x and of a.b.x; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def bindings(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, value) for each name that `node` binds or passes as a keyword; matching tuples are taken apart."""
    if isinstance(node, ast.keyword):
        yield node.arg or "", node.value
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
        pairs = [(t, node.value) for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
        while pairs:
            target, value = pairs.pop()
            if isinstance(target, ast.Tuple | ast.List):
                matched = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
                pairs.extend(zip(target.elts, value.elts if matched else [value] * len(target.elts), strict=True))
            else:
                yield last_name(target), value
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        yield from ((last_name(n), node.iter) for n in ast.walk(node.target) if isinstance(n, ast.Name | ast.Attribute))


def violations(packages: Path) -> list[str]:
    """What breaks the rule, as `package/module.py:line what`. The rule, outside the owners:

    1. no name of LAYING_OUT is used or imported, called or not, but of `tl`: what a Triton kernel sums up on the chip
       lays out no tensors;
    2. a name that begins with cu_seqlens is bound, by assignment, keyword, loop or `:=`, to nothing but another such
       name or a field of a layout by such a name, unchanged.
    """
    found = []
    for source in packages.glob("*/src"):
        for module in source.rglob("*.py"):
            name = module.relative_to(source).as_posix()
            if name in OWNERS:
                continue
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                on_chip = isinstance(node, ast.Attribute) and last_name(node.value) == "tl"
                if last_name(node) in LAYING_OUT and not on_chip:
                    found.append(f"{name}:{node.lineno} uses {last_name(node)}")
                if isinstance(node, ast.ImportFrom):
                    names = [alias.name for alias in node.names if alias.name in LAYING_OUT]
                    found += [f"{name}:{node.lineno} imports {imported}" for imported in names]
                for bound, value in bindings(node):
                    if bound.startswith(OFFSETS) and not last_name(value).startswith(OFFSETS):
                        found.append(f"{name}:{value.lineno} builds {bound}")
    return sorted(found)


def test_only_the_owners_lay_sequences_out() -> None:
    assert violations(PACKAGES) == []


def test_the_owners_exist_and_would_be_reported_themselves(tmp_path: Path) -> None:
    """An exception that excuses nothing is to be deleted."""
    for owner in OWNERS:
        (path,) = PACKAGES.glob(f"*/src/{owner}")
        copy = tmp_path / path.stem / "src" / "elsewhere" / "module.py"
        copy.parent.mkdir(parents=True)
        shutil.copy(path, copy)
        assert violations(tmp_path), owner
        shutil.rmtree(tmp_path / path.stem)


PLANTED = {
    "ends = lengths.cumsum(0)": ["uses cumsum"],
    "from itertools import accumulate": ["imports accumulate"],
    "import itertools as it\nends = list(it.accumulate(lengths))": ["uses accumulate"],
    "count = torch.cumsum\nends = count(lengths, 0)": ["uses cumsum"],
    "def f(x):\n    return torch.repeat_interleave(x, x)": ["uses repeat_interleave"],
    "row = np.searchsorted(ends, i)": ["uses searchsorted"],
    "row = torch.bucketize(i, ends)": ["uses bucketize"],
    "cu_seqlens = torch.tensor([0, 3])": ["builds cu_seqlens"],
    "call(cu_seqlens_q=torch.arange(0, 9, 3))": ["builds cu_seqlens_q"],
    "call(cu_seqlens_k=layout.cu_seqlens_k + 1)": ["builds cu_seqlens_k"],
    "self.cu_seqlens = layout.cu_seqlens_k[:-1]": ["builds cu_seqlens"],
    "cu_seqlens_q, total = make(), 3": ["builds cu_seqlens_q"],
    "cu_seqlens_q, cu_seqlens_k = layout.cu_seqlens_q, None": ["builds cu_seqlens_k"],
    "if (cu_seqlens := make()) is None:\n    pass": ["builds cu_seqlens"],
    "for cu_seqlens in lists:\n    pass": ["builds cu_seqlens"],
    # These are fine: fields of a layout and names handed on as they are, and words in strings.
    "cu_seqlens = layout.compressed(blocks).cu_seqlens": [],
    "cu_seqlens_q, total = layout.host.cu_seqlens_q, layout.total_q": [],
    "def f(cu_seqlens):\n    return call(cu_seqlens_k=cu_seqlens, x='cumsum')": [],
    "first = layout.cu_seqlens_k[:-1].long()": [],
    "rank = tl.cumsum(chosen, 0)": [],
}


def test_planted_violations_are_reported(tmp_path: Path) -> None:
    for number, source in enumerate(PLANTED):
        path = tmp_path / "some-package" / "src" / "some_package" / f"planted_{number:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    found: dict[str, list[str]] = {source: [] for source in PLANTED}
    for violation in violations(tmp_path):
        module, what = violation.split(" ", 1)
        found[list(PLANTED)[int(module.split("planted_")[1][:2])]].append(what)
    assert found == PLANTED
