"""Do the flags mean what their table says, and is everything else an error?"""

import os
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError

import pytest
from nsa_routing import OPS, Policy, policy


def test_flags_are_frozen() -> None:
    """A flag more or less changes what operators may write: extend the design first."""
    assert policy.FLAGS == ("NSA_BACKEND",)


def test_every_flag_has_a_row_in_the_table_and_no_other_has() -> None:
    assert tuple(re.findall(r"^\| `(NSA_\w+)` \|", policy.__doc__, re.MULTILINE)) == policy.FLAGS


def test_no_variables_request_nothing() -> None:
    for environ in ({}, {"NSA_BACKEND": ""}, {"PATH": "/bin", "XNSA_BACKEND": "triton", "nsa_backend": "triton"}):
        assert Policy.from_env(environ) == Policy()
    assert all(Policy().backend_for(op) is None for op in OPS)


@pytest.mark.parametrize("value", ["triton", " triton "])
def test_a_name_is_for_every_op(value: str) -> None:
    asked = Policy.from_env({"NSA_BACKEND": value})
    assert {op: asked.backend_for(op) for op in OPS} == dict.fromkeys(OPS, "triton")


def test_pairs_are_for_their_ops() -> None:
    asked = Policy.from_env({"NSA_BACKEND": "window_attention=fa2, combine = sdpa"})
    expected = dict.fromkeys(OPS) | {"window_attention": "fa2", "combine": "sdpa"}
    assert {op: asked.backend_for(op) for op in OPS} == expected


@pytest.mark.parametrize(
    "environ, message",
    [
        (
            {"NSA_BAKCEND": "sdpa"},
            r"^NSA_BAKCEND: expected one of the variables \['NSA_BACKEND'\], got an unknown one$",
        ),
        ({"NSA_BACKEND": "sdpa", "NSA_": "1"}, r"^NSA_: expected one of the variables"),
        ({"NSA_Z": "1", "NSA_A": "1"}, r"^NSA_A: expected one of the variables"),
        ({"NSA_BACKEND": "sdpa,fa2"}, r"^NSA_BACKEND: expected a name or op=name pairs, got 'sdpa,fa2'$"),
        ({"NSA_BACKEND": "combine=sdpa,"}, r"^NSA_BACKEND: expected a name or op=name pairs, got 'combine=sdpa,'$"),
        ({"NSA_BACKEND": "combine="}, r"^NSA_BACKEND: expected a name or op=name pairs, got 'combine='$"),
        ({"NSA_BACKEND": "=sdpa"}, r"^NSA_BACKEND: expected an op of \['compress_mean', .*\], got ''$"),
        (
            {"NSA_BACKEND": "attention=sdpa"},
            r"^NSA_BACKEND: expected an op of \['compress_mean', .*\], got 'attention'$",
        ),
        ({"NSA_BACKEND": "   "}, r"^NSA_BACKEND: expected a name or op=name pairs, got '   '$"),
        ({"NSA_BACKEND": "combine=sdpa,combine=fa2"}, r"^NSA_BACKEND: expected each op once, got 'combine' twice in"),
    ],
)
def test_what_cannot_be_understood(environ: Mapping[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.from_env(environ)


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
