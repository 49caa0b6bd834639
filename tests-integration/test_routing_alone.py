"""Does nsa-routing with one package of backends do without nsa?"""

import subprocess
import sys

SCRIPT = """
import importlib.abc
import sys


class NoNsa(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "nsa" or name.startswith("nsa."):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


sys.meta_path.insert(0, NoNsa())
try:
    import nsa
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("nsa was not blocked")

import torch
from nsa_routing import Problem, closed, dispatch, explain, plan_for, probe
from nsa_varlen import BlockGeometry, VarlenLayout, reference

machine = probe("cpu")
assert "sdpa" in machine.backends, machine
layout, blocks = VarlenLayout.from_lengths([5, 9], [7, 9]), BlockGeometry(window_size=3)
torch.manual_seed(0)
q, k, v = torch.randn(14, 4, 8), torch.randn(16, 2, 8), torch.randn(16, 2, 6)
problem = Problem(
    "window_attention", "cpu", q.dtype, 8, 6, 2,
    window_size=3, total_q=layout.total_q, max_seqlen_q=layout.max_seqlen_q, max_seqlen_k=layout.max_seqlen_k,
)
assert plan_for(problem).backend == "sdpa"
assert explain(plan_for(problem)).splitlines()[-1].split() == ["sdpa", "chosen"]
out, lse = dispatch("window_attention", problem)(q, k, v, layout, blocks)
exact, _ = reference.window_attention(q.double(), k.double(), v.double(), layout, blocks)
# At most 3 keys a query and values of order one: a few roundings of fp32.
assert (out - exact).abs().max() <= 5e-5
assert out.shape == (14, 4, 6) and lse.shape == (4, 14)
assert closed() == frozenset()
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("nsa", "triton", "flash_attn")))
"""


def test_routing_and_varlen_run_an_operation_without_nsa() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def loaded(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_routing_brings_no_compiler() -> None:
    """Triton and Dynamo take seconds to load: whoever compiles brings them."""
    more = loaded("import nsa_routing; nsa_routing.probe()") - loaded("import torch")
    assert "nsa_routing.dispatching" in more
    assert not {name for name in more if name.partition(".")[0] in ("triton", "flash_attn", "nsa", "nsa_varlen")}
    assert not {name for name in more if name.startswith(("torch._dynamo", "torch._inductor", "torch.fx"))}
