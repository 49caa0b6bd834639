"""Is every wrong pair of torch and Triton found, and no right one?"""

import pytest
from nsa_routing.compatibility import TRITON_OF_TORCH, minor, wrong_triton

# From the requirements that each torch release publishes; written again, so that a slip in either table shows.
PAIRS = [
    ("2.2", "2.2"),
    ("2.3", "2.3"),
    ("2.4", "3.0"),
    ("2.5", "3.1"),
    ("2.6", "3.2"),
    ("2.7", "3.3"),
    ("2.8", "3.4"),
    ("2.9", "3.5"),
    ("2.10", "3.6"),
    ("2.11", "3.6"),
    ("2.12", "3.7"),
    ("2.13", "3.7"),
    ("2.14", "3.8"),
    ("2.15", "3.9"),
]
TRITONS = sorted({triton for _, triton in PAIRS})


def test_the_table_has_every_pair_and_no_other() -> None:
    assert list(TRITON_OF_TORCH.items()) == PAIRS


@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("torch, right", PAIRS)
def test_every_torch_with_every_triton(torch: str, right: str, triton: str) -> None:
    for suffix in (".0", ".1+cu126", ".0a0+git123"):
        found = wrong_triton(torch + suffix, f"{triton}.1")
        if triton == right:
            assert found is None
        else:
            assert found == f"torch {torch}{suffix} needs triton {right}, got triton {triton}.1"


def test_without_triton_nothing_is_wrong() -> None:
    assert wrong_triton("2.13.0", None) is None
    assert wrong_triton("2.13.0", None, "3.7.1") is None


@pytest.mark.parametrize("triton", ["3.7.1", "3.7.1+git4c8cf1ed", "3.7.0.post1", "3.7.0rc2", "3.7"])
def test_only_major_and_minor_of_triton_count(triton: str) -> None:
    assert wrong_triton("2.13.0+cu130", triton) is None


def test_a_pin_outranks_the_table() -> None:
    assert wrong_triton("2.13.0", "3.6.1", pinned="3.6.0") is None
    assert wrong_triton("2.13.0", "3.7.1", pinned="3.6.0") == "torch 2.13.0 needs triton 3.6, got triton 3.7.1"
    assert wrong_triton("2.99.0", "3.42.0", pinned="3.42.0") is None


@pytest.mark.parametrize("torch", ["2.16.0", "3.0.0+cu150"])
def test_a_newer_torch_takes_any_triton_3(torch: str) -> None:
    assert wrong_triton(torch, "3.9.0") is None
    assert wrong_triton(torch, "3.99.0") is None
    assert wrong_triton(torch, "2.2.0") == f"torch {torch} needs triton 3, got triton 2.2.0"
    assert wrong_triton(torch, "4.0.0") == f"torch {torch} needs triton 3, got triton 4.0.0"
    assert wrong_triton(torch, "30.0.0") == f"torch {torch} needs triton 3, got triton 30.0.0"


def test_2_1_is_not_2_10() -> None:
    assert minor("2.1.0") == "2.1"
    assert minor("2.10.0") == "2.10"
    assert wrong_triton("2.10.0", "3.6.0") is None
    assert wrong_triton("2.11.0", "3.0.0") is not None


@pytest.mark.parametrize(
    "versions", [("2.11.0", "3.6.0-custom-build", None), ("local", "3.6.0", None), ("2.11.0", "3.6.0", "?")]
)
def test_what_is_no_version_is_said_to_be_none(versions: tuple) -> None:
    assert "is no version" in wrong_triton(*versions)
