"""Does a profile that loads hold what routing needs, and does one that does not say where it is wrong?"""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from nsa_routing import OPS, Profile, load_profile
from nsa_routing.profile import SHIPPED, profile_of


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A profile file with this document, or this text."""

    def to_file(document: object, name: str = "made.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False), encoding="utf-8"
        )
        return path

    return to_file


@pytest.fixture
def good(document: Callable) -> dict[str, Any]:
    return document("triton", "fa2")


MEASURED = {"date": "2026-11-22", "gpu": "H100", "csv": "sm90.csv"}


def test_profiles_are_shipped() -> None:
    assert sorted(file.stem for file in SHIPPED.glob("*.yaml")) == ["base", "cpu", "sm100", "sm80", "sm89", "sm90"]


@pytest.mark.parametrize("name", ["base", "cpu", "sm80", "sm89", "sm90", "sm100"])
def test_shipped_profiles_load(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert set(profile.order) == set(OPS)
    assert all(names[-1] == "sdpa" for names in profile.order.values()), "the backend that is always there comes last"
    for op, names in load_profile("base").order.items():
        assert sorted(profile.order[op]) == sorted(names), "a device ranks backends, it does not add or drop any"
    assert set(profile.presets) == {"safe", "perf"}
    assert "triton" not in profile.presets["safe"]
    assert all(mode != "always" for mode in profile.presets["safe"].values()), "safe takes what was measured"
    assert bool(profile.pins) == name.startswith("sm")


def test_a_file_loads_by_its_path(write: Callable, good: dict) -> None:
    path = write(good)
    for given in (path, str(path)):
        profile = load_profile(given)
        assert profile.name == "made"
        assert {op: list(names) for op, names in profile.order.items()} == good["order"]


def test_loading_again_reads_nothing(write: Callable, good: dict) -> None:
    path = write(good)
    first = load_profile(path)
    path.unlink()
    assert load_profile(path) is first


def test_a_shared_profile_cannot_be_written_to() -> None:
    profile = load_profile("sm89")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        profile.name = "other"
    for mapping in (profile.order, profile.presets, profile.presets["safe"], profile.denials["select_blocks"]):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["triton"] = None
    assert isinstance(profile.order["combine"], tuple)


def test_everything_a_profile_can_say(write: Callable, good: dict) -> None:
    document = good | {
        "presets": {"safe": {"fa2": "measured"}, "perf": {"triton": "always", "fa2": "opt-in"}},
        "thresholds": {
            "window_attention": {
                "fa2": {"at_least": {"max_seqlen_k": 10}, "at_most": {"total_q": 9}, "measured": MEASURED},
                "triton": {"not_measured": "nobody had one"},
            },
        },
        "prefer": {"window_attention": {"fa2": {"at_most": {"max_seqlen_k": 5}, "measured": MEASURED}}},
        "denials": {
            "select_blocks": {"triton": {"adr": "0001", "reason": "off", "lifted_by": "NSA_TRITON_SEL_FORCE"}},
        },
        "pins": {"nsa-fa2": "==0.1.*", "torch": ">=2.4,<3"},
    }
    profile = load_profile(write(document))
    threshold = profile.thresholds["window_attention"]["fa2"]
    assert (threshold.at_least.max_seqlen_k, threshold.at_least.total_q, threshold.at_most.total_q) == (10, None, 9)
    assert threshold.measured.date == datetime.date(2026, 11, 22)
    assert (threshold.measured.gpu, threshold.measured.csv, threshold.not_measured) == ("H100", "sm90.csv", None)
    assert profile.thresholds["window_attention"]["triton"].not_measured == "nobody had one"
    assert profile.prefer["window_attention"]["fa2"].at_most.max_seqlen_k == 5
    assert profile.denials["select_blocks"]["triton"].lifted_by == "NSA_TRITON_SEL_FORCE"
    assert profile.presets["perf"] == {"triton": "always", "fa2": "opt-in"}
    assert profile.pins == {"nsa-fa2": "==0.1.*", "torch": ">=2.4,<3"}


def test_versions_may_be_left_out(write: Callable, good: dict) -> None:
    words = "torch 2.11.0, cuDNN 9.19.0"
    measured = {"fa2": {"measured": MEASURED}, "triton": {"measured": MEASURED | {"versions": words}}}
    loaded = load_profile(write(good | {"thresholds": {"combine": measured}})).thresholds["combine"]
    assert (loaded["fa2"].measured.versions, loaded["triton"].measured.versions) == (None, words)


def test_a_date_may_stand_without_quotes(write: Callable, good: dict) -> None:
    day = datetime.date(2026, 11, 22)
    measured = {"fa2": {"measured": MEASURED | {"date": day}}}
    path = write(good | {"thresholds": {"combine": measured}})
    assert "date: 2026-11-22" in path.read_text()
    assert load_profile(path).thresholds["combine"]["fa2"].measured.date == day


# --- extends ---------------------------------------------------------------------------------------------------------


def base_of(good: dict) -> dict[str, Any]:
    thresholds = {"fa2": {"at_least": {"total_q": 8}, "at_most": {"total_q": 64}, "not_measured": "base"}}
    denial = {"adr": "0001", "reason": "base"}
    return good | {
        "name": "base of all",
        "thresholds": {"combine": thresholds, "window_attention": thresholds},
        "denials": {"combine": {"triton": denial}, "select_blocks": {"triton": denial}},
        "pins": {"torch": "==2.11.0", "triton": "==3.6.0"},
    }


def test_a_file_overrides_what_it_extends_entry_by_entry(write: Callable, good: dict) -> None:
    write(base_of(good), "below.yaml")
    over = {
        "name": "over",
        "source": "over",
        "extends": "below.yaml",
        "order": {"combine": ["fa2", "sdpa"]},
        "presets": {"safe": {"fa2": "threshold"}},
        "thresholds": {"combine": {"fa2": {"at_most": {"total_q": 2}, "not_measured": "over"}}},
        "denials": {"combine": {"triton": None}},
        "pins": {"torch": "==2.12.0"},
    }
    below, profile = load_profile(write(base_of(good), "below.yaml")), load_profile(write(over))
    assert (profile.name, profile.source) == ("over", "over")
    assert profile.order["combine"] == ("fa2", "sdpa"), "a list replaces a list"
    assert all(profile.order[op] == below.order[op] for op in OPS if op != "combine")
    assert profile.presets["safe"] == {"triton": "always", "fa2": "threshold"}
    assert profile.presets["perf"] == below.presets["perf"]
    threshold = profile.thresholds["combine"]["fa2"]
    assert (threshold.at_least.total_q, threshold.at_most.total_q) == (None, 2)
    assert threshold.not_measured == "over", "a threshold is one entry, replaced whole"
    assert profile.thresholds["window_attention"] == below.thresholds["window_attention"]
    assert profile.denials["combine"] == {}
    assert profile.denials["select_blocks"] == below.denials["select_blocks"]
    assert profile.pins == {"torch": "==2.12.0", "triton": "==3.6.0"}


def test_null_takes_an_entry_away(write: Callable, good: dict) -> None:
    write(base_of(good), "below.yaml")
    over = {
        "name": "over",
        "source": "over",
        "extends": "below.yaml",
        "presets": {"perf": {"fa2": None}},
        "thresholds": {"combine": {"fa2": None}},
        "denials": {"select_blocks": {"triton": None}},
        "pins": {"triton": None},
    }
    profile = load_profile(write(over))
    assert profile.presets["perf"] == {"triton": "always"}
    assert profile.thresholds["combine"] == {}
    assert "fa2" in profile.thresholds["window_attention"]
    assert profile.denials["select_blocks"] == {}
    assert profile.pins == {"torch": "==2.11.0"}


def test_null_for_what_is_not_there_takes_nothing_away(write: Callable, good: dict) -> None:
    assert load_profile(write(good | {"pins": {"torch": None}, "denials": {"combine": {"fa2": None}}})).pins == {}


def test_a_shipped_profile_is_extended_by_name(write: Callable) -> None:
    path = write({"name": "ours", "source": "us", "extends": "sm89", "pins": {"nsa-fa2": None}})
    profile, shipped = load_profile(path), load_profile("sm89")
    assert profile.name == "ours"
    assert profile.pins == {"nsa-kernels-triton": "==0.1.*"}
    assert (profile.denials, profile.thresholds) == (shipped.denials, shipped.thresholds)


def test_paths_are_relative_to_the_file_that_names_them(write: Callable, good: dict, monkeypatch, tmp_path) -> None:
    """Not to the directory of the process; and a chain has as many files as it likes."""
    write(good | {"pins": {"a": "==1", "b": "==1", "c": "==1"}}, "below.yaml")
    between = {"name": "between", "source": "x", "extends": "../below.yaml", "pins": {"b": "==2", "c": "==2"}}
    write(between, "deeper/between.yaml")
    path = write({"name": "top", "source": "x", "extends": "deeper/between.yaml", "pins": {"c": "==3"}}, "top.yaml")
    monkeypatch.chdir("/")
    assert load_profile(path).pins == {"a": "==1", "b": "==2", "c": "==3"}
    absolute = {"name": "other", "source": "x", "extends": str(tmp_path / "below.yaml")}
    assert load_profile(write(absolute, "deeper/other.yaml")).pins == {"a": "==1", "b": "==1", "c": "==1"}


def test_a_chain_that_comes_back(write: Callable) -> None:
    first = write({"name": "a", "source": "x", "extends": "b.yaml"}, "a.yaml")
    write({"name": "b", "source": "x", "extends": "./a.yaml"}, "b.yaml")
    with pytest.raises(ValueError, match=r"a.yaml: extends: expected a chain that ends, got a -> b -> a$"):
        load_profile(first)
    itself = write({"name": "c", "source": "x", "extends": "c.yaml"}, "c.yaml")
    with pytest.raises(ValueError, match=r"c.yaml: extends: expected a chain that ends, got c -> c$"):
        load_profile(itself)


@pytest.mark.parametrize("missing", ["sm9000", "not-there.yaml", "/no/such/file.yaml", "base.yml"])
def test_a_chain_into_nothing(missing: str, write: Callable) -> None:
    path = write({"name": "a", "source": "x", "extends": missing})
    message = rf"^{path}: extends: expected one of \['base', .*\] or a .yaml file, got '{missing}'$"
    with pytest.raises(ValueError, match=message):
        load_profile(path)


def test_a_mistake_below_names_the_file_below(write: Callable, good: dict) -> None:
    below = write(good | {"ordre": {}}, "below.yaml")
    path = write({"name": "a", "source": "x", "extends": "below.yaml"})
    with pytest.raises(ValueError, match=rf"^{below}: ordre: Extra inputs are not permitted, got \{{\}}$"):
        load_profile(path)


def test_only_the_whole_must_be_consistent(write: Callable, good: dict) -> None:
    """A file alone may lack an order; what comes out of the chain may not contradict itself."""
    write(good, "below.yaml")
    over = {"name": "a", "source": "x", "extends": "below.yaml", "presets": {"safe": {"cudnn": "always"}}}
    path = write(over)
    with pytest.raises(ValueError, match=rf"^{path}: .*presets.safe.cudnn: expected one of \['fa2', 'triton'\]"):
        load_profile(path)


# --- what does not validate ------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ordre": {}}, r"ordre: Extra inputs are not permitted, got \{\}"),
    ({"name": 7}, r"name: Input should be a valid string, got 7"),
    ({"name": ""}, r"name: String should match pattern .*, got ''"),
    ({"name": "two\nlines"}, r"name: String should match pattern .*, got 'two\\nlines'"),
    ({"pins": {"two words": "==1"}}, r"pins.two words.\[key\]: expected a distribution's name, without extras"),
    ({"pins": {"nsa-fa2[flash]": "==1"}}, r"pins.nsa-fa2\[flash\].\[key\]: expected a distribution's name"),
    ({"source": ""}, r"source: String should have at least 1 character"),
    ({"extends": 9}, r"extends: Input should be a valid string, got 9"),
    ({"order": "sdpa"}, r"order: Input should be a valid dictionary, got 'sdpa'"),
    ({"order": {"combine": "sdpa"}}, r"order.combine: Input should be a valid list, got 'sdpa'"),
    ({"order": {"combine": [1]}}, r"order.combine.0: Input should be a valid string, got 1"),
    ({"order": {"atention": ["sdpa"]}}, r"order.atention.\S*: Input should be 'compress_mean', .*, got 'atention'"),
    ({"order": {"combine": None}}, r"order.combine: Input should be a valid list, got None"),
    ({"presets": None}, r"presets: Input should be a valid dictionary, got None"),
    ({"presets": {"fast": {}}}, r"presets.fast.\S*: Input should be 'safe' or 'perf', got 'fast'"),
    (
        {"presets": {"safe": {"fa2": "sometimes"}}},
        r"presets.safe.fa2: Input should be 'always', 'threshold', 'measured' or 'opt-in', got 'sometimes'",
    ),
    ({"presets": {"safe": {"fa2": True}}}, r"presets.safe.fa2: Input should be 'always', .*, got True"),
    (
        {"thresholds": {"combine": {"fa2": {"at_least": {"max_seqlen": 1}, "not_measured": "x"}}}},
        r"thresholds.combine.fa2.at_least.max_seqlen: Extra inputs are not permitted, got 1",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"at_least": {"total_q": "8"}, "not_measured": "x"}}}},
        r"thresholds.combine.fa2.at_least.total_q: Input should be a valid integer, got '8'",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"at_most": {"total_q": -1}, "not_measured": "x"}}}},
        r"thresholds.combine.fa2.at_most.total_q: Input should be greater than or equal to 0, got -1",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"at_least": {"total_q": 8}}}}},
        r"thresholds.combine.fa2: expected either measured \(date, gpu, csv\) or not_measured \(why\), got \{",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"measured": MEASURED, "not_measured": "x"}}}},
        r"thresholds.combine.fa2: expected either measured \(date, gpu, csv\) or not_measured \(why\), got \{",
    ),
    ({"thresholds": {"combine": {"fa2": {"not_measured": ""}}}}, r"thresholds.combine.fa2.not_measured: String should"),
    (
        {"thresholds": {"combine": {"fa2": {"measured": MEASURED | {"date": "soon"}}}}},
        r"thresholds.combine.fa2.measured.date: Invalid isoformat string: 'soon', got 'soon'",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"measured": MEASURED | {"date": 86400}}}}},
        r"thresholds.combine.fa2.measured.date: Input should be a valid date.*, got 86400",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"measured": MEASURED | {"versions": ""}}}}},
        r"thresholds.combine.fa2.measured.versions: String should have at least 1 character, got ''",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"measured": MEASURED | {"gpu": ""}}}}},
        r"thresholds.combine.fa2.measured.gpu: String should have at least 1 character, got ''",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"measured": {"date": "2026-11-22", "gpu": "H100"}}}}},
        r"thresholds.combine.fa2.measured.csv: Field required",
    ),
    (
        {"denials": {"combine": {"fa2": {"adr": 1, "reason": "x"}}}},
        r"denials.combine.fa2.adr: Input should be a valid string, got 1",
    ),
    (
        {"denials": {"combine": {"fa2": {"adr": "1", "reason": "x"}}}},
        r"denials.combine.fa2.adr: String should match pattern '.*', got '1'",
    ),
    ({"denials": {"combine": {"fa2": {"adr": "0001"}}}}, r"denials.combine.fa2.reason: Field required"),
    (
        {"denials": {"combine": {"fa2": {"adr": "0001", "reason": "x", "lifted_by": "NSA_FA2"}}}},
        r"denials.combine.fa2.lifted_by: Input should be 'NSA_TRITON_SEL_FORCE', got 'NSA_FA2'",
    ),
    ({"pins": {"torch": "2.11.0"}}, r"pins.torch: expected a version specifier such as ==2.11.0, got '2.11.0'"),
    ({"pins": {"torch": 2.11}}, r"pins.torch: Input should be a valid string, got 2.11"),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=[message.split(":")[0] for _, message in WRONG])
def test_what_does_not_validate(changes: dict, message: str, write: Callable, good: dict) -> None:
    """The message names the file, the key and the value."""
    path = write(good | changes)
    with pytest.raises(ValueError, match=rf"(?s)^{path}: {message}"):
        load_profile(path)


# Each entry is well formed and contradicts another.
NEVER = {"fa2": {"not_measured": "x"}}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"order": {"combine": ["sdpa"]}}, r"order: expected exactly the ops \['compress_mean', .*\], got \['combine'\]"),
    (
        {"order": {op: ["fa2", "fa2", "sdpa"] for op in OPS}},
        r"order.compress_mean: expected different backends, got \['fa2', 'fa2', 'sdpa'\]",
    ),
    (
        {"order": {op: ["sdpa", "fa2", "triton"] for op in OPS}},
        r"order.compress_mean: expected sdpa at the end, it takes .* to it, got \['sdpa', 'fa2', 'triton'\]",
    ),
    ({"order": {op: [] for op in OPS}}, r"order.compress_mean: expected sdpa at the end, .*, got \[\]"),
    ({"presets": {"safe": {"cudnn": "always"}}}, r"presets.safe.cudnn: expected one of \['fa2', 'triton'\]"),
    ({"presets": {"perf": {"sdpa": "always"}}}, r"presets.perf.sdpa: expected one of \['fa2', 'triton'\]"),
    ({"presets": {"safe": {"triton": "opt-in"}}}, r"presets.safe.triton: expected opt-in of \['fa2', 'fa2-torch'\] on"),
    (
        {"denials": {"combine": {"cudnn": {"adr": "0001", "reason": "x"}}}},
        r"denials.combine.cudnn: expected a backend of order.combine but sdpa",
    ),
    (
        {"denials": {"combine": {"sdpa": {"adr": "0001", "reason": "x"}}}},
        r"denials.combine.sdpa: expected a backend of order.combine but sdpa",
    ),
    (
        {"thresholds": {"combine": {"sdpa": {"not_measured": "x"}}}},
        r"thresholds.combine.sdpa: expected one that can trigger, but sdpa is always taken",
    ),
    (
        {"thresholds": {"combine": {"cudnn": {"not_measured": "x"}}}},
        r"thresholds.combine.cudnn: expected one that can trigger, but order.combine has no cudnn",
    ),
    (
        {"thresholds": {"combine": NEVER}, "denials": {"combine": {"fa2": {"adr": "0001", "reason": "x"}}}},
        r"thresholds.combine.fa2: expected one that can trigger, but denials.combine.fa2 refuses it always",
    ),
    (
        {"thresholds": {"combine": NEVER}, "presets": {"perf": {"triton": "always"}}},
        r"thresholds.combine.fa2: expected one that can trigger, but no preset takes the backend",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"at_least": {"total_q": 9}, "at_most": {"total_q": 8}, **NEVER["fa2"]}}}},
        r"total_q: expected at_least <= at_most, got 9 > 8: it can never trigger",
    ),
    (
        {
            "thresholds": {
                "combine": {"fa2": {"at_least": {"max_seqlen_q": 9}, "at_most": {"total_q": 8}, **NEVER["fa2"]}}
            }
        },
        r"max_seqlen_q: expected at_least <= at_most.total_q, .*, got 9 > 8: it can never trigger",
    ),
    (
        {
            "presets": {"safe": {"triton": "measured"}},
            "thresholds": {"select_blocks": {"triton": {"not_measured": "x"}}},
        },
        r"thresholds.select_blocks.triton: expected one that can trigger, but it is not measured, and every preset",
    ),
    (
        {"thresholds": {"combine": {"fa2": {"at_least": {"max_seqlen_k": 9}, **NEVER["fa2"]}}}},
        r"thresholds.combine.fa2: expected one that can trigger, but combine knows no sequences, only total_q",
    ),
    (
        {"prefer": {"combine": {"triton": {"at_most": {"total_q": 8}, "not_measured": "x"}}}},
        r"prefer.combine.triton: expected a backend between the first of order.combine and the last",
    ),
    (
        {"prefer": {"combine": {"sdpa": {"at_most": {"total_q": 8}, "not_measured": "x"}}}},
        r"prefer.combine.sdpa: expected a backend between the first of order.combine and the last",
    ),
    (
        {"prefer": {"combine": {"fa2": {"not_measured": "x"}}}},
        r"prefer.combine.fa2: expected bounds; without any it comes first in order.combine",
    ),
    (
        {"prefer": {"combine": {"fa2": {"at_most": {"max_seqlen_k": 8}, "not_measured": "x"}}}},
        r"prefer.combine.fa2: expected bounds of total_q, combine knows no sequences",
    ),
]


@pytest.mark.parametrize("changes, message", CONTRADICTIONS, ids=[m.split(":")[0] for _, m in CONTRADICTIONS])
def test_what_contradicts_itself(changes: dict, message: str, write: Callable, good: dict) -> None:
    path = write(good | changes)
    with pytest.raises(ValueError, match=rf"(?s)^{path}: \S+: {message}"):
        load_profile(path)


def test_a_denial_that_a_flag_lifts_leaves_room_for_a_threshold(write: Callable, good: dict) -> None:
    lifted = {"triton": {"adr": "0001", "reason": "x", "lifted_by": "NSA_TRITON_SEL_FORCE"}}
    document = good | {
        "denials": {"select_blocks": lifted},
        "thresholds": {"select_blocks": {"triton": {"not_measured": "x"}}},
    }
    assert "triton" in load_profile(write(document)).thresholds["select_blocks"]


def test_bounds_that_meet_are_no_contradiction(write: Callable, good: dict) -> None:
    exactly = {"at_least": {"total_q": 8, "max_seqlen_q": 8}, "at_most": {"total_q": 8}, "not_measured": "x"}
    document = good | {"thresholds": {"window_attention": {"fa2": exactly}}}
    assert load_profile(write(document)).thresholds["window_attention"]["fa2"].at_most.total_q == 8


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"document: Input should be a valid dictionary .*, got None"),
        ("- name: made\n", r"document: Input should be a valid dictionary"),
        ("name: [made\norder:", r"expected YAML, got while parsing"),
        ("name: \tmade\n  order: {}", r"expected YAML, got"),
        ("name: made\nname: other\n", r"expected YAML, got duplicate key 'name'\n.*line 1, column 1"),
        ("name: made\npins: {torch: ==1, torch: ==1}\n", r"expected YAML, got duplicate key 'torch'\n.*line 2"),
        ("? [a]\n: made\n", r"expected YAML, got .*found unhashable key"),
        ("name: !!python/object:os.system made\n", r"expected YAML, got could not determine a constructor"),
        ("name: \x07\n", r"expected YAML, got .*special characters are not allowed"),
    ],
)
def test_what_is_no_yaml(text: str, message: str, write: Callable) -> None:
    path = write(text)
    with pytest.raises(ValueError, match=rf"(?s)^{path}: {message}"):
        load_profile(path)


def test_merge_keys_are_no_duplicates(write: Callable, good: dict) -> None:
    """`<<` puts entries under a mapping's own; deep in another mapping, it may be read twice."""
    text = yaml.safe_dump(good) + (
        "thresholds:\n"
        "  combine: {fa2: &one {at_least: {total_q: 8}, not_measured: one}}\n"
        "  select_blocks: {fa2: &two {<<: *one, not_measured: two}}\n"
        "  window_attention: {<<: {fa2: *two}, triton: {<<: *two, at_most: {total_q: 64}}}\n"
        "  compress_mean: {fa2: {<<: *two, not_measured: three}}\n"
    )
    thresholds = load_profile(write(text)).thresholds
    found = {op: {name: x.not_measured for name, x in by_name.items()} for op, by_name in thresholds.items()}
    assert found == {
        "combine": {"fa2": "one"},
        "select_blocks": {"fa2": "two"},
        "window_attention": {"fa2": "two", "triton": "two"},
        "compress_mean": {"fa2": "three"},
    }
    assert {x.at_least.total_q for by_name in thresholds.values() for x in by_name.values()} == {8}
    assert thresholds["window_attention"]["triton"].at_most.total_q == 64


@pytest.mark.parametrize("name", ["sm9000", "/no/such/file.yaml", "base.yml"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^profile: expected one of \['base', .*\] or a .yaml file, got '{name}'$"):
        load_profile(name)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(ValueError, match=rf"^{folder}: expected a readable file, got "):
        load_profile(folder)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: größe".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{latin}: expected a readable file, got 'utf-8' codec can't decode"):
        load_profile(latin)


def test_every_mistake_is_reported(write: Callable, good: dict) -> None:
    with pytest.raises(ValueError, match=r"name: .*; order.combine: ") as caught:
        load_profile(write(good | {"name": 7, "order": {"combine": "sdpa"}}))
    assert caught.value.__cause__ is not None


def test_long_values_are_cut(write: Callable, good: dict) -> None:
    with pytest.raises(ValueError, match=r"ordre: .*, got 'x{190,196}\.\.\.$"):
        load_profile(write(good | {"ordre": "x" * 1000}))


def test_made_in_code_it_is_checked_too() -> None:
    with pytest.raises(pydantic.ValidationError, match="expected exactly the ops"):
        Profile(name="made", source="a test", order={})


# --- which profile a device has --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sm, name, note",
    [
        (75, "base", "no profile for SM 7.5 or a lower one of its family: base is used"),
        (80, "sm80", None),
        (86, "sm80", "no profile for SM 8.6: the nearest lower one of its family is used"),
        (87, "sm80", "no profile for SM 8.7: the nearest lower one of its family is used"),
        (89, "sm89", None),
        (90, "sm90", None),
        (100, "sm100", None),
        (103, "sm100", "no profile for SM 10.3: the nearest lower one of its family is used"),
        (120, "base", "no profile for SM 12.0 or a lower one of its family: base is used"),
        (None, "base", "no profile for device cuda without an SM: base is used"),
    ],
)
def test_the_profile_of_an_sm(sm: int | None, name: str, note: str | None) -> None:
    assert profile_of("cuda", sm) == (name, note)


def test_the_profile_of_a_device_that_has_no_sm() -> None:
    assert profile_of("cpu", None) == ("cpu", None)
    assert profile_of("mps", None) == ("base", "no profile for device mps without an SM: base is used")
