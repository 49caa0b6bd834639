"""Do the pages about profiles say what the profiles say? Their generated tables are held in test_docs.py."""

import re
import runpy
from pathlib import Path

import pytest
from built_packages import ROOT
from nsa_routing import FLAGS, Profile, load_profile
from nsa_routing.profile import SHIPPED, profile_of

GUIDE = (ROOT / "docs" / "device-guide.md").read_text(encoding="utf-8")
TUNING = (ROOT / "docs" / "thresholds-and-tuning.md").read_text(encoding="utf-8")
TABLES = runpy.run_path(str(ROOT / ".github" / "scripts" / "routing_tables.py"))
SECTIONS = {"CPU": None, "H100 and H200": 90, "A100": 80, "RTX 4090": 89, "B200": 100}


def section(name: str) -> str:
    (body,) = re.findall(rf"^## {name}\n(.*?)(?=^## )", GUIDE, re.MULTILINE | re.DOTALL)
    return " ".join(body.split())


def is_measured(profile: Profile) -> bool:
    return any(bound.measured for of in profile.thresholds.values() for bound in of.values())


def test_every_shipped_profile_has_a_section() -> None:
    named = {profile_of("cuda" if sm else "cpu", sm)[0] for sm in SECTIONS.values()}
    assert named | {"base"} == {path.stem for path in SHIPPED.glob("*.yaml")}


@pytest.mark.parametrize("name", [name for name, sm in SECTIONS.items() if sm])
def test_a_section_says_whether_anybody_has_run_it(name: str) -> None:
    profile, body = load_profile(f"sm{SECTIONS[name]}"), section(name)
    assert f"profile `{profile.name}`" in body
    assert ("**Never run.**" in body) is not is_measured(profile)
    denied = {denial.adr for of in profile.denials.values() for denial in of.values()}
    assert all(f"ADR {adr}" in body for adr in denied)
    lifted = {denial.lifted_by for of in profile.denials.values() for denial in of.values()} - {None}
    assert all(f"{flag}=1" in body for flag in lifted)


def test_the_gpus_of_the_measurements_are_those_that_the_guide_names() -> None:
    """A new machine's results are news for this page."""
    machines = {TABLES["machine"](path) for path in (ROOT / "bench" / "results").glob("*.csv")}
    gpus = {name for name in machines if name.startswith("NVIDIA")}
    assert gpus == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}
    assert "Two kinds of GPU have run this code: H100 80GB and H200," in " ".join(GUIDE.split())


def test_the_tables_of_what_runs_come_from_plans() -> None:
    """Of a profile as it is, and as it would be."""
    cell, sm89 = TABLES["cell"], load_profile("sm89")
    assert cell(sm89, "select_blocks", 4096) == "sdpa"
    lifted = sm89.model_copy(update={"denials": {}})
    assert cell(lifted, "select_blocks", 4096) == "sdpa / triton"


def test_the_profile_of_the_page_is_one(tmp_path: Path) -> None:
    documents = re.findall(r"^```yaml\n(.*?)^```", TUNING, re.MULTILINE | re.DOTALL)
    assert documents
    for document in documents:
        path = tmp_path / "page.yaml"
        path.write_text(document, encoding="utf-8")
        profile = load_profile(path)
        shipped = load_profile("sm90")
        assert profile.thresholds["window_attention"].keys() == shipped.thresholds["window_attention"].keys() - {
            "fa2-torch"
        }
        assert profile.order["select_blocks"] == ("sdpa",)
        assert profile.order["combine"] == shipped.order["combine"]


def test_the_flags_of_the_page_are_flags() -> None:
    said = set(re.findall(r"NSA_[A-Z_0-9]+", TUNING))
    assert said - set(FLAGS) == set()
    assert set(FLAGS) - said == {"NSA_LOG", "NSA_LOG_EVERY"}  # which have no part in a choice
