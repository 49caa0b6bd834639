"""Scripts that compile kernels, from a run of tests that interprets them."""

import os
import subprocess
import sys

from built_packages import ROOT


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run this Python beside .github/scripts, in a process of its own: Triton asks once whether to interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT / ".github" / "scripts"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run([sys.executable, "-c", script, *words], env=environment, capture_output=True, text=True)
