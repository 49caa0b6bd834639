"""Does every pair of packages work together, as wheels, with nothing of the family installed but what they require?

All of them together is what the other modules here are about.
"""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from built_packages import PACKAGES, Built, siblings, unpack, without_the_family

# What a program finds where these packages, and nothing else of the family, are installed.
PROGRAM = """
import importlib, json, sys
from importlib.metadata import entry_points

names = {"nsa", "nsa_varlen", "nsa_routing", "nsa_kernels_triton", "nsa_fa2", "nsa_bench"}
found = {name for name in names if importlib.util.find_spec(name)}
for name in sys.argv[1:]:
    importlib.import_module(name)
said = {
    "found": sorted(found),
    "loaded early": sorted({"triton", "flash_attn", "matplotlib"} & sys.modules.keys()),
    "backends": sorted(point.name for point in entry_points(group="nsa.backends")),
}
if "nsa_routing" in found:
    import torch
    from nsa_routing import Problem, dispatch, plan_for

    problem = Problem("window_attention", "cpu", torch.float32, 8, 8, 2, total_q=8, max_seqlen_q=5, max_seqlen_k=5)
    said["plan"] = plan_for(problem).backend
    if "nsa_varlen" in found:
        from nsa_varlen import reference
        from nsa_varlen.op_inputs import op_inputs

        sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "device": "cpu"}
        (q, k, v, layout, blocks), _ = op_inputs("window_attention", [5, 3], **sizes)
        out, _ = dispatch("window_attention", problem)(q, k, v, layout, blocks)
        exact, _ = reference.window_attention(q.double(), k.double(), v.double(), layout, blocks)
        said["error"] = float((out - exact).abs().max())
if "nsa_bench" in found:
    from nsa_bench.workload import load_workloads

    workloads, broken = load_workloads()
    said |= {"workloads": sorted({name.partition(".")[0] for name in workloads}), "broken": broken}
if "nsa" in found:
    import torch
    from nsa import NSAAttention, NSAConfig

    layer = NSAAttention(NSAConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8))
    said["shape"] = list(layer(torch.randn(2, 40, 32)).shape)
print(json.dumps(said))
"""
BACKENDS = {"nsa-varlen": ["sdpa"], "nsa-kernels-triton": ["triton"], "nsa-fa2": ["cudnn", "fa2", "fa2-torch"]}


def run(pair: tuple[str, ...], folder: Path, built: dict[str, Built]) -> tuple[set[str], dict[str, Any]]:
    """(packages that are there, what the program said)."""
    there = set().union(*(siblings(name, built) for name in pair))
    bare, own = folder / "bare", folder / "own"
    bare.mkdir()
    without_the_family(bare)
    unpack((built[name].wheel for name in there), own)
    code = f"import sys; sys.path[:0] = [{str(own)!r}, {str(bare)!r}]\n{PROGRAM}"
    modules = [name.replace("-", "_") for name in pair]
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return there, json.loads(done.stdout)


# That of each with nsa, which loads the most, in the first tier.
PAIRS = [x if "nsa" in x else pytest.param(x, marks=pytest.mark.slow) for x in combinations(PACKAGES, 2)]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_a_pair_works_without_the_others(pair: tuple[str, ...], built: dict[str, Built], tmp_path: Path) -> None:
    there, said = run(pair, tmp_path, built)
    assert said["found"] == sorted(name.replace("-", "_") for name in there)
    assert said["loaded early"] == []
    assert said["backends"] == sorted(backend for name in there for backend in BACKENDS.get(name, []))
    if "nsa-routing" in there:
        assert said["plan"] == ("sdpa" if "nsa-varlen" in there else None)
        assert said.get("error", 0.0) <= 5e-5
    if "nsa-bench" in there:
        assert said["broken"] == {}
        assert ("nsa" in said["workloads"], "dense" in said["workloads"]) == ("nsa" in there, "nsa-varlen" in there)
    assert said.get("shape") == ([2, 40, 32] if "nsa" in there else None)


def test_a_missing_package_is_missed(built: dict[str, Built], tmp_path: Path) -> None:
    """The links hide this family: what an environment of the checkout has does not leak into a pair."""
    _, said = run(("nsa-bench", "nsa-routing"), tmp_path, built)
    assert (said["found"], said["backends"], said["workloads"]) == (["nsa_bench", "nsa_routing"], [], [])
