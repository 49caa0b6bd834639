"""What the operator asked for: environment variables, read in one place, when the first operation runs.

| variable | value | meaning |
| --- | --- | --- |
| `NSA_BACKEND` | a backend's name, or `op=name` pairs joined by commas | obey it, or raise |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from nsa_routing.problem import OPS

FLAGS = ("NSA_BACKEND",)


@dataclass(frozen=True)
class Policy:
    """Requests that outrank a profile.

    Fields:
        backends: (op, backend) pairs, one per op that must run on a named backend.

    Example:
        >>> Policy.from_env({"NSA_BACKEND": "window_attention=sdpa"}).backend_for("window_attention")
        'sdpa'
    """

    backends: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The policy that `environ` (default: this process's environment) spells out.

        Raises:
            ValueError: an unknown NSA_* variable, an unknown op, or a malformed value.
        """
        environ = os.environ if environ is None else environ
        unknown = sorted(name for name in environ if name.startswith("NSA_") and name not in FLAGS)
        if unknown:
            raise ValueError(f"{unknown[0]}: expected one of the variables {list(FLAGS)}, got an unknown one")
        return cls(_parse_backends(environ.get("NSA_BACKEND", "")))

    def backend_for(self, op: str) -> str | None:
        """The backend that `op` must run on, or None."""
        return dict(self.backends).get(op)


def _parse_backends(value: str) -> tuple[tuple[str, str], ...]:
    if not value:
        return ()
    if value.strip() and "=" not in value and "," not in value:
        return tuple((op, value.strip()) for op in OPS)
    pairs: list[tuple[str, str]] = []
    for pair in value.split(","):
        op, separator, name = (part.strip() for part in pair.partition("="))
        if not separator or not name:
            raise ValueError(f"NSA_BACKEND: expected a name or op=name pairs, got {value!r}")
        if op not in OPS:
            raise ValueError(f"NSA_BACKEND: expected an op of {list(OPS)}, got {op!r}")
        if op in dict(pairs):
            raise ValueError(f"NSA_BACKEND: expected each op once, got {op!r} twice in {value!r}")
        pairs.append((op, name))
    return tuple(pairs)
