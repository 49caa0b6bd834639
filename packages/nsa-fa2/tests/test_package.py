"""What is installed: the version, three backends to be found by name, and an import that stays light."""

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import nsa_fa2
import pytest
import torch

BACKENDS = {"fa2": nsa_fa2.FA2, "fa2-torch": nsa_fa2.FA2_TORCH, "cudnn": nsa_fa2.CUDNN}
OPS = {"compressed_attention", "selected_attention", "window_attention"}


def test_version_is_the_metadata_version() -> None:
    assert nsa_fa2.__version__ == distribution("nsa-fa2").version


def test_backends_are_found_by_name() -> None:
    found = distribution("nsa-fa2").entry_points
    assert {point.group for point in found} == {"nsa.backends", "nsa.bench"}
    assert {point.name: point.load() for point in found.select(group="nsa.backends")} == BACKENDS


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_its_name_and_the_attention_operations(name: str) -> None:
    assert BACKENDS[name].name == name
    assert {x for x in dir(BACKENDS[name]) if not x.startswith("_")} == OPS | {"kernel", "missing", "name", "refuse"}


ASKED = """
import sys, torch, nsa_fa2
from types import SimpleNamespace as Some
problem = Some(device="cuda", dtype=torch.float16, head_dim=64, v_head_dim=64)
machine = Some(sm=90, torch="2.11.0", flash_attn="2.8.3", cudnn=91900)
print([backend.refuse("window_attention", problem, machine) for backend in (nsa_fa2.FA2, nsa_fa2.FA2_TORCH)])
print(*{"triton", "flash_attn"} & sys.modules.keys())
"""


@pytest.mark.parametrize("stub", [False, True], ids=["as-it-is", "flash-attn-there"])
def test_import_and_refusals_are_light(stub: bool, tmp_path: Path) -> None:
    """Where flash_attn could be imported, too; it would raise."""
    if stub:
        (tmp_path / "flash_attn.py").write_text("raise RuntimeError('imported')\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", ASKED], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stderr == ""
    old = "needs torch 2.7 or newer, got 2.11.0"  # by the operations that this torch has, whatever it is said to be
    assert done.stdout.splitlines() == [str([None, old if torch.__version__ < (2, 7) else None]), ""]
