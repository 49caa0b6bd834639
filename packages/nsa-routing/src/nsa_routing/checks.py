"""What can be wrong with an installation, looked at one by one: `nsa-routing check`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from typing import Literal

from packaging.specifiers import SpecifierSet

from nsa_routing.backends import installed_backends, load_backend
from nsa_routing.compatibility import wrong_triton
from nsa_routing.environment import Environment
from nsa_routing.planning import Rejected, plan
from nsa_routing.policy import FLAGS, Policy
from nsa_routing.problem import OPS
from nsa_routing.profile import LAST_RESORT, Profile, load_profile, profile_of
from nsa_routing.workload import Workload


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Fields:
        name: "flags", "environment", "device", "profile", "torch-triton", "entry-points", "backend:NAME" for each
            installed backend, "sdpa", "plan:OP" for each operation, "pin:DISTRIBUTION" for each pin of the profile.
        status: "ok"; "warn", works but is not as it should be; "fail", will not work.
        reason: what was found.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    reason: str


def run_checks(environment: Environment, workload: Workload, profile: str | None = None) -> Iterator[Check]:
    """Every check, in a fixed order, for a machine and a layer.

    `profile` outranks `NSA_PROFILE`. Flags that do not parse count as unset in what follows them; plans and pins are
    left out where the profile does not load.
    """
    policy = Policy()
    given = [f"{name}={os.environ[name]}" for name in FLAGS if os.environ.get(name)]
    try:
        policy = Policy.from_env()
    except ValueError as error:
        yield Check("flags", "fail", str(error))
    else:
        yield Check("flags", "ok", " ".join(given) or "none set")
    for reason in environment.unknown:
        yield Check("environment", "warn", reason)
    yield _device(environment)
    loaded = None
    name, note = profile_of(environment.device, environment.sm, profile or policy.profile)
    try:
        loaded = load_profile(name)
    except ValueError as error:
        yield Check("profile", "fail", str(error))
    else:
        yield Check("profile", "warn" if note else "ok", f"{loaded.name}{f' ({note})' if note else ''}")
    yield _triton(environment)
    sound = []
    try:
        points = installed_backends()
    except RuntimeError as error:
        yield Check("entry-points", "fail", str(error))
    else:
        yield Check("entry-points", "ok", f"{len(points)} installed, each by one distribution")
        for check in map(_backend, points.values()):
            if check.status == "ok":
                sound.append(check.name.removeprefix("backend:"))
            yield check
    if LAST_RESORT in sound:
        yield Check(LAST_RESORT, "ok", "loads")
    else:
        yield Check(LAST_RESORT, "fail", "nothing to fall back to: install nsa-varlen")
    if loaded is not None:
        yield from _plans(replace(environment, backends=tuple(sound)), loaded, workload, policy)
        yield from _pins(loaded)


def _device(environment: Environment) -> Check:
    if environment.device == "cuda" and environment.sm is None and environment.name is None:
        return Check("device", "fail", "cuda was asked for, and torch finds none")
    return Check("device", "ok", environment.name or environment.device)


def _triton(environment: Environment) -> Check:
    wrong = wrong_triton(environment.torch, environment.triton, environment.triton_pin)
    if wrong:
        return Check("torch-triton", "fail", wrong)
    triton = f"triton {environment.triton}" if environment.triton else "no triton"
    return Check("torch-triton", "ok", f"torch {environment.torch}, {triton}")


def distribution_of(point: EntryPoint) -> tuple[str | None, str | None]:
    """(name, version) of the distribution that offers an entry point."""
    return (None, None) if point.dist is None else (point.dist.name, point.dist.version)


def _backend(point: EntryPoint) -> Check:
    name = f"backend:{point.name}"
    try:
        load_backend(point.name)
    # A module may raise whatever it likes while it is imported, and to say what is what a check is for.
    except Exception as error:  # noqa: BLE001
        return Check(name, "fail", f"{type(error).__name__}: {error}")
    distribution = " ".join(filter(None, distribution_of(point)))
    return Check(name, "ok", f"{point.value}{f' of {distribution}' if distribution else ''}")


def _plans(environment: Environment, profile: Profile, workload: Workload, policy: Policy) -> Iterator[Check]:
    for op in OPS:
        made = plan(environment, profile, workload.problem(op), policy)
        rejected = [f"{c.backend}: {c.reason}" for c in made.candidates if isinstance(c, Rejected)]
        yield Check(f"plan:{op}", "ok" if made.backend else "fail", made.backend or "; ".join(rejected))


def _pins(profile: Profile) -> Iterator[Check]:
    for distribution, specifier in sorted(profile.pins.items()):
        name = f"pin:{distribution}"
        try:
            installed = version(distribution)
        except PackageNotFoundError:
            yield Check(name, "ok", f"not installed ({specifier})")
            continue
        fits = SpecifierSet(specifier).contains(installed, prereleases=True)
        yield Check(name, "ok" if fits else "warn", f"{installed} is {'' if fits else 'not '}within {specifier}")
