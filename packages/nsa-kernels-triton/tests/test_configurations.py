"""Do the launch configurations load, hold sane numbers, and give the first rule that fits?"""

from importlib.resources import files
from itertools import combinations
from typing import Any

import pytest
import torch
from nsa_kernels_triton import configurations
from nsa_kernels_triton.configurations import FAMILIES, OPTIONS, choose, family, launch, overridden, table

NAMES = sorted(x.name.removesuffix(".toml") for x in files(configurations).iterdir() if x.name.endswith(".toml"))
TILES = {"rows", "keys", "queries", "width", "blocks"}  # sizes of a tile: Triton's are powers of two
RULES = [
    pytest.param(rule, id=f"{name}-{kernel}-{number}")
    for name in NAMES
    for kernel, rules in table(name).items()
    for number, rule in enumerate(rules)
]
KERNELS = [pytest.param(rules, id=f"{name}-{kernel}") for name in NAMES for kernel, rules in table(name).items()]


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def test_there_is_a_file_for_each_family_and_what_they_extend() -> None:
    assert set(NAMES) == {"base", *FAMILIES.values()}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_configures_the_kernels_of_base(name: str) -> None:
    """A kernel that is in another file alone would have nothing on other devices."""
    assert table(name).keys() == table("base").keys()


@pytest.mark.parametrize("rule", RULES)
def test_numbers_are_sane(rule: dict[str, Any]) -> None:
    numbers = {key: value for key, value in rule.items() if key not in configurations.TOLD}
    assert all(type(value) is int and value >= 0 for value in numbers.values())
    assert is_power_of_two(numbers["num_warps"])
    assert numbers["num_warps"] <= 16
    assert 1 <= numbers["num_stages"] <= 8
    maxnreg = numbers.get("maxnreg", 0)
    assert maxnreg == 0 or (maxnreg % 8 == 0 and 24 <= maxnreg <= 255)
    assert [key for key in TILES & numbers.keys() if not is_power_of_two(numbers[key])] == []


@pytest.mark.parametrize("rules", KERNELS)
def test_the_last_rule_fits_all_and_no_other_does(rules: list[dict[str, Any]]) -> None:
    *others, last = rules
    assert "up_to" not in last
    for rule in others:
        assert rule["up_to"]
        assert all(type(most) is int and most >= 0 for most in rule["up_to"].values())


@pytest.mark.parametrize("rules", KERNELS)
def test_every_rule_can_be_reached(rules: list[dict[str, Any]]) -> None:
    """No rule lets pass less than one before it."""
    for earlier, later in combinations([rule.get("up_to", {}) for rule in rules], 2):
        assert not all(key in later and later[key] <= most for key, most in earlier.items()), (earlier, later)


FAKE = {
    "kernel": [
        {"up_to": {"head_dim": 64, "group_size": 4}, "rows": 1, "num_warps": 1, "num_stages": 1},
        {"up_to": {"head_dim": 64}, "rows": 2, "num_warps": 2, "num_stages": 2, "maxnreg": 128},
        {"up_to": {"head_dim": 128}, "rows": 3, "keys": 5, "num_warps": 4, "num_stages": 3},
    ]
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "table", {"made": FAKE, "sm90": FAKE}.__getitem__)


@pytest.mark.usefixtures("fake")
def test_the_first_rule_that_fits_wins() -> None:
    def rows(head_dim: int, group_size: int) -> int:
        return choose("kernel", "made", head_dim=head_dim, group_size=group_size)["rows"]

    asked = [(1, 1), (64, 4), (64, 5), (65, 4), (128, 64)]
    assert [rows(*case) for case in asked] == [1, 1, 2, 3, 3]


@pytest.mark.usefixtures("fake")
def test_sizes_and_options() -> None:
    config = choose("kernel", "made", head_dim=100, group_size=1)
    assert config.sizes == {"rows": 3, "keys": 5}
    assert config.options == {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    assert (config.num_warps, config.num_stages, config.maxnreg) == (4, 3, 0)
    limited = choose("kernel", "made", head_dim=64, group_size=9)
    assert limited.options == {"num_warps": 2, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 128}
    assert limited.options.keys() == {*OPTIONS, "enable_fp_fusion"}
    assert limited.sizes == {"rows": 2}
    with pytest.raises(KeyError, match="keys"):
        limited["keys"]


@pytest.mark.usefixtures("fake")
def test_a_case_that_no_rule_fits() -> None:
    with pytest.raises(LookupError, match=r"^configurations/made\.toml: kernel has no rule for \{'head_dim': 129, "):
        choose("kernel", "made", head_dim=129, group_size=1)
    with pytest.raises(LookupError, match="other"):
        choose("other", "made", head_dim=1)
    with pytest.raises(LookupError, match="group_size"):
        choose("kernel", "made", head_dim=1)


@pytest.mark.usefixtures("fake")
def test_the_cpu_takes_the_numbers_of_sm90() -> None:
    assert launch("kernel", torch.device("cpu"), head_dim=64, group_size=4)["rows"] == 1


@pytest.mark.parametrize(
    ("sm", "name"),
    {
        70: "sm80", 75: "sm80", 80: "sm80", 86: "sm89", 87: "sm80", 88: "sm80", 89: "sm89", 90: "sm90", 95: "sm90",
        100: "sm100", 101: "sm100", 103: "sm100", 110: "sm100", 120: "sm89", 121: "sm89", 130: "sm89",
    }.items(),
)  # fmt: skip
def test_families(sm: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that no file is for takes that of the nearest lower one; one that is older than all, the oldest's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(sm, 10))
    assert family.__wrapped__(torch.device("cuda", 0)) == name


def test_a_family_has_no_more_shared_memory_than_its_members() -> None:
    """Tiles of a file are checked against its namesake; who else takes it must have as much."""
    kib = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
    assert kib.keys() == FAMILIES.keys()
    for sm, name in FAMILIES.items():
        assert kib[int(name.removeprefix("sm"))] <= kib[sm]


@pytest.mark.usefixtures("fake")
def test_overridden_numbers_nest_and_go() -> None:
    def numbers() -> tuple[int, int]:
        config = choose("kernel", "made", head_dim=64, group_size=4)
        return config["rows"], config.num_warps

    with overridden("kernel", rows=8):
        assert numbers() == (8, 1)
        with overridden("kernel", num_warps=16):
            assert numbers() == (8, 16)
        assert numbers() == (8, 1)
    assert numbers() == (1, 1)


@pytest.mark.usefixtures("fake")
def test_overridden_numbers_go_with_an_exception() -> None:
    def stop() -> None:
        with overridden("kernel", rows=8):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert choose("kernel", "made", head_dim=64, group_size=4)["rows"] == 1


def test_a_file_takes_a_kernel_whole_and_keeps_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "low.toml").write_text("[[one]]\nup_to = {n = 1}\nrows = 1\n[[one]]\nrows = 2\n[[two]]\nrows = 3\n")
    (tmp_path / "high.toml").write_text('extends = "low"\nmeasured = "a run"\n[[one]]\nrows = 4\n')
    monkeypatch.setattr(configurations, "files", lambda package: tmp_path)
    monkeypatch.setattr(configurations, "table", table.__wrapped__)
    assert configurations.table("high") == {"one": [{"rows": 4}], "two": [{"rows": 3}]}
