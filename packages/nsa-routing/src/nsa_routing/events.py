"""What this package tells the operator: the logger `nsa_routing`, and messages that do not repeat themselves."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nsa_routing.policy import Policy
from nsa_routing.rate_limit import RateLimit

LOGGER = logging.getLogger("nsa_routing")
SHOWN = (LOGGER, logging.getLogger("nsa"))  # what NSA_LOG shows: this package, and the layers that it routes for


@dataclass
class _Settings:
    every: int = 0
    seconds: float = 0.0
    clock: Callable[[], float] = time.monotonic
    handler: logging.Handler | None = None
    before: dict[str, tuple[int, bool]] = field(default_factory=dict)  # level and propagate as the program had them


_settings = _Settings()
_told: dict[tuple[str, ...], RateLimit] = {}
_lock = threading.Lock()


def configure(policy: Policy) -> None:
    """Apply `NSA_LOG` and `NSA_LOG_EVERY`. Without `NSA_LOG` the program's own logging set-up is left alone."""
    with _lock:
        _configure(policy)


def _configure(policy: Policy) -> None:
    _settings.every, _settings.seconds = policy.log_every, policy.log_seconds
    for limit in _told.values():
        limit.every, limit.seconds = policy.log_every, policy.log_seconds
    if _settings.handler is not None:
        for logger in SHOWN:
            logger.removeHandler(_settings.handler)
            level, logger.propagate = _settings.before[logger.name]
            logger.setLevel(level)
        _settings.handler = None
    if policy.log is not None:
        off = policy.log == "off"
        _settings.handler = logging.NullHandler() if off else logging.StreamHandler()
        _settings.handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        for logger in SHOWN:
            _settings.before[logger.name] = logger.level, logger.propagate
            logger.addHandler(_settings.handler)
            logger.setLevel(logging.CRITICAL + 1 if off else policy.log.upper())
            logger.propagate = False


def tell(level: int, message: str, *key: str, traceback: bool = False) -> None:
    """Log `message` the first time `key` comes up, and then as `NSA_LOG_EVERY` says (0: never again).

    `traceback` adds that of the exception being handled.
    """
    with _lock:
        if key not in _told:
            _told[key] = RateLimit(_settings.every, _settings.seconds, _settings.clock)
        due, times = _told[key].due(), _told[key].times
    if due:
        LOGGER.log(level, message if times == 1 else f"{message} ({times} times so far)", exc_info=traceback)


def forget() -> None:
    """Every message counts as new again, and logging is as the program had it."""
    _told.clear()
    configure(Policy())
