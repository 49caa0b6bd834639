"""What the operator asked for: environment variables, read in one place, when the first operation runs."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Self

from nsa_routing.problem import OPS
from nsa_routing.rate_limit import check_rate

PRESETS = ("safe", "perf")
FA2_BACKENDS = ("fa2", "fa2-torch")  # what NSA_FA2 speaks of
CHECKS = ("always", "flag", "off")
CHECK_OF_PRESET = {"safe": "always", "perf": "flag"}
LOG_LEVELS = ("debug", "info", "warning", "error", "off")
LOG_EVERY = re.compile(r"(?P<times>[0-9]+)|((?P<least>[0-9]+),)?(?P<seconds>[0-9]+(\.[0-9]+)?)s")


class Flag(NamedTuple):
    """One environment variable: the values it takes, what holds without it, what it does."""

    values: str
    default: str
    meaning: str


FLAGS: Mapping[str, Flag] = MappingProxyType(
    {
        "NSA_PROFILE": Flag(
            "a shipped profile's name, or a path that ends in .yaml",
            "the device's",
            "order, presets, thresholds and denials to plan by, on every device",
        ),
        "NSA_PRESET": Flag("safe, perf", "safe", "which backends an automatic route may take; the profile says which"),
        "NSA_BACKEND": Flag(
            "a backend, or op=backend pairs joined by commas", "", "obey it, or raise with the whole table"
        ),
        "NSA_TRITON_SEL_FORCE": Flag(
            "0, 1", "0", "1 lifts the denial of Triton selection on SM 8.9; the preset still has to take Triton"
        ),
        "NSA_FA2": Flag(
            "auto, 0, 1",
            "auto",
            f"0 refuses {' and '.join(FA2_BACKENDS)}; 1 opts in where a profile wants that, and trusts thresholds "
            "that were not measured",
        ),
        "NSA_FALLBACK": Flag("auto, raise", "auto", "raise: a failing backend raises instead of falling back"),
        "NSA_CHECK_FINITE": Flag(
            "always, flag, off",
            "always in safe, flag in perf",
            "always: check each result, recompute on sdpa in the same call; flag: note it on the device, close the "
            "route for later calls; off: do not look",
        ),
        "NSA_DETERMINISTIC": Flag(
            "0, 1", "0", "1 asks every operation that does not say otherwise for bitwise equal results across runs"
        ),
        "NSA_LOG": Flag(
            "debug, info, warning, error, off",
            "",
            "level of the loggers nsa_routing and nsa, shown on standard error; unset, logging is as the program set "
            "it up",
        ),
        "NSA_LOG_EVERY": Flag(
            "times as 100, seconds as 30s, or both as 100,30s",
            "0",
            "show a message that repeats again every so many times, after so many seconds, or once both have passed; 0 "
            "shows it once. The lines of nsa.observe follow it too",
        ),
    }
)


VALUES: Mapping[str, tuple[str | None, ...]] = MappingProxyType(
    {
        "preset": PRESETS,
        "fa2": ("auto", "0", "1"),
        "fallback": ("auto", "raise"),
        "check_finite": (None, *CHECKS),
        "log": (None, *LOG_LEVELS),
    }
)


@dataclass(frozen=True)
class Policy:
    """The flags as a value.

    Fields:
        backends: (op, backend) pairs, one per op that must run on a named backend.
        preset: "safe" or "perf".
        profile: name or path; None takes the device's.
        triton_sel_force, fa2, fallback, deterministic, log: as FLAGS has them.
        log_every, log_seconds: the times and the seconds of NSA_LOG_EVERY; 0 leaves either out.
        check_finite: None takes the preset's.

    Raises:
        TypeError: log_every or log_seconds is no number.
        ValueError: a field has a value that its flag does not take.

    Example:
        >>> policy = Policy.from_env({"NSA_BACKEND": "window_attention=sdpa", "NSA_PRESET": "perf"})
        >>> policy.backend_for("window_attention"), policy.check
        ('sdpa', 'flag')
    """

    backends: tuple[tuple[str, str], ...] = ()
    preset: str = "safe"
    profile: str | None = None
    triton_sel_force: bool = False
    fa2: str = "auto"
    fallback: str = "auto"
    check_finite: str | None = None
    deterministic: bool = False
    log: str | None = None
    log_every: int = 0
    log_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, values in VALUES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {list(values)}, got {getattr(self, name)!r}")
        check_rate("log_every", self.log_every, "log_seconds", self.log_seconds)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The policy that `environ` (default: this process's environment) spells out. An empty value is no value.

        Raises:
            ValueError: an unknown NSA_* variable, an unknown op, or a value that the flag does not take.
        """
        environ = os.environ if environ is None else environ
        unknown = sorted(name for name in environ if name.startswith("NSA_") and name not in FLAGS)
        if unknown:
            raise ValueError(f"{unknown[0]}: expected one of the variables {list(FLAGS)}, got an unknown one")
        given = {name: environ.get(name, "").strip() for name in FLAGS}

        def one_of(name: str, values: tuple[str, ...], default: str) -> str:
            value = given[name] or default
            if value not in values:
                raise ValueError(f"{name}: expected one of {list(values)}, got {value!r}")
            return value

        every, seconds = _parse_rate(given["NSA_LOG_EVERY"] or "0")
        return cls(
            backends=_parse_backends(given["NSA_BACKEND"]),
            preset=one_of("NSA_PRESET", PRESETS, "safe"),
            profile=given["NSA_PROFILE"] or None,
            triton_sel_force=one_of("NSA_TRITON_SEL_FORCE", ("0", "1"), "0") == "1",
            fa2=one_of("NSA_FA2", ("auto", "0", "1"), "auto"),
            fallback=one_of("NSA_FALLBACK", ("auto", "raise"), "auto"),
            check_finite=one_of("NSA_CHECK_FINITE", CHECKS, "") if given["NSA_CHECK_FINITE"] else None,
            deterministic=one_of("NSA_DETERMINISTIC", ("0", "1"), "0") == "1",
            log=one_of("NSA_LOG", LOG_LEVELS, "") if given["NSA_LOG"] else None,
            log_every=every,
            log_seconds=seconds,
        )

    def backend_for(self, op: str) -> str | None:
        """The backend that `op` must run on, or None."""
        return dict(self.backends).get(op)

    @property
    def check(self) -> str:
        """How results are checked: "always", "flag" or "off"."""
        return self.check_finite or CHECK_OF_PRESET[self.preset]

    def lifts(self, flag: str | None) -> bool:
        """Whether the flag that a denial names is set."""
        return flag == "NSA_TRITON_SEL_FORCE" and self.triton_sel_force


def _parse_rate(value: str) -> tuple[int, float]:
    """Times and seconds."""
    found = LOG_EVERY.fullmatch(value)
    if found is None:
        raise ValueError(f"NSA_LOG_EVERY: expected times as 100, seconds as 30s, or both as 100,30s, got {value!r}")
    return int(found["times"] or found["least"] or 0), float(found["seconds"] or 0)


def _parse_backends(value: str) -> tuple[tuple[str, str], ...]:
    if not value:
        return ()
    if "=" not in value and "," not in value:
        return tuple((op, value) for op in OPS)
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
