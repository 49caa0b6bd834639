"""Which backend runs what, on which device, why: every decision, against the table in decisions.csv.

The table is read by people: equal decisions are joined, `*` is any value, and the first candidate that is rejected is
there with its reason; `none` stands where no backend takes it. After a change that is meant, `python
tests-integration/test_decisions.py --write`.

Every installed backend answers for itself. Those that no package offers yet have stand-ins, which take every problem on
CUDA; a real one takes the place of its stand-in, and the table must then be written again.
"""

import csv
import difflib
import io
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from nsa_routing import OPS, Environment, Plan, Policy, Problem, Rejected, backends, load_profile, plan, reset
from nsa_routing.policy import FA2_BACKENDS
from nsa_routing.profile import SHIPPED, profile_of

TABLE = Path(__file__).with_name("decisions.csv")

MACHINES = {  # device and SM
    "cpu": ("cpu", None),
    "A100": ("cuda", 80),
    "RTX 3090": ("cuda", 86),
    "RTX 4090": ("cuda", 89),
    "H100": ("cuda", 90),
    "B200": ("cuda", 100),
    "SM 12.0": ("cuda", 120),
    "ROCm": ("cuda", None),
}
AXES: dict[str, tuple[Any, ...]] = {
    "machine": tuple(MACHINES),
    "op": OPS,
    "preset": ("safe", "perf"),
    "NSA_FA2": ("auto", "1"),
    "NSA_TRITON_SEL_FORCE": ("0", "1"),
    "length": (128, 1024, 8192, 65536),
    "dtype": ("fp32", "fp16", "bf16"),
    "head_dim": (64, 128, 192),
    "group_size": (1, 4, 16),
    "grad": ("no", "yes"),
    "batch": ("uniform", "ragged"),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STAND_INS = ("triton", "fa2", "fa2-torch", "cudnn")
COLUMNS = (*AXES, "backend", "falls back to", "first rejected")

Case = tuple[Any, ...]  # a value for each axis
Answer = tuple[str, str, str]  # the columns after the axes


class StandIn:
    """A backend that takes every problem on CUDA."""

    def __init__(self, name: str) -> None:
        self.name, self.uses_triton = name, name == "triton"

    def refuse(self, op: str, problem: Problem, environment: Environment) -> str | None:
        return None if environment.device == "cuda" else "needs CUDA"

    def __getattr__(self, op: str) -> Any:
        if op not in OPS:
            raise AttributeError(op)
        return lambda *_, **__: pytest.fail("a plan runs nothing")


class Point(NamedTuple):
    """The entry point of a stand-in."""

    name: str
    value: str = "stand-in"

    def load(self) -> StandIn:
        return StandIn(self.name)


@cache
def plans() -> dict[Case, Plan]:
    """The plan of every case."""
    real = backends.installed_backends()
    points = (*real.values(), *(Point(name) for name in STAND_INS if name not in real))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "entry_points", lambda group: points)
        patch.delenv("TRITON_INTERPRET", raising=False)  # interpreted, Triton would run on a CPU by request
        reset()
        names = tuple(backends.installed_backends())
        made = {}
        for case in product(*AXES.values()):
            name, op, preset, fa2, force, length, dtype, head_dim, group_size, grad, batch = case
            device, sm = MACHINES[name]
            cuda = device == "cuda"
            versions = ("2.11.0+cu130", "3.6.0", "2.8.3") if cuda else ("2.11.0+cpu", "3.6.0", None)
            environment = Environment(device, sm, *versions, names, cudnn=91_900 if sm else None)
            problem = Problem(
                *(op, device, DTYPES[dtype], head_dim, head_dim, group_size),
                needs_grad=grad == "yes",
                paged=op == "decode_attention",
                deterministic=False,
                uniform=batch == "uniform",
                total_q=length,
                max_seqlen_q=length,
                max_seqlen_k=length,
            )
            policy = Policy(preset=preset, fa2=fa2, triton_sel_force=force == "1")
            made[case] = plan(environment, load_profile(profile_of(device, sm)[0]), problem, policy)
    reset()
    return made


def answer(made: Plan) -> Answer:
    """A plan in three columns; the length that a threshold was asked for is left out, so that lengths can be joined."""
    chosen, *others = made.accepted or ("none",)
    rejected = (x for x in made.candidates if isinstance(x, Rejected))
    first = next((f"{x.backend}: {re.sub(r', got [0-9]+$', '', x.reason)}" for x in rejected), "")
    return chosen, " ".join(others), first


def joined(answers: dict[Case, Answer]) -> list[tuple[str, ...]]:
    """Rows that between them have every case once: axis by axis, rows that differ in it alone become one."""
    rows = [(*((value,) for value in case), found) for case, found in answers.items()]
    for axis in reversed(range(len(AXES))):
        merged: dict[tuple, tuple] = {}
        for row in rows:
            key = row[:axis] + row[axis + 1 :]
            merged[key] = (*merged.get(key, ()), *row[axis])
        rows = [(*key[:axis], values, *key[axis:]) for key, values in merged.items()]
    full = [len(values) for values in AXES.values()]
    shown = [
        tuple("*" if len(v) == size else "|".join(map(str, v)) for v, size in zip(row, full, strict=False)) + row[-1]
        for row in rows
    ]
    return sorted(shown, key=lambda row: row[:2])


def as_csv(rows: list[tuple[str, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue()


def current() -> str:
    return as_csv(joined({case: answer(made) for case, made in plans().items()}))


def test_decisions_are_those_of_the_table() -> None:
    expected, found = TABLE.read_text(encoding="utf-8"), current()
    changes = difflib.unified_diff(expected.splitlines(), found.splitlines(), "decisions.csv", "now", n=0, lineterm="")
    assert found == expected, "\n".join(["decisions changed:", *changes])


def expanded(text: str) -> Iterator[tuple[Case, Answer]]:
    """Every case that a table's rows speak of."""
    for row in list(csv.reader(io.StringIO(text)))[1:]:
        cells = zip(row, AXES.values(), strict=False)
        values = [axis if x == "*" else [v for v in axis if str(v) in x.split("|")] for x, axis in cells]
        yield from ((case, tuple(row[len(AXES) :])) for case in product(*values))


def test_the_table_has_every_case_once() -> None:
    """Joining loses nothing and says nothing twice."""
    told = list(expanded(TABLE.read_text(encoding="utf-8")))
    assert len(told) == len(plans())
    assert {case for case, _ in told} == plans().keys()


def test_every_shipped_profile_decides_something() -> None:
    assert {made.profile for made in plans().values()} == {file.stem for file in SHIPPED.glob("*.yaml")}


def cases(**where: Any) -> list[tuple[dict[str, Any], Plan]]:
    named = ((dict(zip(AXES, case, strict=True)), made) for case, made in plans().items())
    return [(case, made) for case, made in named if all(case[key] == value for key, value in where.items())]


SELECTION = ("select_blocks", "selected_attention", "decode_attention")


def test_what_the_design_promises_holds_in_every_case() -> None:
    """The table may be written again by mistake; these may not."""
    for case, made in cases():
        taken = set(made.accepted)
        if case["op"] == "decode_attention" and case["grad"] == "yes":
            assert not taken, "no gradient through pages"
            continue
        assert made.accepted[-1] == "sdpa", "there is always a last resort"
        if case["preset"] == "safe":
            assert "triton" not in taken, "Triton never without perf or a request"
            if case["NSA_FA2"] == "auto" and case["machine"] != "H100":
                assert not taken & set(FA2_BACKENDS), "no FA-2 threshold is measured there"
        if case["machine"] in ("cpu", "SM 12.0", "ROCm"):
            assert taken == {"sdpa"}, "devices that nobody vouches for"
        if case["dtype"] == "fp32" or case["machine"] != "H100":
            assert "cudnn" not in taken, "measured on H100 alone, and for half precision"
        if case["dtype"] == "fp32":
            assert not taken & set(FA2_BACKENDS), "FA-2 is for half precision"
        if case["batch"] == "ragged" or case["head_dim"] > 128:
            assert "cudnn" not in taken, "rectangular batches, head_dim up to 128"
        if case["machine"] == "RTX 4090":
            if case["op"] in SELECTION:
                assert not taken & set(FA2_BACKENDS), "no FA-2 for selection"
                forced = case["preset"] == "perf" and case["NSA_TRITON_SEL_FORCE"] == "1"
                assert ("triton" in taken) == forced
            elif case["NSA_FA2"] == "auto":
                assert not taken & set(FA2_BACKENDS), "opt-in"


def test_what_decodes() -> None:
    """Triton where perf takes it, and on an RTX 4090 only if forced, for the step selects blocks; else sdpa."""
    for case, made in cases(op="decode_attention"):
        perf = case["preset"] == "perf" and case["machine"] in ("A100", "RTX 3090", "H100")
        forced = case["preset"] == "perf" and case["machine"] == "RTX 4090" and case["NSA_TRITON_SEL_FORCE"] == "1"
        expected = ("triton", "sdpa") if perf or forced else ("sdpa",)
        assert made.accepted == (expected if case["grad"] == "no" else ()), case


def test_what_perf_takes() -> None:
    for name in ("A100", "RTX 3090", "H100"):
        for case, made in cases(machine=name, preset="perf"):
            if case["op"] == "decode_attention":
                continue  # see test_what_decodes, which asks for gradients too
            long = case["op"] == "compressed_attention" and case["length"] > 16_384
            faster = long and "cudnn" in made.accepted  # measured on the H100
            assert made.backend == ("cudnn" if faster else "triton"), case
    assert "triton" not in {made.backend for _, made in cases(machine="B200", preset="perf")}


@pytest.mark.parametrize("op, least", [("window_attention", 1024), ("compressed_attention", 8192)])
def test_where_fa2_is_opted_in_its_thresholds_hold(op: str, least: int) -> None:
    for preset in ("safe", "perf"):
        for case, made in cases(machine="RTX 4090", op=op, preset=preset, NSA_FA2="1"):
            assert ("fa2" in made.accepted) == (case["length"] >= least and case["dtype"] != "fp32"), case


@pytest.mark.parametrize(
    "op, least, order",
    [
        ("window_attention", 128, ("fa2", "fa2-torch", "sdpa")),
        ("selected_attention", 128, ("fa2", "fa2-torch", "sdpa")),
        ("compressed_attention", 8192, ("cudnn", "fa2", "fa2-torch", "sdpa")),
    ],
)
def test_what_safe_takes_on_an_h100(op: str, least: int, order: tuple[str, ...]) -> None:
    """Every backend that was measured to pay there, the fastest first."""
    where = {"machine": "H100", "op": op, "preset": "safe", "dtype": "bf16", "head_dim": 128, "batch": "uniform"}
    for case, made in cases(**where):
        assert made.accepted == (order if case["length"] >= least else ("sdpa",)), case


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests-integration/test_decisions.py --write")
    TABLE.write_text(current(), encoding="utf-8")
