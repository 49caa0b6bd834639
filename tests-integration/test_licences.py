"""Does the licence check refuse what nobody has looked at? `hatch run licences` asks it of what pip resolves."""

import re
from typing import Any

import pytest
from licences import ALLOWED, NAMES, NVIDIA, UNRESOLVED, allows, refused, requirements
from workspace import ROOT, read_packages

GPL = "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"
MIT = "License :: OSI Approved :: MIT License"


def metadata(name: str = "Made_Up", **fields: Any) -> dict[str, Any]:
    """As pip's report has it."""
    return {"name": name, "version": "1.0", **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"license_expression": "MIT"},
        {"license_expression": "GPL-3.0-only OR MIT"},
        {"license_expression": "Apache-2.0 WITH LLVM-exception AND (GPL-2.0-only OR BSD-3-Clause)"},
        {"classifier": ["Topic :: Utilities", MIT]},
        {"license": "Apache-2.0"},
        {"license": "MIT", "classifier": [MIT]},
        {"license": "Permission is hereby granted, free of charge,\nto any person", "classifier": [MIT]},
        {"license_expression": "MIT", "classifier": [GPL]},  # the expression is what counts
    ],
)
def test_what_is_allowed(fields: dict[str, Any]) -> None:
    assert refused(metadata(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"license_expression": "GPL-3.0-only"}, "licence not allowed: GPL-3.0-only"),
        ({"license_expression": "MIT AND GPL-3.0-or-later"}, "licence not allowed: MIT AND GPL-3.0-or-later"),
        ({"license_expression": "GPL-3.0-only WITH GCC-exception-3.1"}, "licence not allowed: GPL-3.0-only WITH .*"),
        ({"license_expression": "LicenseRef-Proprietary"}, "licence not allowed: LicenseRef-Proprietary"),
        ({"license_expression": "MIT OR"}, "licence not allowed: MIT OR"),
        ({"classifier": [GPL]}, "licence not allowed: .*GPLv3.*"),
        ({"classifier": [MIT, GPL]}, "licence not allowed: .*GPLv3.*"),
        ({"license": "GPLv3", "classifier": [MIT]}, "licence not allowed: GPLv3"),
        ({"license": "SSPL-1.0"}, "licence not allowed: SSPL-1.0"),
        ({"license": "Ask us"}, "licence not allowed: Ask us"),
        ({"license": "Everybody may\nread this"}, "expected a licence, got none"),
        ({"license": "UNKNOWN"}, "licence not allowed: UNKNOWN"),
        ({"classifier": ["Topic :: Utilities"]}, "expected a licence, got none"),
        ({}, "expected a licence, got none"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], why: str) -> None:
    found = refused(metadata(**fields))
    assert found is not None
    assert re.fullmatch(f"made-up 1.0: {why}", found), found


def test_nvidia_s_wheels_are_allowed_by_name_alone() -> None:
    terms = {"license_expression": "LicenseRef-NVIDIA-Proprietary"}
    assert [refused(metadata(name, **terms)) for name in NVIDIA] == [None] * len(NVIDIA)
    assert refused(metadata("nvidia_cublas", **terms)) is None
    assert refused(metadata("nvidia-something-new", **terms)) is not None


def test_the_tables_name_licences() -> None:
    assert [name for name in ALLOWED if not allows(name)] == []
    assert NAMES.keys() & ALLOWED == set()
    assert set(NAMES.values()) <= ALLOWED


def test_every_package_is_asked_with_every_extra() -> None:
    packages = read_packages()
    asked = set(requirements(packages.values()))
    assert "./packages/nsa-varlen" in asked
    assert len(asked) == len(packages)
    for package in packages.values():
        (mine,) = (one for one in asked if one.partition("[")[0] == f"./packages/{package.folder.name}")
        assert (ROOT / mine.partition("[")[0]).is_dir()
        extras = {(package.name, extra) for extra in mine.partition("[")[2].strip("]").split(",") if extra}
        assert extras == {(package.name, extra) for extra in package.extras} - UNRESOLVED
