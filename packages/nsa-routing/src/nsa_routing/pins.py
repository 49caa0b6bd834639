"""A profile's pins as a constraints file: `pip install -c FILE` keeps packages to the versions meant for a device."""

from nsa_routing.profile import Profile


def constraints(profile: Profile) -> str:
    """The file's text: one line per distribution, ordered by name, under a comment that says where they come from.

    A profile without pins gives comments alone, which pip accepts too.

    Example:
        >>> from nsa_routing import load_profile
        >>> print(constraints(load_profile("cpu")), end="")
        # profile cpu: sdpa is the only backend that runs on a CPU.
        # It pins no packages.
    """
    lines = [f"# profile {profile.name}: {' '.join(profile.source.split())}"]
    if not profile.pins:
        lines.append("# It pins no packages.")
    for name, specifier in sorted(profile.pins.items()):
        lines.append(f"{name}{specifier}")
    return "\n".join(lines) + "\n"
