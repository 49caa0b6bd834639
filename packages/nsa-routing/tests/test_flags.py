"""Do the flags mean what their table says, and is everything else an error?"""

import os
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from nsa_routing import FLAGS, OPS, Policy


def test_flags_are_frozen() -> None:
    """A flag more or less changes what operators may write: extend the design first."""
    assert tuple(FLAGS) == (
        "NSA_PROFILE",
        "NSA_PRESET",
        "NSA_BACKEND",
        "NSA_TRITON_SEL_FORCE",
        "NSA_FA2",
        "NSA_FALLBACK",
        "NSA_CHECK_FINITE",
        "NSA_DETERMINISTIC",
        "NSA_LOG",
        "NSA_LOG_EVERY",
    )
    with pytest.raises(TypeError, match="does not support item assignment"):
        FLAGS["NSA_MORE"] = FLAGS["NSA_LOG"]


def test_no_variables_request_nothing() -> None:
    for environ in ({}, dict.fromkeys(FLAGS, ""), dict.fromkeys(FLAGS, "  "), {"XNSA_PRESET": "?", "nsa_preset": "?"}):
        assert Policy.from_env(environ) == Policy()


def test_defaults() -> None:
    assert Policy() == Policy(
        backends=(),
        preset="safe",
        profile=None,
        triton_sel_force=False,
        fa2="auto",
        fallback="auto",
        check_finite=None,
        deterministic=False,
        log=None,
        log_every=0,
        log_seconds=0.0,
    )
    assert all(Policy().backend_for(op) is None for op in OPS)


EACH_OP = tuple((op, "fa2") for op in OPS)
VALUES: list[tuple[str, str, dict[str, Any]]] = [
    ("NSA_PROFILE", "sm90", {"profile": "sm90"}),
    ("NSA_PROFILE", "/etc/nsa/ours.yaml", {"profile": "/etc/nsa/ours.yaml"}),
    ("NSA_PRESET", "safe", {"preset": "safe"}),
    ("NSA_PRESET", "perf", {"preset": "perf"}),
    ("NSA_BACKEND", "fa2", {"backends": EACH_OP}),
    ("NSA_BACKEND", "combine=fa2", {"backends": (("combine", "fa2"),)}),
    (
        "NSA_BACKEND",
        "window_attention=fa2, combine = sdpa",
        {"backends": (("window_attention", "fa2"), ("combine", "sdpa"))},
    ),
    ("NSA_TRITON_SEL_FORCE", "0", {"triton_sel_force": False}),
    ("NSA_TRITON_SEL_FORCE", "1", {"triton_sel_force": True}),
    ("NSA_FA2", "auto", {"fa2": "auto"}),
    ("NSA_FA2", "0", {"fa2": "0"}),
    ("NSA_FA2", "1", {"fa2": "1"}),
    ("NSA_FALLBACK", "auto", {"fallback": "auto"}),
    ("NSA_FALLBACK", "raise", {"fallback": "raise"}),
    ("NSA_CHECK_FINITE", "always", {"check_finite": "always"}),
    ("NSA_CHECK_FINITE", "flag", {"check_finite": "flag"}),
    ("NSA_CHECK_FINITE", "off", {"check_finite": "off"}),
    ("NSA_DETERMINISTIC", "0", {"deterministic": False}),
    ("NSA_DETERMINISTIC", "1", {"deterministic": True}),
    ("NSA_LOG", "debug", {"log": "debug"}),
    ("NSA_LOG", "info", {"log": "info"}),
    ("NSA_LOG", "warning", {"log": "warning"}),
    ("NSA_LOG", "error", {"log": "error"}),
    ("NSA_LOG", "off", {"log": "off"}),
    ("NSA_LOG_EVERY", "0", {"log_every": 0}),
    ("NSA_LOG_EVERY", "100", {"log_every": 100}),
    ("NSA_LOG_EVERY", "30s", {"log_seconds": 30.0}),
    ("NSA_LOG_EVERY", "0.5s", {"log_seconds": 0.5}),
    ("NSA_LOG_EVERY", "100,30s", {"log_every": 100, "log_seconds": 30.0}),
    ("NSA_LOG_EVERY", "0,0s", {}),
]


@pytest.mark.parametrize("name, value, expected", VALUES)
def test_each_value_sets_its_field_and_no_other(name: str, value: str, expected: dict[str, Any]) -> None:
    assert Policy.from_env({name: value}) == replace(Policy(), **expected)
    assert Policy.from_env({name: f" {value} "}) == replace(Policy(), **expected)


def test_every_flag_and_every_field_is_tried() -> None:
    assert {name for name, _, _ in VALUES} == set(FLAGS)
    assert {key for _, _, expected in VALUES for key in expected} == {field.name for field in fields(Policy)}


IN_WORDS = {"NSA_PROFILE", "NSA_BACKEND", "NSA_LOG_EVERY"}  # their values are not a list


@pytest.mark.parametrize("name", [name for name in FLAGS if name not in IN_WORDS])
def test_the_table_lists_the_values(name: str) -> None:
    """Those that work, and its message for one that does not."""
    values = FLAGS[name].values.split(", ")
    assert values == [value for flag, value, _ in VALUES if flag == name]
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected one of {values}, got 'on'")):
        Policy.from_env({name: "on"})


@pytest.mark.parametrize("name", ["NSA_PRESET", "NSA_TRITON_SEL_FORCE", "NSA_FA2", "NSA_FALLBACK", "NSA_DETERMINISTIC"])
def test_the_table_lists_the_default(name: str) -> None:
    assert Policy.from_env({name: FLAGS[name].default}) == Policy()


@pytest.mark.parametrize("name", FLAGS)
def test_the_table_says_what_a_flag_does(name: str) -> None:
    assert len(FLAGS[name].meaning) > 20
    assert "|" not in "".join(FLAGS[name]), "it becomes a row of a table"


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"NSA_BAKCEND": "sdpa"}, r"^NSA_BAKCEND: expected one of the variables \['NSA_PROFILE', .*\], got an unknown"),
        ({"NSA_BAKCEND": ""}, r"^NSA_BAKCEND: expected one of the variables"),
        ({"NSA_BACKEND": "sdpa", "NSA_": "1"}, r"^NSA_: expected one of the variables"),
        ({"NSA_Z": "1", "NSA_A": "1"}, r"^NSA_A: expected one of the variables"),
        ({"NSA_PRESET": "Perf"}, r"^NSA_PRESET: expected one of \['safe', 'perf'\], got 'Perf'$"),
        ({"NSA_FA2": "2"}, r"^NSA_FA2: expected one of \['auto', '0', '1'\], got '2'$"),
        ({"NSA_DETERMINISTIC": "true"}, r"^NSA_DETERMINISTIC: expected one of \['0', '1'\], got 'true'$"),
        ({"NSA_LOG": "WARNING"}, r"^NSA_LOG: expected one of \['debug', .*\], got 'WARNING'$"),
        *(
            ({"NSA_LOG_EVERY": value}, rf"^NSA_LOG_EVERY: expected times .* seconds .* both .*, got {value!r}$")
            for value in ("-1", "1.5", "²", "s", "30 s", "30S", ",30s", "100,", "30s,100", "1,2", "infs", "1e3s", "²s")
        ),
        ({"NSA_BACKEND": "sdpa,fa2"}, r"^NSA_BACKEND: expected a name or op=name pairs, got 'sdpa,fa2'$"),
        ({"NSA_BACKEND": "combine=sdpa,"}, r"^NSA_BACKEND: expected a name or op=name pairs, got 'combine=sdpa,'$"),
        ({"NSA_BACKEND": "combine="}, r"^NSA_BACKEND: expected a name or op=name pairs, got 'combine='$"),
        ({"NSA_BACKEND": "=sdpa"}, r"^NSA_BACKEND: expected an op of \['compress_mean', .*\], got ''$"),
        (
            {"NSA_BACKEND": "attention=sdpa"},
            r"^NSA_BACKEND: expected an op of \['compress_mean', .*\], got 'attention'$",
        ),
        ({"NSA_BACKEND": "combine=sdpa,combine=fa2"}, r"^NSA_BACKEND: expected each op once, got 'combine' twice in"),
    ],
)
def test_what_cannot_be_understood(environ: Mapping[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.from_env(environ)


def test_a_name_is_for_every_op() -> None:
    asked = Policy.from_env({"NSA_BACKEND": "triton"})
    assert {op: asked.backend_for(op) for op in OPS} == dict.fromkeys(OPS, "triton")


def test_pairs_are_for_their_ops() -> None:
    asked = Policy.from_env({"NSA_BACKEND": "window_attention=fa2,combine=sdpa"})
    expected = dict.fromkeys(OPS) | {"window_attention": "fa2", "combine": "sdpa"}
    assert {op: asked.backend_for(op) for op in OPS} == expected


@pytest.mark.parametrize("preset, check", [("safe", "always"), ("perf", "flag")])
def test_results_are_checked_as_the_preset_says_unless_told(preset: str, check: str) -> None:
    assert Policy.from_env({"NSA_PRESET": preset}).check == check
    for told in ("always", "flag", "off"):
        assert Policy.from_env({"NSA_PRESET": preset, "NSA_CHECK_FINITE": told}).check == told


def test_what_a_flag_lifts() -> None:
    forced = Policy(triton_sel_force=True)
    assert forced.lifts("NSA_TRITON_SEL_FORCE")
    assert not forced.lifts(None)
    assert not Policy().lifts("NSA_TRITON_SEL_FORCE")


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_BACKEND", "combine=sdpa")
    assert Policy.from_env().backend_for("combine") == "sdpa"
    assert Policy.from_env(dict(os.environ)) == Policy.from_env()
    monkeypatch.setenv("NSA_BACKEND_FOR_COMBINE", "sdpa")
    with pytest.raises(ValueError, match=r"^NSA_BACKEND_FOR_COMBINE: expected one of the variables"):
        Policy.from_env()


def test_is_frozen_and_equal_by_value() -> None:
    asked = Policy.from_env({"NSA_BACKEND": "sdpa"})
    assert asked == Policy(tuple((op, "sdpa") for op in OPS))
    assert hash(asked) == hash(Policy(tuple((op, "sdpa") for op in OPS)))
    with pytest.raises(FrozenInstanceError):
        asked.backends = ()


@pytest.mark.parametrize(
    "wrong", [{"preset": "prf"}, {"fa2": "yes"}, {"fallback": ""}, {"check_finite": "x"}, {"log": "x"}]
)
def test_a_policy_made_in_code_is_checked_too(wrong: dict) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name}: expected one of \[.*\], got {value!r}$"):
        Policy(**wrong)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"log_every": -1}, ValueError, "^log_every: expected at least 0, got -1$"),
        ({"log_every": 1.0}, TypeError, "^log_every: expected an int, got 1.0 of type float$"),
        ({"log_seconds": -0.5}, ValueError, "^log_seconds: expected a finite number of at least 0, got -0.5$"),
        ({"log_seconds": float("nan")}, ValueError, "^log_seconds: expected a finite number of at least 0, got nan$"),
        ({"log_seconds": "30s"}, TypeError, "^log_seconds: expected a number, got '30s' of type str$"),
    ],
)
def test_a_rate_made_in_code_is_checked_too(wrong: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Policy(**wrong)
