"""Ctrl-C and SIGTERM during a run: asked once, it ends after the step it is in; Ctrl-C again ends
it at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """`with StopRequest() as stop: ... if stop.signal: ...`"""

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
