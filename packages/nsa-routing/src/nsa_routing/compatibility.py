"""Which Triton belongs to which torch. A wrong pair miscompiles or crashes late; here it is named before that."""

from packaging.version import InvalidVersion, Version

# Minor versions, from the requirements that each torch release publishes.
TRITON_OF_TORCH = {
    "2.2": "2.2",
    "2.3": "2.3",
    "2.4": "3.0",
    "2.5": "3.1",
    "2.6": "3.2",
    "2.7": "3.3",
    "2.8": "3.4",
    "2.9": "3.5",
    "2.10": "3.6",
    "2.11": "3.6",
    "2.12": "3.7",
    "2.13": "3.7",
    "2.14": "3.8",
    "2.15": "3.9",
}


def minor(version: str) -> str:
    """Major and minor number.

    Example:
        >>> minor("2.11.0+cu130")
        '2.11'
    """
    parsed = Version(version)
    return f"{parsed.major}.{parsed.minor}"


def wrong_triton(torch: str, triton: str | None, pinned: str | None = None) -> str | None:
    """Why this Triton does not belong to this torch, naming both and the right one; None if it does.

    Args:
        torch, triton: installed versions; without Triton there is nothing wrong.
        pinned: the version that torch's own metadata requires, where it does (builds for a CPU require none). It
            outranks the table. A torch newer than the table and without a pin is held to Triton 3.

    Example:
        >>> wrong_triton("2.11.0+cu130", "3.6.0") is None
        True
        >>> wrong_triton("2.11.0+cu130", "3.7.1")
        'torch 2.11.0+cu130 needs triton 3.6, got triton 3.7.1'
    """
    if triton is None:
        return None
    for version in (torch, triton, pinned or triton):
        try:
            Version(version)
        except InvalidVersion:
            return f"torch {torch} and triton {triton} cannot be compared: {version!r} is no version"
    right = minor(pinned) if pinned else TRITON_OF_TORCH.get(minor(torch))
    fits = minor(triton) == right if right else minor(triton).startswith("3.")
    return None if fits else f"torch {torch} needs triton {right or '3'}, got triton {triton}"
