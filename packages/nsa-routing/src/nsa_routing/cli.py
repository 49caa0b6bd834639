"""The command line `nsa-routing`: what this machine is, what is wrong with it, which backend runs what, and since when.

Exit status: 0; 1 where a check fails, a flag or profile is wrong, or there is nothing to measure; 2 for wrong options.
With `--json` standard output holds one JSON document and nothing else. Reports are as wide as the terminal, 80 columns
in a pipe; COLUMNS says otherwise.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa_routing.backends import installed_backends
from nsa_routing.checks import distribution_of, run_checks
from nsa_routing.environment import Environment, cudnn_words
from nsa_routing.environment import probe as probe_machine
from nsa_routing.pins import constraints
from nsa_routing.planning import Plan, Rejected, plan, verdict
from nsa_routing.policy import PRESETS, Policy
from nsa_routing.problem import OPS
from nsa_routing.profile import load_profile, profile_of
from nsa_routing.tuning import LEAST_REPEATS, LENGTHS, PREFILL_OPS, SPEEDUP, TuningError
from nsa_routing.tuning import tune as tune_profile
from nsa_routing.workload import typical

# Options are named although typer can derive that: with a metavar, some versions derive another name.
# Errors stay one line: rich boxes would cut them at the width of a pipe.
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_LENGTHS = ",".join(map(str, LENGTHS))
GIB = 2**30


@app.callback()
def _main() -> None:
    """Which backend runs which operation of Native Sparse Attention here, and why."""


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    """A wrong flag or profile, and nothing to measure, end the command with status 1."""
    try:
        yield
    except (ValueError, TuningError) as error:
        typer.echo(f"nsa-routing: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def _choice(values: tuple[str, ...]) -> Callable[[str], str]:
    """A parser for an option that takes one of `values`."""

    def parse(value: str) -> str:
        if value not in values:
            raise typer.BadParameter(f"expected one of {', '.join(values)}, got {value!r}")
        return value

    return parse


def _device(value: str) -> str:
    try:
        device = torch.device(value)
    except RuntimeError:
        raise typer.BadParameter(f"expected a device such as cpu or cuda, got {value!r}") from None
    if device.index is not None:
        raise typer.BadParameter(f"expected a device without its number, which is for --index, got {value!r}")
    return device.type


def _words(value: str) -> list[str]:
    words = [word.strip() for word in value.split(",")]
    if not all(words):
        raise typer.BadParameter(f"expected values joined by commas, got {value!r}")
    return words


def _ops(value: str) -> list[str]:
    return [_choice(PREFILL_OPS)(word) for word in _words(value)]


def _lengths(value: str) -> list[int]:
    words = _words(value)
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise typer.BadParameter(f"expected numbers of tokens joined by commas, got {value!r}")
    return [int(word) for word in words]


Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", parser=_device, metavar="DEVICE", help="cpu, cuda, ...  [default: cuda where there is one]"
    ),
]
Index = Annotated[int, typer.Option("--index", min=0, metavar="N", help="Which of the devices of that kind.")]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="PROFILE", help="A shipped one, or a .yaml file.  [default: NSA_PROFILE, the device's]"
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", parser=_choice(PRESETS), metavar="PRESET", help="safe or perf.  [default: NSA_PRESET, safe]"
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        parser=_choice(tuple(DTYPES)),
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)}.  [default: bfloat16, float32 on a CPU]",
    ),
]


def _size(name: str, help: str) -> Any:
    return typer.Option(name, min=1, metavar="N", help=help)


@app.command()
def probe(device: Device = None, index: Index = 0, as_json: Json = False) -> None:
    """What this machine is, and what is installed.

    Device, memory, versions, backends, the profile for it, and what could not be found out.
    """
    environment = probe_machine(device, index)
    backends = []
    # With two distributions of one name the environment lists none, and says why among the unknown.
    points = installed_backends() if environment.backends else {}
    for name, point in points.items():
        distribution, version = distribution_of(point)
        backends.append({"name": name, "object": point.value, "distribution": distribution, "version": version})
    if as_json:
        _print_json({"environment": _environment(environment), "backends": backends})
        return
    profile, note = profile_of(environment.device, environment.sm)
    pinned = f" (torch's metadata requires {environment.triton_pin})" if environment.triton_pin else ""
    _print_facts(
        {
            "device": environment.device if environment.device == "cpu" else f"{environment.device}:{index}",
            "name": environment.name,
            "SM": None if environment.sm is None else f"{environment.sm // 10}.{environment.sm % 10}",
            "memory": None if environment.memory is None else f"{environment.memory / GIB:.1f} GiB",
            "torch": environment.torch,
            "CUDA": environment.cuda,
            "cuDNN": None if environment.cudnn is None else cudnn_words(environment.cudnn),
            "driver": environment.driver,
            "triton": f"{environment.triton or 'not installed'}{pinned}",
            "flash-attn": environment.flash_attn or "not installed",
            "profile": f"{profile} ({note})" if note else profile,
            "unknown": "\n".join(environment.unknown) or "nothing",
        }
    )
    table = _table("backend", "distribution", "version", "object")
    for backend in backends:
        table.add_row(*(_cell(backend[key]) for key in ("name", "distribution", "version", "object")))
    _print(table if backends else "no backend is installed")


@app.command()
def check(profile: ProfileName = None, device: Device = None, index: Index = 0, as_json: Json = False) -> None:
    """What is wrong with this installation.

    Looks at flags, profile, torch and Triton, entry points, backends, plans for a typical layer, and pins. Exit status
    1 if anything fails.
    """
    environment = probe_machine(device, index)
    checks = list(run_checks(environment, typical(environment.device, index), profile))
    failed = [found.name for found in checks if found.status == "fail"]
    if as_json:
        _print_json({"ok": not failed, "checks": [asdict(found) for found in checks]})
    else:
        table = _table("check", "", "what was found")
        styles = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
        for found in checks:
            table.add_row(Text(found.name), Text(*styles[found.status]), Text(found.reason))
        _print(table)
        _print(f"{len(checks)} checks, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


@app.command()
def explain(
    op: Annotated[
        list[str] | None,
        typer.Option("--op", parser=_choice(OPS), metavar="OP", help="An operation; repeatable.  [default: all]"),
    ] = None,
    profile: ProfileName = None,
    preset: Preset = None,
    backend: Annotated[
        str | None,
        typer.Option("--backend", metavar="BACKEND", help="One to obey, or op=backend pairs.  [default: NSA_BACKEND]"),
    ] = None,
    device: Device = None,
    index: Index = 0,
    sm: Annotated[
        int | None,
        typer.Option("--sm", min=10, metavar="NN", help="Plan for a GPU that need not be here: 90 for an H100."),
    ] = None,
    dtype: DType = None,
    head_dim: Annotated[int, _size("--head-dim", "Dk.")] = 128,
    v_head_dim: Annotated[int | None, _size("--v-head-dim", "Dv.  [default: Dk]")] = None,
    group_size: Annotated[int, _size("--group-size", "Query heads per kv head.")] = 16,
    max_seqlen_q: Annotated[
        int | None, _size("--max-seqlen-q", "Queries of the longest sequence.  [default: its keys]")
    ] = None,
    max_seqlen_k: Annotated[int, _size("--max-seqlen-k", "Keys of the longest sequence.")] = 8192,
    total_q: Annotated[int | None, _size("--total-q", "Queries of all sequences.  [default: one sequence's]")] = None,
    ragged: Annotated[bool, typer.Option("--ragged", help="Sequences differ in length.")] = False,
    grad: Annotated[bool, typer.Option("--grad/--no-grad", help="Gradients are recorded.")] = False,
    paged: Annotated[bool, typer.Option("--paged", help="Keys and values lie in pages.")] = False,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic",
            help="Bitwise equal across runs.  [default: NSA_DETERMINISTIC]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Which backend runs each operation, and why the others do not.

    Flags of the environment count; options outrank them. With --sm the backends and versions are those installed here.
    """
    if sm is not None and device not in (None, "cuda"):
        raise typer.BadParameter(f"expected no --device but cuda with --sm, got {device!r}", param_hint="'--sm'")
    queries = max_seqlen_q or max_seqlen_k
    if total_q is not None and total_q < queries:
        message = f"expected at least {queries}, the longest sequence's, got {total_q}"
        raise typer.BadParameter(message, param_hint="'--total-q'")
    with _errors_on_one_line():
        policy = Policy.from_env()
    policy = replace(policy, preset=preset or policy.preset, profile=profile or policy.profile)
    if backend is not None:
        try:
            policy = replace(policy, backends=Policy.from_env({"NSA_BACKEND": backend}).backends)
        except ValueError as error:
            raise typer.BadParameter(str(error).removeprefix("NSA_BACKEND: "), param_hint="'--backend'") from None
    environment = probe_machine(device, index) if sm is None else _made_up(sm)
    with _errors_on_one_line():
        name, note = profile_of(environment.device, environment.sm, policy.profile)
        loaded = load_profile(name)
    workload = typical(environment.device, index)
    workload = replace(
        workload,
        dtype=workload.dtype if dtype is None else DTYPES[dtype],
        head_dim=head_dim,
        v_head_dim=v_head_dim or head_dim,
        group_size=group_size,
        max_seqlen_q=queries,
        max_seqlen_k=max_seqlen_k,
        total_q=total_q or queries,
        needs_grad=grad,
        paged=paged,
        ragged=ragged,
        deterministic=policy.deterministic if deterministic is None else deterministic,
    )
    plans = [plan(environment, loaded, workload.problem(one), policy) for one in op or OPS]
    if as_json:
        _print_json(
            {
                "environment": _environment(environment),
                "made_up": sm is not None,
                "profile": {"name": loaded.name, "source": loaded.source, "note": note},
                "preset": policy.preset,
                "plans": [_plan(made) for made in plans],
            }
        )
        return
    here = "" if sm is None else " (not this machine; backends and versions are those installed here)"
    sm_words = "" if environment.sm is None else f", SM {environment.sm // 10}.{environment.sm % 10}"
    _print_facts(
        {
            "device": f"{environment.name or environment.device}{sm_words}{here}",
            "profile": f"{loaded.name} ({note})" if note else loaded.name,
            "source": " ".join(loaded.source.split()),
            "preset": policy.preset,
            "problem": str(workload),
            **({"unknown": "\n".join(environment.unknown)} if environment.unknown else {}),
        }
    )
    _print(_plans_table(plans))


def _plans_table(plans: list[Plan]) -> Table:
    table = _table("operation", "backend", "why not the others")
    for made in plans:
        others = _table("", "")
        others.show_header = False
        for candidate in made.candidates:
            if candidate.backend != made.backend:
                later = "accepted, but later in the order"
                reason = later
                if isinstance(candidate, Rejected):
                    reason = f"stops here: {candidate.reason}" if candidate.fatal else candidate.reason
                others.add_row(Text(candidate.backend), Text(reason))
        chosen = Text(made.backend, "bold green") if made.backend else Text("none", "bold red")
        table.add_row(Text(made.problem.op), chosen, others)
    return table


@app.command()
def pins(
    profile: ProfileName = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", dir_okay=False, metavar="FILE", help="A file to write.  [default: standard output]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """A profile's pins, for `pip install -c`."""
    with _errors_on_one_line():
        name = profile or Policy.from_env().profile
        if name is None:
            environment = probe_machine()
            name, _ = profile_of(environment.device, environment.sm)
        loaded = load_profile(name)
        text = constraints(loaded)
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            message = f"expected a file that can be written, got {error}"
            raise typer.BadParameter(message, param_hint="'--out'") from None
    if as_json:
        _print_json({"profile": loaded.name, "source": loaded.source, "pins": dict(loaded.pins)})
    elif out is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(f"wrote {out}")


@app.command()
def tune(
    out: Annotated[
        Path,
        typer.Option(
            "--out", dir_okay=False, metavar="FILE", help="The profile to write, a .yaml file; a .csv goes beside it."
        ),
    ],
    ops: Annotated[
        Any,
        typer.Option("--ops", parser=_ops, metavar="OP,...", help="Of those that prefill.  [default: all]"),
    ] = None,
    backends: Annotated[
        Any, typer.Option("--backends", parser=_words, metavar="NAME,...", help="Backends.  [default: all installed]")
    ] = None,
    lengths: Annotated[
        Any, typer.Option("--lengths", parser=_lengths, metavar="N,...", help="Tokens of the sequence.")
    ] = DEFAULT_LENGTHS,
    num_heads: Annotated[int, _size("--num-heads", "Query heads.")] = 64,
    num_kv_heads: Annotated[int, _size("--num-kv-heads", "Key and value heads.")] = 4,
    head_dim: Annotated[int, _size("--head-dim", "Dk.")] = 128,
    v_head_dim: Annotated[int | None, _size("--v-head-dim", "Dv.  [default: Dk]")] = None,
    dtype: DType = None,
    grad: Annotated[bool, typer.Option("--grad/--no-grad", help="Time the operation with its gradients.")] = False,
    repeat: Annotated[
        int, typer.Option("--repeat", min=LEAST_REPEATS, metavar="N", help="Timed calls for each case.")
    ] = 20,
    speedup: Annotated[
        float,
        typer.Option("--speedup", min=1.0, metavar="X", help="Times as fast as sdpa that a backend must be to pay."),
    ] = SPEEDUP,
    preset: Annotated[
        str | None,
        typer.Option("--preset", parser=_choice(PRESETS), metavar="PRESET", help="Enter what pays in this preset too."),
    ] = None,
    device: Device = None,
    index: Index = 0,
    as_json: Json = False,
) -> None:
    """Measure when backends beat sdpa; write a profile.

    A case is one sequence, prefilled whole. A backend gets a threshold for an operation at the smallest tested length
    from which it wins: there and at every longer one it is --speedup times as fast as sdpa, by medians, and its third
    quartile lies below the first quartile of sdpa. Its results must agree with those of sdpa. The profile extends the
    device's shipped one.
    """
    if out.suffix != ".yaml" or not out.parent.is_dir():
        message = f"expected a path in an existing folder that ends in .yaml, got {str(out)!r}"
        raise typer.BadParameter(message, param_hint="'--out'")
    if num_heads % num_kv_heads:
        message = f"expected a multiple of --num-kv-heads={num_kv_heads}, got {num_heads}"
        raise typer.BadParameter(message, param_hint="'--num-heads'")
    installed = probe_machine(device, index).backends
    for name in backends or ():
        if name not in installed:
            message = f"expected some of {', '.join(installed) or 'none'}, got {name!r}"
            raise typer.BadParameter(message, param_hint="'--backends'")
    with _errors_on_one_line():
        tuned = tune_profile(
            out,
            ops=ops or PREFILL_OPS,
            backends=backends,
            lengths=lengths,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            dtype=None if dtype is None else DTYPES[dtype],
            grad=grad,
            repeat=repeat,
            speedup=speedup,
            preset=preset,
            device=device,
            index=index,
            tell=lambda line: typer.echo(line, err=True),
        )
    if as_json:
        _print_json(
            {
                "profile": str(tuned.profile),
                "csv": str(tuned.csv),
                "extends": tuned.extends,
                "note": tuned.note,
                "findings": [asdict(found) for found in tuned.findings],
                "measurements": [
                    {"op": row.op, "backend": row.backend, "length": row.length, "grad": row.grad, **asdict(row.timing)}
                    for row in tuned.rows
                ],
            }
        )
        return
    table = _table("operation", "backend", "finding")
    for found in tuned.findings:
        table.add_row(*map(Text, (found.op, found.backend, found.words)))
    _print(table)
    note = f" ({tuned.note})" if tuned.note else ""
    _print(f"wrote {tuned.profile}, which extends {tuned.extends}{note}, and {tuned.csv}")
    _print(f"to plan by it: NSA_PROFILE={tuned.profile}")


def _made_up(sm: int) -> Environment:
    """A GPU that is not here, with what is installed here."""
    here, cudnn = probe_machine("cpu"), probe_machine("cuda").cudnn  # which is torch's own, GPU or not
    return replace(here, device="cuda", sm=sm, name="a GPU", memory=None, cudnn=cudnn)


def _environment(environment: Environment) -> dict[str, Any]:
    memory = environment.memory
    return asdict(environment) | {"memory_gib": None if memory is None else round(memory / GIB, 1)}


def _plan(made: Plan) -> dict[str, Any]:
    problem = asdict(made.problem) | {"dtype": str(made.problem.dtype).removeprefix("torch.")}
    candidates = [
        {
            "backend": candidate.backend,
            "verdict": verdict(made, candidate).partition(":")[0],
            "reason": candidate.reason if isinstance(candidate, Rejected) else None,
        }
        for candidate in made.candidates
    ]
    return {
        "op": made.problem.op,
        "backend": made.backend,
        "requested": made.requested,
        "problem": problem,
        "candidates": candidates,
    }


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2))


def _print(what: Table | str) -> None:
    console = Console(highlight=False, markup=False)
    with console.capture() as captured:
        console.print(what, soft_wrap=isinstance(what, str))
    for line in captured.get().splitlines():
        print(line.rstrip())  # cells are padded to their width


def _cell(value: str | None) -> Text:
    return Text(value or "-")


def _table(*columns: str) -> Table:
    """Columns of words: the last is wrapped, at blanks; nothing is cut off."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def _print_facts(facts: dict[str, str | None]) -> None:
    table = _table("", "")
    table.show_header = False
    for name, value in facts.items():
        table.add_row(Text(name, "bold"), _cell(value))
    _print(table)
    _print("")
