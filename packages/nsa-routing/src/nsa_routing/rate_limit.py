"""How often something that comes up again and again is shown: by times, by seconds, or by both."""

import math
import time
from collections.abc import Callable


class RateLimit:
    """Yes the first time; then once another multiple of `every` times was reached, and `seconds` have passed.

    Either alone may be asked for: 0 leaves it out. With neither, the first time is the only one.

    ```
    every=3              yes no yes no no yes          the times 1, 3, 6, ...
    seconds=10           yes, and whenever 10 s have passed since the last yes
    every=3, seconds=10  yes, and whenever both hold since the last yes
    ```

    Args:
        every: times, at least 0.
        seconds: at least 0.
        clock: seconds from any start, never going back.

    Fields:
        times: how often it was asked.

    Raises:
        TypeError, ValueError: as of `check_rate`.

    Example:
        >>> limit = RateLimit(every=3)
        >>> [limit.due() for _ in range(6)]
        [True, False, True, False, False, True]
    """

    __slots__ = ("_clock", "_shown", "_since", "every", "seconds", "times")

    def __init__(self, every: int = 0, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        check_rate("every", every, "seconds", seconds)
        self.every, self.seconds, self.times = every, seconds, 0
        self._clock = clock
        self._shown = 0  # the number of the last time that was a yes
        self._since = 0.0  # when that was

    def due(self) -> bool:
        """Count one more time: is it to be shown?"""
        self.times += 1
        if self._shown:
            if not self.every and not self.seconds:
                return False
            if self.every and self.times // self.every == self._shown // self.every:
                return False
            if self.seconds and self._clock() - self._since < self.seconds:
                return False
        self._shown = self.times
        if self.seconds:
            self._since = self._clock()
        return True


def check_rate(every_name: str, every: object, seconds_name: str, seconds: object) -> None:
    """Raise TypeError or ValueError, under these names, unless they are a number of times and one of seconds.

    Example:
        >>> check_rate("every", -1, "seconds", 0.0)
        Traceback (most recent call last):
        ValueError: every: expected at least 0, got -1
    """
    if type(every) is not int:
        raise TypeError(f"{every_name}: expected an int, got {every!r} of type {type(every).__name__}")
    if every < 0:
        raise ValueError(f"{every_name}: expected at least 0, got {every}")
    if type(seconds) not in (int, float):
        raise TypeError(f"{seconds_name}: expected a number, got {seconds!r} of type {type(seconds).__name__}")
    if not 0 <= seconds < math.inf:  # type: ignore[operator]
        raise ValueError(f"{seconds_name}: expected a finite number of at least 0, got {seconds}")
