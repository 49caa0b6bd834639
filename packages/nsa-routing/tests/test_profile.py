"""Does a profile that loads hold what routing needs, and does one that does not say where it is wrong?"""

from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest
import yaml
from nsa_routing import OPS, Profile, load_profile
from nsa_routing.profile import SHIPPED

GOOD = {"name": "made", "order": {op: ["sdpa"] for op in OPS}}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    """A profile file with this document, or this text."""

    def to_file(document: object) -> Path:
        path = tmp_path / "made.yaml"
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document), encoding="utf-8")
        return path

    return to_file


def shipped() -> list[str]:
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def test_profiles_are_shipped() -> None:
    assert "base" in shipped()


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_load(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert set(profile.order) == set(OPS)
    assert all(names[-1] == "sdpa" for names in profile.order.values()), "the backend that is always there comes last"


def test_a_file_loads_by_its_path(write: Callable) -> None:
    document = GOOD | {"order": GOOD["order"] | {"combine": ["triton", "sdpa"]}}
    path = write(document)
    for given in (path, str(path)):
        profile = load_profile(given)
        assert profile.name == "made"
        assert {op: list(names) for op, names in profile.order.items()} == document["order"]


def test_loading_again_reads_nothing(write: Callable) -> None:
    path = write(GOOD)
    first = load_profile(path)
    path.unlink()
    assert load_profile(path) is first


def test_is_frozen(write: Callable) -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load_profile(write(GOOD)).name = "other"


def test_a_shared_profile_cannot_be_written_to() -> None:
    order = load_profile("base").order
    with pytest.raises(TypeError, match="does not support item assignment"):
        order["combine"] = ["other"]
    assert isinstance(order["combine"], tuple)


WITHOUT = {op: ["sdpa"] for op in OPS if op != "combine"}


@pytest.mark.parametrize(
    "document, message",
    [
        (GOOD | {"ordre": {}}, r"ordre: Extra inputs are not permitted, got \{\}"),
        ({"name": "made"}, r"order: Field required, got \{'name': 'made'\}"),
        ({"order": GOOD["order"]}, r"name: Field required"),
        (GOOD | {"name": 7}, r"name: Input should be a valid string, got 7"),
        (GOOD | {"order": "sdpa"}, r"order: Input should be a valid dictionary, got 'sdpa'"),
        (
            GOOD | {"order": GOOD["order"] | {"combine": "sdpa"}},
            r"order.combine: 'str' instances are not allowed as a Sequence value, got 'sdpa'",
        ),
        (GOOD | {"order": GOOD["order"] | {"combine": [1]}}, r"order.combine.0: Input should be a valid string, got 1"),
        (GOOD | {"order": WITHOUT}, r"order: .*expected exactly the ops .*'combine'\], got \['compress_mean'"),
        (
            GOOD | {"order": GOOD["order"] | {"atention": ["sdpa"]}},
            r"order: .*expected exactly the ops .*, got \['atention'",
        ),
        (
            GOOD | {"order": GOOD["order"] | {"combine": ["sdpa", "sdpa"]}},
            r"order: .*combine: expected one or more different backends, got \['sdpa', 'sdpa'\]",
        ),
        (
            GOOD | {"order": GOOD["order"] | {"combine": []}},
            r"order: .*combine: expected one or more different backends, got \[\]",
        ),
        ([GOOD], r"document: Input should be a valid dictionary"),
        ("", r"document: Input should be a valid dictionary .*, got None"),
        ("name: [made\norder:", r"expected YAML, got while parsing"),
        ("name: made\nname: other\n", r"expected YAML, got .*duplicate key 'name'"),
        ("name: \tmade\n  order: {}", r"expected YAML, got"),
    ],
)
def test_what_does_not_validate(document: object, message: str, write: Callable) -> None:
    """The message names the file, the key and the value."""
    path = write(document)
    with pytest.raises(ValueError, match=rf"(?s)^{path}: {message}"):
        load_profile(path)


@pytest.mark.parametrize("name", ["sm9000", "/no/such/file.yaml", "base.yml"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^profile: expected one of \[.*'base'.*\] or a .yaml file, got '{name}'$"):
        load_profile(name)


def test_every_mistake_is_reported(write: Callable) -> None:
    with pytest.raises(ValueError, match=r"name: .*; order.combine: ") as caught:
        load_profile(write({"name": 7, "order": GOOD["order"] | {"combine": "sdpa"}}))
    assert caught.value.__cause__ is not None


def test_made_in_code_it_is_checked_too() -> None:
    with pytest.raises(pydantic.ValidationError, match="expected exactly the ops"):
        Profile(name="made", order={})
