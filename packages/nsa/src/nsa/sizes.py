"""Sizes as people pass them."""


def check_size(name: str, value: object, least: int = 1) -> None:
    """Raise TypeError unless `value` is an int (no bool), ValueError if it is below `least`."""
    if type(value) is not int:
        raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
