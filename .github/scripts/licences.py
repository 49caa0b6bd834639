"""Does a user get only licences that were looked at? `hatch run licences`

pip resolves the six packages with their extras, as it would for a user here, and reports the metadata of all that it
would install. Each statement of a distribution about its licence must be allowed: its SPDX expression, or else its
classifiers and its field `License` where that is a name and not a whole text. One that says nothing is not allowed.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from license_expression import ExpressionError, LicenseWithExceptionSymbol, get_spdx_licensing
from packaging.utils import canonicalize_name
from workspace import ROOT, Package, read_packages

# Those that were met and looked at; all allow use beside Apache-2.0. MPL-2.0 asks for changes to its own files only.
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "MIT",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Zlib",
}

# Names that are no SPDX identifiers.
NAMES = {
    "Apache 2.0 License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "ISC License": "ISC",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
}

# Under NVIDIA's own terms. Torch's build for CUDA, which is PyPI's on Linux, requires them; no package here ships or
# names one, and torch's build for CPUs needs none.
NVIDIA = {
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-cublas",
    "nvidia-cuda-cccl",
    "nvidia-cuda-cupti",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-cudnn-cu13",
    "nvidia-cufft",
    "nvidia-cufile",
    "nvidia-curand",
    "nvidia-cusolver",
    "nvidia-cusparse",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvjitlink",
    "nvidia-nvshmem-cu13",
    "nvidia-nvtx",
}

# Extras that pip cannot resolve without a CUDA compiler: (package, extra).
UNRESOLVED = {("nsa-fa2", "flash-attn")}  # flash-attn is BSD-3-Clause

LONGEST_NAME = 60  # of a licence; a longer field `License` is its text
SPDX = get_spdx_licensing()


def requirements(packages: Iterable[Package]) -> Iterator[str]:
    """Each package's folder with its extras, for pip in the root."""
    for package in packages:
        extras = [extra for extra in package.extras if (package.name, extra) not in UNRESOLVED]
        yield f"./packages/{package.folder.name}" + (f"[{','.join(extras)}]" if extras else "")


def resolved() -> list[dict[str, Any]]:
    """Core metadata of all that pip would install for the packages of the tree, itself included."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), *requirements(read_packages().values())]
        subprocess.run(command, cwd=ROOT, check=True)
        return [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]


def statements(metadata: dict[str, Any]) -> list[str]:
    """What a distribution says about its licence."""
    if expression := metadata.get("license_expression"):
        return [expression]
    said = [line for line in metadata.get("classifier", ()) if line.startswith("License :: ")]
    field = (metadata.get("license") or "").strip()
    return said + ([field] if field and "\n" not in field and len(field) <= LONGEST_NAME else [])


def allows(statement: str) -> bool:
    """Whether an expression or a name leaves a choice of licences that are all allowed."""
    try:
        parsed = SPDX.parse(NAMES.get(statement, statement), validate=True)
    except ExpressionError:
        return False
    return parsed is not None and _allows(parsed)


def _allows(node: Any) -> bool:
    if isinstance(node, SPDX.OR):
        return any(map(_allows, node.args))
    if isinstance(node, SPDX.AND):
        return all(map(_allows, node.args))
    if isinstance(node, LicenseWithExceptionSymbol):  # an exception only allows more
        node = node.license_symbol
    return node.key in ALLOWED


def refused(metadata: dict[str, Any]) -> str | None:
    """Why a distribution needs somebody to look at it; None if it does not."""
    name = canonicalize_name(metadata["name"])
    if name in NVIDIA:
        return None
    said = statements(metadata)
    if not said:
        return f"{name} {metadata['version']}: expected a licence, got none"
    wrong = [statement for statement in said if not allows(statement)]
    return f"{name} {metadata['version']}: licence not allowed: {'; '.join(wrong)}" if wrong else None


def main() -> int:
    """Print what everything is under, and what is refused; return the exit status."""
    found = sorted(resolved(), key=lambda metadata: canonicalize_name(metadata["name"]))
    for metadata in found:
        said = "; ".join(line.rpartition(" :: ")[2] for line in statements(metadata))
        print(f"{canonicalize_name(metadata['name']):<24} {metadata['version']:<14} {said}")
    wrong = [why for metadata in found if (why := refused(metadata))]
    print(f"\n{len(found)} distributions, {len(wrong)} refused", *wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
