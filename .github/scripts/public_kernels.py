"""The Triton kernels of nsa-kernels-triton, compiled or interpreted: what scripts must not leave out."""

import pkgutil
from importlib import import_module

from nsa_kernels_triton import kernels
from triton.runtime.jit import KernelInterface


def all_kernels() -> set[str]:
    """Every public jitted function of the package whose name ends in `_kernel`. Imports all modules of kernels."""
    found = set()
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(import_module(info.name)).items():
            if isinstance(value, KernelInterface) and name.endswith("_kernel") and not name.startswith("_"):
                found.add(name)
    return found
