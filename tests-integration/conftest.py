"""Machines that are not there, delegates as backends, and `--wheels`: the same suite against what would be released.

Nothing of the family is imported before `--wheels` has said where from.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import built_packages
import pytest
from built_packages import Built, build_all

BUILD = "build"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wheels",
        metavar="FOLDER",
        help=f"import the packages from the wheels in FOLDER, not from the checkout; `{BUILD}`: from those of the tree",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Unpack wheels where this process and all that it starts look first."""
    given = config.getoption("--wheels")
    if given is None:
        return
    if hasattr(config, "workerinput"):  # a worker inherits PYTHONPATH; its sys.path pytest-xdist noted before this ran
        sys.path.insert(0, os.environ["PYTHONPATH"].partition(os.pathsep)[0])
        return
    early = sorted(name for name in sys.modules if name.partition(".")[0] in _MODULES)
    if early:
        raise pytest.UsageError(f"--wheels: expected tests-integration alone, got {early[0]} imported already")
    folder = Path(tempfile.mkdtemp(prefix="wheels-"))
    if given == BUILD:
        wheels = [built.wheel for built in build_all(folder / "built", "wheel").values()]
    else:
        wheels = sorted(Path(given).glob("nsa*.whl"))
    names = sorted(wheel.name.partition("-")[0].replace("_", "-") for wheel in wheels)
    if names != built_packages.PACKAGES:
        raise pytest.UsageError(f"--wheels: expected one wheel each of {built_packages.PACKAGES}, got {names}")
    built_packages.unpack(wheels, folder / "unpacked")
    sys.path.insert(0, str(folder / "unpacked"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder / "unpacked") + (f"{os.pathsep}{before}" if before else "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The suite ends by drawing: plots last."""
    items.sort(key=lambda item: item.path.stem == "test_trend_plots")


_MODULES = {name.replace("-", "_") for name in built_packages.PACKAGES}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Every package of the tree, built once."""
    return build_all(tmp_path_factory.mktemp("built"))


@pytest.fixture(autouse=True)
def _fresh_routes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No flags of the person who runs the tests, nothing remembered before or after."""
    from nsa_routing import reset

    for name in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(name)
    reset()
    yield
    reset()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Make these objects, or delegates of these names, the installed backends beside sdpa."""
    from delegates import Delegate, Point
    from nsa_routing import backends, reset
    from nsa_varlen.sdpa import BACKEND

    def use(*given: Any) -> dict[str, Any]:
        made = [Delegate(x) if isinstance(x, str) else x for x in given]
        points = [Point(x) for x in (*made, BACKEND)]
        monkeypatch.setattr(backends, "entry_points", lambda group: tuple(points))
        reset()
        return {x.name: x for x in made}

    return use


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let CPU tensors be those of a GPU with this SM, as far as routing knows."""
    from nsa_routing import Environment, backends, dispatching, reset

    def use(sm: int | None, **facts: Any) -> None:
        def probe(device: str | None = None, index: int = 0) -> Environment:
            found = {"torch": "2.11.0+cu130", "triton": "3.6.0", "flash_attn": None} | facts
            return Environment(device="cuda", sm=sm, backends=tuple(backends.installed_backends()), **found)

        monkeypatch.setattr(dispatching, "probe", probe)
        reset()

    return use


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set flags, given without their prefix; None unsets."""
    from nsa_routing import reset

    def use(**values: str | None) -> None:
        for name, value in values.items():
            if value is None:
                monkeypatch.delenv(f"NSA_{name}", raising=False)
            else:
                monkeypatch.setenv(f"NSA_{name}", value)
        reset()

    return use


@pytest.fixture(scope="session")
def delegate() -> type[Any]:
    from delegates import Delegate

    return Delegate


@pytest.fixture(scope="session")
def opaque() -> type[Any]:
    from delegates import Opaque

    return Opaque
