"""Tile sizes and launch parameters: data, one TOML file per SM family, chosen by rules.

A kernel's table is a list of rules; the first whose `up_to` limits all hold gives the numbers:

```toml
[[compress_mean]]
up_to = {head_dim = 128} # keys are those of the case that the kernel's launcher states
rows = 16
num_warps = 4
num_stages = 2
maxnreg = 0 # registers a thread at most; 0 leaves them to the compiler
measured = "2026-11-22, NVIDIA H100 80GB HBM3, ..." # where the numbers come from; those of a rule without are believed
```

Every kernel has a last rule without `up_to`. Files name what they extend with `extends`; a kernel that a file lists is
taken from it whole. `bench/tune_triton.py` in the repository measures candidates and writes the fastest down.
"""

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

FAMILIES = {80: "sm80", 86: "sm89", 87: "sm80", 89: "sm89", 90: "sm90", 100: "sm100", 103: "sm100", 120: "sm89"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TOLD = ("up_to", "measured")  # what a rule says beside its numbers


@dataclass(frozen=True)
class Launch:
    """How to launch one kernel for one case: tile sizes by name, and the compiler's options."""

    sizes: Mapping[str, int]
    num_warps: int
    num_stages: int
    maxnreg: int

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch.

        A product and a sum become one instruction, as they do by default up to Triton 3.9, which announces another.
        """
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return found | {"maxnreg": self.maxnreg} if self.maxnreg else found


_overrides: dict[str, dict[str, int]] = {}


def launch(kernel: str, device: torch.device, **case: int) -> Launch:
    """The configuration of `kernel` on `device` for a case, such as `head_dim=128`. The interpreter takes sm90's."""
    return choose(kernel, family(device), **case)


@cache
def family(device: torch.device) -> str:
    """Which file describes a device: that of its SM, or of the nearest lower one."""
    if device.type != "cuda":
        return "sm90"
    major, minor = torch.cuda.get_device_capability(device)
    return FAMILIES[max(sm for sm in FAMILIES if sm <= max(80, 10 * major + minor))]


def choose(kernel: str, name: str, **case: int) -> Launch:
    """`launch`, for a file by its name."""
    for rule in table(name)[kernel]:
        if all(case[key] <= most for key, most in rule.get("up_to", {}).items()):
            numbers = {key: value for key, value in rule.items() if key not in TOLD} | _overrides.get(kernel, {})
            options = {key: numbers.pop(key, 0) for key in OPTIONS}
            return Launch(numbers, **options)
    raise LookupError(f"configurations/{name}.toml: {kernel} has no rule for {case}")


@cache
def table(name: str) -> dict[str, list[dict[str, Any]]]:
    """All rules by kernel of a file and those that it extends."""
    own = tomllib.loads((files(__package__) / f"{name}.toml").read_text(encoding="utf-8"))
    inherited = table(own["extends"]) if "extends" in own else {}
    return inherited | {key: value for key, value in own.items() if isinstance(value, list)}


def overrides() -> tuple[Any, ...]:
    """What `overridden` replaces now, to be part of a key."""
    return tuple((name, *numbers.items()) for name, numbers in _overrides.items() if numbers)


@contextmanager
def overridden(kernel: str, **numbers: int) -> Iterator[None]:
    """Within, these numbers replace those of every rule of `kernel`: for whoever measures variants."""
    before = _overrides.get(kernel, {})
    _overrides[kernel] = before | numbers
    try:
        yield
    finally:
        _overrides[kernel] = before
