"""What this package tells the operator: the logger `nsa_routing`, and messages that do not repeat themselves."""

import logging
import threading
from collections import Counter
from dataclasses import dataclass

from nsa_routing.policy import Policy

LOGGER = logging.getLogger("nsa_routing")


@dataclass
class _Settings:
    every: int = 0
    handler: logging.Handler | None = None
    level: int = logging.NOTSET  # this and the next: what the program had set before the handler came
    propagate: bool = True


_settings = _Settings()
_told: Counter[tuple[str, ...]] = Counter()
_lock = threading.Lock()


def configure(policy: Policy) -> None:
    """Apply `NSA_LOG` and `NSA_LOG_EVERY`. Without `NSA_LOG` the program's own logging set-up is left alone."""
    with _lock:
        _configure(policy)


def _configure(policy: Policy) -> None:
    _settings.every = policy.log_every
    if _settings.handler is not None:
        LOGGER.removeHandler(_settings.handler)
        LOGGER.setLevel(_settings.level)
        LOGGER.propagate = _settings.propagate
        _settings.handler = None
    if policy.log is not None:
        _settings.level, _settings.propagate = LOGGER.level, LOGGER.propagate
        off = policy.log == "off"
        _settings.handler = logging.NullHandler() if off else logging.StreamHandler()
        _settings.handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        LOGGER.addHandler(_settings.handler)
        LOGGER.setLevel(logging.CRITICAL + 1 if off else policy.log.upper())
        LOGGER.propagate = False


def tell(level: int, message: str, *key: str, traceback: bool = False) -> None:
    """Log `message` the first time `key` comes up, and then each `NSA_LOG_EVERY`-th time (0: never again).

    `traceback` adds that of the exception being handled.
    """
    with _lock:
        _told[key] += 1
        times = _told[key]
    if times == 1 or (_settings.every and times % _settings.every == 0):
        LOGGER.log(level, message if times == 1 else f"{message} ({times} times so far)", exc_info=traceback)


def forget() -> None:
    """Every message counts as new again, and logging is as the program had it."""
    _told.clear()
    configure(Policy())
