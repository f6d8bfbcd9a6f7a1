"""Seconds by stage: what an evaluation spends its time on."""

import contextlib
import time
from collections.abc import Callable, Iterator

STAGES = ("reading", "inference", "metrics", "writing", "report")


class Clock:
    """Adds up what stages take.

    Attributes:
        seconds: stage -> seconds, of those that there were.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the body as a part of a stage, one of STAGES; also where it fails."""
        assert name in STAGES, name
        began = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - began
