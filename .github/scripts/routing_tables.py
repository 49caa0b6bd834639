"""Writes the tables of PAGES from the code, the profiles and the results; `--check` only says if they differ."""

import csv
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from nsa_kernels_triton import configurations
from nsa_routing import FLAGS, OPS, Environment, Policy, Problem, Profile, load_profile, plan
from nsa_routing.compatibility import TRITON_OF_TORCH
from nsa_routing.policy import PRESETS
from nsa_routing.profile import LAST_RESORT, SHIPPED, Threshold, profile_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GPUS = {  # by SM, as people call them
    75: "T4, RTX 20",
    80: "A100",
    86: "A40, RTX 30",
    87: "Orin",
    89: "RTX 4090, L4, L40S",
    90: "H100, H200",
    100: "B200",
    103: "B300",
    120: "RTX 50",
}
# A machine with everything installed, in the versions that were measured with.
GPU = Environment(
    "cuda", None, "2.11.0+cu130", "3.6.0", "2.8.3.post2", ("cudnn", "fa2", "fa2-torch", "sdpa", "triton"), cudnn=91900
)
CPU = replace(GPU, device="cpu", torch="2.11.0+cpu", flash_attn=None, cudnn=None)
LONG, SHORT = 65_536, 4096


def table(*rows: tuple[str, ...]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flags() -> str:
    """Every environment variable."""
    rows = ((f"`{name}`", flag.values, flag.default or "-", flag.meaning) for name, flag in FLAGS.items())
    return table(("variable", "values", "default", "meaning"), *rows)


def shipped() -> list[Profile]:
    """The shipped profiles: base, cpu, then the devices by SM."""
    names = sorted((file.stem for file in SHIPPED.glob("*.yaml")), key=lambda name: (len(name), name))
    return [load_profile(name) for name in sorted(names, key=lambda name: (name.startswith("sm"), len(name), name))]


def presets() -> str:
    """How each preset takes each backend on each device."""
    rows = []
    for profile in shipped():
        by_preset = (profile.presets.get(preset, {}) for preset in PRESETS)
        taken = (", ".join(f"{name}: {mode}" for name, mode in modes.items()) for modes in by_preset)
        rows.append((profile.name, *(f"{backends or 'nothing'}; then {LAST_RESORT}" for backends in taken)))
    return table(("profile", *(f"`NSA_PRESET={preset}`" for preset in PRESETS)), *rows)


def order() -> str:
    """Which backends are tried for each operation; profiles with an order of their own have a row of their own."""
    rows = []
    for op in OPS:
        profiles: dict[tuple[str, ...], list[str]] = {}
        for profile in shipped():
            profiles.setdefault(tuple(profile.order[op]), []).append(profile.name)
        rows += [
            (op, "all" if len(profiles) == 1 else "others" if "base" in names else ", ".join(names), ", ".join(order))
            for order, names in profiles.items()
        ]
    return table(("operation", "profile", "tried in this order"), *rows)


def denials() -> str:
    """What must not run where."""
    rows = [
        (profile.name, op, name, f"[ADR {denial.adr}](adr/{adr_page(denial.adr)})", denial.lifted_by or "nothing")
        for profile in shipped()
        for op, denied in profile.denials.items()
        for name, denial in denied.items()
    ]
    return table(("profile", "operation", "backend", "by", "lifted by"), *rows)


def adr_page(number: str) -> str:
    """File name of a decision record."""
    (page,) = (DOCS / "adr").glob(f"{number}-*.md")
    return page.name


def thresholds() -> str:
    """Since when a backend pays, and how that is known."""
    return table(("profile", "operation", "backend", "pays for", "known by"), *bounded("thresholds"))


def prefer() -> str:
    """Where a backend is tried before the others."""
    return table(("profile", "operation", "backend", "goes first for", "known by"), *bounded("prefer"))


def bounded(field: str) -> list[tuple[str, ...]]:
    """What the profiles say by operation and backend in this field."""
    return [
        (profile.name, op, name, bounds(threshold), source(threshold))
        for profile in shipped()
        for op, known in getattr(profile, field).items()
        for name, threshold in known.items()
    ]


def bounds(threshold: Threshold) -> str:
    """The bounds in words."""
    words = [f"{name} >= {bound}" for name, bound in threshold.at_least if bound is not None]
    words += [f"{name} <= {bound}" for name, bound in threshold.at_most if bound is not None]
    return ", ".join(words) or "any length"


def source(threshold: Threshold) -> str:
    """Where the bounds come from."""
    if threshold.measured is None:
        return f"not measured: {threshold.not_measured}"
    known = threshold.measured
    return ", ".join(filter(None, (str(known.date), known.gpu, known.versions, known.csv)))


def versions() -> str:
    """Which Triton belongs to which torch."""
    return table(("torch", "triton"), *TRITON_OF_TORCH.items())


def devices() -> str:
    """Which profile and which launch configurations a GPU gets."""
    rows = []
    for sm, names in GPUS.items():
        profile, note = profile_of("cuda", sm)
        how = f"`{profile}`" + ("" if note is None else ", the nearest lower one" if profile != "base" else "")
        families = [of for least, of in configurations.FAMILIES.items() if least <= sm]
        launch = f"`{families[-1]}.toml`" if families else "none: the kernels want SM 8.0"
        rows.append((names, f"{sm // 10}.{sm % 10}", how, launch))
    return table(("GPU", "SM", "profile", "launch configurations of Triton's kernels"), *rows)


def runs() -> str:
    """Which backend runs each operation, safe / perf, by profile: a whole prefill, and a decode step."""
    columns = [profile for profile in shipped() if profile.name != "base"]
    rows = []
    for op in OPS:
        long, short = ([cell(profile, op, length) for profile in columns] for length in (LONG, SHORT))
        if long == short:
            rows.append((op, *long))
        else:
            rows += [(f"{op}, {length:,} tokens", *cells) for length, cells in ((LONG, long), (SHORT, short))]
    return table(("operation", *(f"{profile.name}" for profile in columns)), *rows)


def cell(profile: Profile, op: str, length: int) -> str:
    """The backend of one operation with each preset, once where it is the same."""
    made_for = profile.name.removeprefix("sm")
    machine = CPU if profile.name == "cpu" else replace(GPU, sm=int(made_for))
    decoding = op == "decode_attention"
    problem = Problem(
        op,
        machine.device,
        torch.bfloat16 if machine is not CPU else torch.float32,
        head_dim=128,
        v_head_dim=128,
        group_size=16,
        paged=decoding,
        uniform=not decoding,
        total_q=8 if decoding else length,
        max_seqlen_q=1 if decoding else length,
        max_seqlen_k=length,
    )
    names = [str(plan(machine, profile, problem, Policy(preset=preset)).backend) for preset in PRESETS]
    return " / ".join(dict.fromkeys(names))


def known() -> str:
    """How much of a profile was measured, and what it pins."""
    head = ("profile", "bounds of lengths, measured", "denials", "launch rules, measured", "pins")
    rows = []
    for profile in shipped():
        fields = (profile.thresholds, profile.prefer)
        bounds = [threshold for field in fields for of in field.values() for threshold in of.values()]
        measured = sum(threshold.measured is not None for threshold in bounds)
        denied = sum(len(denials) for denials in profile.denials.values())
        pins = ", ".join(f"`{name}{specifier}`" for name, specifier in sorted(profile.pins.items()))
        share = f"{measured} of {len(bounds)}" if bounds else "none"
        rows.append((profile.name, share, str(denied or "none"), launched(profile), pins or "none"))
    return table(head, *rows)


def launched(profile: Profile) -> str:
    """How many of the rules of the launch configurations of that name carry a measurement."""
    if not profile.name.startswith("sm"):
        return "none"
    rules = [rule for of in configurations.table(profile.name).values() for rule in of]
    return f"{sum('measured' in rule for rule in rules)} of {len(rules)}"


def results() -> str:
    """The machines of all committed measurements."""
    files: dict[str, list[str]] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*.csv")):
        files.setdefault(machine(path), []).append(f"[{path.stem}](../bench/results/{path.name})")
    return table(("machine", "measurements"), *((name, ", ".join(found)) for name, found in sorted(files.items())))


def machine(path: Path) -> str:
    """What a file of measurements ran on: a column says so, or the comment at its head."""
    first, *_ = lines = path.read_text(encoding="utf-8").splitlines()
    if first.startswith("#"):
        return first.lstrip("# ").partition(",")[0]
    names = {re.sub(r", \d+ threads$", "", row["device"]) for row in csv.DictReader(lines)}
    (name,) = names
    return name


PAGES: dict[str, tuple[Callable[[], str], ...]] = {
    "execution-routing.md": (flags, order, presets, denials, thresholds, prefer, versions),
    "device-guide.md": (devices, runs, known, results),
}


def filled(name: str, page: str) -> str:
    """The page with each `<!-- table: name -->` ... `<!-- end -->` written anew."""
    for make in PAGES[name]:
        before, start, rest = page.partition(f"<!-- table: {make.__name__} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not start or not end:
            raise SystemExit(f"{name}: expected <!-- table: {make.__name__} --> and <!-- end -->")
        page = f"{before}{start}{make()}\n{end}{after}"
    return page


def main(arguments: list[str]) -> None:
    """Write the pages, or with --check compare."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(f"usage: {Path(__file__).name} [--check]")
    for name in PAGES:
        path = DOCS / name
        page = path.read_text(encoding="utf-8")
        new = filled(name, page)
        if arguments and new != page:
            raise SystemExit(f"{path}: tables differ from the code; `hatch run tables` writes them")
        if not arguments:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
