"""Ctrl-C and SIGTERM during a run: the first lets it finish the current step and write a
checkpoint; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """A context that catches SIGINT and SIGTERM: `signal` is the number of the last, or None."""

    signal: int | None = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> StopRequest:
        self.before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
