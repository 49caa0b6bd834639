"""Are backends found by entry point, loaded only when wanted, and checked for being what they claim?"""

from collections.abc import Callable

import pytest
from nsa_routing.backends import installed_backends, load_backend


def test_names_are_sorted_and_nothing_is_loaded(offer: Callable, fake_point: type) -> None:
    points = [fake_point(name, None, f"{name}:BACKEND") for name in ("triton", "fa2", "sdpa")]
    offer(*points)
    assert list(installed_backends()) == ["fa2", "sdpa", "triton"]
    assert installed_backends()["sdpa"] is points[2]
    assert [point.loads for point in points] == [0, 0, 0]


def test_two_distributions_with_one_name(offer: Callable, fake_point: type) -> None:
    offer(fake_point("sdpa", None, "first:BACKEND"), fake_point("sdpa", None, "second:BACKEND"))
    message = r"^backend sdpa: expected one distribution to offer it, got first:BACKEND and second:BACKEND$"
    with pytest.raises(RuntimeError, match=message):
        installed_backends()
    assert installed_backends(strict=False) == {}
    with pytest.raises(ValueError, match=r"^backend: expected one of \[\], got 'sdpa'$"):
        load_backend("sdpa")


def test_one_distribution_seen_twice_is_one(offer: Callable, fake_point: type) -> None:
    """An editable install beside its own metadata."""
    offer(fake_point("sdpa", None, "one:BACKEND"), fake_point("sdpa", None, "one:BACKEND"))
    assert list(installed_backends()) == ["sdpa"]


def test_a_backend_is_loaded_once(offer: Callable, fake_point: type, fake_backend: type) -> None:
    point = fake_point("sdpa", fake_backend("sdpa"))
    offer(point)
    assert load_backend("sdpa") is load_backend("sdpa") is point.held
    assert point.loads == 1


def test_an_unknown_name_lists_what_is_installed(offer: Callable, fake_point: type) -> None:
    offer(fake_point("sdpa", None), fake_point("fa2", None, "fa2:BACKEND"))
    with pytest.raises(ValueError, match=r"^backend: expected one of \['fa2', 'sdpa'\], got 'cuda'$"):
        load_backend("cuda")
    offer()
    with pytest.raises(ValueError, match=r"^backend: expected one of \[\], got 'sdpa'$"):
        load_backend("sdpa")


def test_an_object_with_another_name(offer: Callable, fake_point: type, fake_backend: type) -> None:
    offer(fake_point("sdpa", fake_backend("triton"), "made:BACKEND"))
    with pytest.raises(TypeError, match=r"^backend sdpa: expected an object with name='sdpa' .* at made:BACKEND, got "):
        load_backend("sdpa")


@pytest.mark.parametrize("held", [None, "sdpa", type("NoRefuse", (), {"name": "sdpa"})()])
def test_an_object_that_is_no_backend(held: object, offer: Callable, fake_point: type) -> None:
    offer(fake_point("sdpa", held))
    with pytest.raises(TypeError, match=r"^backend sdpa: expected an object with name='sdpa' and refuse\(\)"):
        load_backend("sdpa")


def test_what_an_import_raises_is_not_swallowed(offer: Callable, fake_point: type) -> None:
    class Broken(fake_point):
        def load(self) -> object:
            raise ImportError("libcuda.so.1: cannot open shared object file")

    offer(Broken("sdpa", None))
    with pytest.raises(ImportError, match="libcuda"):
        load_backend("sdpa")
