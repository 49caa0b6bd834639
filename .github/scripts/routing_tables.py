"""Writes the tables of docs/execution-routing.md from the code and the profiles; `--check` only says if they differ."""

import sys
from pathlib import Path

from nsa_routing import FLAGS, OPS, Profile, load_profile
from nsa_routing.compatibility import TRITON_OF_TORCH
from nsa_routing.policy import PRESETS
from nsa_routing.profile import LAST_RESORT, SHIPPED, Threshold

PAGE = Path(__file__).parents[2] / "docs" / "execution-routing.md"


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
    (page,) = (PAGE.parent / "adr").glob(f"{number}-*.md")
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


def filled(page: str) -> str:
    """The page with each `<!-- table: name -->` ... `<!-- end -->` written anew."""
    for make in (flags, order, presets, denials, thresholds, prefer, versions):
        before, start, rest = page.partition(f"<!-- table: {make.__name__} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not start or not end:
            raise SystemExit(f"{PAGE.name}: expected <!-- table: {make.__name__} --> and <!-- end -->")
        page = f"{before}{start}{make()}\n{end}{after}"
    return page


def main(arguments: list[str]) -> None:
    """Write the page, or with --check compare."""
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if arguments == ["--check"]:
        if new != page:
            raise SystemExit(f"{PAGE}: tables differ from the code; `hatch run tables` writes them")
    elif arguments:
        raise SystemExit(f"usage: {Path(__file__).name} [--check]")
    else:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
