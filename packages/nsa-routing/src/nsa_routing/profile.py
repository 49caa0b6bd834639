"""Profiles: what may run where on one kind of device, and since when that pays. YAML files, validated when loaded."""

import datetime
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nsa_routing.policy import FA2_BACKENDS, PRESETS
from nsa_routing.problem import LENGTHS, OPS

SHIPPED = Path(__file__).parent / "profiles"
LAST_RESORT = "sdpa"

Mode = Literal["always", "threshold", "measured", "opt-in"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Lengths(_Frozen):
    """Bounds on a problem's lengths, inclusive; None bounds nothing."""

    total_q: int | None = Field(default=None, ge=0)
    max_seqlen_q: int | None = Field(default=None, ge=0)
    max_seqlen_k: int | None = Field(default=None, ge=0)


def _as_date(value: Any) -> Any:
    """YAML reads an unquoted date as one; quoted it is a string. Numbers, which could be seconds, are neither."""
    return datetime.date.fromisoformat(value) if isinstance(value, str) else value


class Measurement(_Frozen):
    """Where a number comes from.

    Fields:
        date: of the measurement.
        gpu: what ran it.
        csv: the raw measurements, a path beside the profile.
        versions: of the libraries that were measured, in words: "torch 2.11.0+cu130, cuDNN 9.19.0".
    """

    date: Annotated[datetime.date, BeforeValidator(_as_date)]
    gpu: str = Field(min_length=1)
    csv: str = Field(min_length=1)
    versions: str | None = Field(default=None, min_length=1)


class Threshold(_Frozen):
    """From which lengths a backend pays, up to which, and how that is known.

    Fields:
        at_least, at_most: bounds that a problem's lengths must all keep.
        measured: where the bounds come from, or
        not_measured: why they are only believed. Exactly one of the two.
    """

    at_least: Lengths = Lengths()
    at_most: Lengths = Lengths()
    measured: Measurement | None = None
    not_measured: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _is_possible_and_sourced(self) -> Self:
        for name in LENGTHS:
            least, most = getattr(self.at_least, name), getattr(self.at_most, name)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{name}: expected at_least <= at_most, got {least} > {most}: it can never trigger")
        least, most = self.at_least.max_seqlen_q, self.at_most.total_q
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"max_seqlen_q: expected at_least <= at_most.total_q, which counts the same queries, got {least} > "
                f"{most}: it can never trigger"
            )
        if (self.measured is None) == (self.not_measured is None):
            raise ValueError("expected either measured (date, gpu, csv) or not_measured (why)")
        return self


class Denial(_Frozen):
    """A backend that must not run an operation on this device, requested or not.

    Fields:
        adr: number of the decision record that says so.
        reason: in short.
        lifted_by: the flag that allows it all the same.
    """

    adr: str = Field(pattern=r"^\d{4}$")
    reason: str = Field(min_length=1)
    lifted_by: Literal["NSA_TRITON_SEL_FORCE"] | None = None


def _bounds_sequences(threshold: Threshold) -> bool:
    bounds = (threshold.at_least, threshold.at_most)
    return any(bound is not None for lengths in bounds for bound in (lengths.max_seqlen_q, lengths.max_seqlen_k))


def _is_specifier(value: str) -> str:
    try:
        SpecifierSet(value)
    except InvalidSpecifier:
        raise ValueError("expected a version specifier such as ==2.11.0") from None
    return value


def _is_distribution(value: str) -> str:
    try:
        plain = Requirement(value).name == value
    except InvalidRequirement:
        plain = False
    if not plain:
        raise ValueError("expected a distribution's name, without extras or versions")
    return value


Op = Literal[OPS]  # type: ignore[valid-type]  # mypy wants the strings themselves
Preset = Literal[PRESETS]  # type: ignore[valid-type]
Specifier = Annotated[str, AfterValidator(_is_specifier)]
Distribution = Annotated[str, AfterValidator(_is_distribution)]
OneLine = Annotated[str, Field(pattern=r"^[^\n]+$")]


class _File(_Frozen):
    """One file as it stands: what it does not say, the profile that it extends does. A null takes an entry away."""

    name: OneLine
    source: str = Field(min_length=1)
    extends: str | None = None
    order: dict[Op, list[str]] = {}
    presets: dict[Preset, dict[str, Mode | None]] = {}
    thresholds: dict[Op, dict[str, Threshold | None]] = {}
    prefer: dict[Op, dict[str, Threshold | None]] = {}
    denials: dict[Op, dict[str, Denial | None]] = {}
    pins: dict[Distribution, Specifier | None] = {}


class Profile(_Frozen):
    """A validated profile.

    Fields:
        name: what reports call it.
        source: where its contents come from.
        order: for every op the backends to try, best first; `sdpa` closes each.
        presets: for each preset, how an automatic route takes a backend. `always`; `threshold`, where a threshold
            allows it; `measured`, where a measured threshold does; `opt-in`, where a threshold allows it once
            `NSA_FA2=1`. A backend that is not named is not taken, but may be requested. `sdpa` needs no entry.
        thresholds: by op and backend.
        prefer: by op and backend, for which lengths it is tried before the others, whatever its place in `order`.
        denials: by op and backend.
        pins: version specifiers of the distributions to install on such a device, by name.

    Raises:
        ValueError (as pydantic's ValidationError): an entry that contradicts another, so that it could never matter.

    Example:
        >>> made = Profile(name="made", source="an example", order=dict.fromkeys(OPS, ("sdpa",)))
        >>> made.order["combine"], dict(made.presets)
        (('sdpa',), {})
    """

    name: str
    source: str
    order: Mapping[str, tuple[str, ...]]
    presets: Mapping[str, Mapping[str, Mode]] = Field(default_factory=dict)
    thresholds: Mapping[str, Mapping[str, Threshold]] = Field(default_factory=dict)
    prefer: Mapping[str, Mapping[str, Threshold]] = Field(default_factory=dict)
    denials: Mapping[str, Mapping[str, Denial]] = Field(default_factory=dict)
    pins: Mapping[str, str] = Field(default_factory=dict)

    model_config = ConfigDict(strict=False)  # lists become tuples

    @model_validator(mode="after")
    def _contradicts_nothing(self) -> Self:
        if set(self.order) != set(OPS):
            raise ValueError(f"order: expected exactly the ops {list(OPS)}, got {list(self.order)}")
        for op, names in self.order.items():
            if len(set(names)) != len(names):
                raise ValueError(f"order.{op}: expected different backends, got {list(names)}")
            if names[-1:] != (LAST_RESORT,):
                raise ValueError(
                    f"order.{op}: expected {LAST_RESORT} at the end, it takes whatever comes to it, got {list(names)}"
                )
        known = {name for names in self.order.values() for name in names}
        for preset, modes in self.presets.items():
            for name, mode in modes.items():
                if name not in known or name == LAST_RESORT:
                    raise ValueError(f"presets.{preset}.{name}: expected one of {sorted(known - {LAST_RESORT})}")
                if mode == "opt-in" and name not in FA2_BACKENDS:
                    raise ValueError(f"presets.{preset}.{name}: expected opt-in of {list(FA2_BACKENDS)} only")
        for op, denials in self.denials.items():
            for name in denials:
                if name not in self.order[op] or name == LAST_RESORT:
                    raise ValueError(f"denials.{op}.{name}: expected a backend of order.{op} but {LAST_RESORT}")
        for op, thresholds in self.thresholds.items():
            for name in thresholds:
                never = self._never_consulted(op, name)
                if op == "combine" and _bounds_sequences(thresholds[name]):
                    never = "combine knows no sequences, only total_q"
                if never:
                    raise ValueError(f"thresholds.{op}.{name}: expected one that can trigger, but {never}")
        for op, preferred in self.prefer.items():
            for name, bounds in preferred.items():
                if name not in self.order[op][1:-1]:
                    between = f"between the first of order.{op} and the last"
                    raise ValueError(f"prefer.{op}.{name}: expected a backend {between}")
                if bounds.at_least == bounds.at_most == Lengths():
                    raise ValueError(f"prefer.{op}.{name}: expected bounds; without any it comes first in order.{op}")
                if op == "combine" and _bounds_sequences(bounds):
                    raise ValueError(f"prefer.{op}.{name}: expected bounds of total_q, combine knows no sequences")
        for field in ("order", "presets", "thresholds", "prefer", "denials", "pins"):  # loaded once, shared by all
            object.__setattr__(self, field, _read_only(getattr(self, field)))
        return self

    def _never_consulted(self, op: str, name: str) -> str | None:
        if name == LAST_RESORT:
            return f"{LAST_RESORT} is always taken"
        if name not in self.order[op]:
            return f"order.{op} has no {name}"
        denial = self.denials.get(op, {}).get(name)
        if denial and denial.lifted_by is None:
            return f"denials.{op}.{name} refuses it always"
        modes = {modes[name] for modes in self.presets.values() if name in modes}
        if not modes:
            return "no preset takes the backend"
        if modes == {"measured"} and self.thresholds[op][name].measured is None and name not in FA2_BACKENDS:
            return "it is not measured, and every preset that takes the backend wants that"
        return None


def _read_only(value: Any) -> Any:
    return MappingProxyType({k: _read_only(v) for k, v in value.items()}) if isinstance(value, Mapping) else value


class _Loader(yaml.SafeLoader):
    """A key that appears twice in a mapping is an error; YAML's own loaders let the last one win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, as the file has it: later, merges (`<<`) put keys into a mapping that its own may override.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.composer.ComposerError(None, None, f"duplicate key {twice!r}", node.start_mark)
        return node


@cache
def load_profile(name_or_path: str | Path) -> Profile:
    """The shipped profile of that name, or the profile at that path (anything with a `.yaml` suffix).

    A profile that `extends` another (a shipped one, or a path relative to its own file) overrides it entry by entry;
    a list replaces a list, null takes an entry away.

    Raises:
        ValueError: no such profile, malformed YAML, or contents that do not validate; names file, key and value.

    Example:
        >>> load_profile("cpu").order["combine"][-1]
        'sdpa'
    """
    path = _path_of(name_or_path)
    merged: dict[str, Any] = {}
    for file in reversed(_chain(path)):
        merged = _merge(merged, file.model_dump(exclude_unset=True, exclude={"extends"}))
    try:
        return Profile.model_validate(_without_nulls(merged))
    except ValidationError as error:
        raise ValueError(f"{path}: {_in_words(error)}") from error


def profile_of(device: str, sm: int | None, named: str | None = None) -> tuple[str, str | None]:
    """(name, note): the shipped profile for a device, and what a person should know where it is not made for it.

    An SM without a profile takes the nearest lower one of its major version. A profile that somebody `named` is taken
    as it is.

    Example:
        >>> profile_of("cuda", 90)
        ('sm90', None)
        >>> profile_of("cuda", 86)
        ('sm80', 'no profile for SM 8.6: the nearest lower one of its family is used')
    """
    if named is not None:
        return named, None
    if device == "cpu":
        return "cpu", None
    if sm is None:
        return "base", f"no profile for device {device} without an SM: base is used"
    shipped = sorted(int(file.stem[2:]) for file in SHIPPED.glob("sm*.yaml"))
    lower = [number for number in shipped if number <= sm and number // 10 == sm // 10]
    words = f"no profile for SM {sm // 10}.{sm % 10}"
    if not lower:
        return "base", f"{words} or a lower one of its family: base is used"
    return f"sm{lower[-1]}", None if lower[-1] == sm else f"{words}: the nearest lower one of its family is used"


def _path_of(name_or_path: str | Path, beside: Path | None = None) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".yaml":
        return beside / path if beside else path
    return SHIPPED / f"{name_or_path}.yaml"


def _shipped() -> list[str]:
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def _chain(path: Path) -> list[_File]:
    """The file, what it extends, and so on."""
    files: list[_File] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            names = " -> ".join(file.stem for file in (*seen, path))
            raise ValueError(f"{path}: extends: expected a chain that ends, got {names}")
        seen.append(path.resolve())
        files.append(_read(path))
        extends = files[-1].extends
        if extends is None:
            return files
        extended = _path_of(extends, path.parent)
        if not extended.exists():
            raise ValueError(f"{path}: extends: expected one of {_shipped()} or a .yaml file, got {extends!r}")
        path = extended


def _read(path: Path) -> _File:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        given = path.stem if path.parent == SHIPPED else str(path)
        raise ValueError(f"profile: expected one of {_shipped()} or a .yaml file, got {given!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a readable file, got {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has, say
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    try:
        return _File.model_validate(document)
    except ValidationError as error:
        raise ValueError(f"{path}: {_in_words(error)}") from error


def _merge(base: dict[str, Any], over: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """`over` on top of `base`, entry by entry: a field's entries, and where those are by backend, the backends'."""
    merged = dict(base)
    for key, value in over.items():
        inner = depth < 2 and isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value, depth + 1) if inner else value
    return merged


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items() if item is not None}


def _in_words(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'document'}: {item['msg'].removeprefix('Value error, ')}, "
        f"got {_shown(item['input'])}"
        for item in error.errors()
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
