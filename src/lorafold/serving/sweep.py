"""Verifies the directory's adapters while the server serves, and looks for new ones.

A request under an adapter that has not come to its turn yet verifies that one first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from lorafold.errors import Busy
from lorafold.machine.cores import alone

log = logging.getLogger(__name__)
SIDE_BY_SIDE = 2
LOOK, SAVE = 1.0, 5.0  # seconds between two looks at the directory, and two writes


class Sweep:
    """The threads that do it.

    Args:
        names: gives the names that there are to verify.
    """

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        verify: Callable[[str], object],
        save: Callable[[], None],
    ) -> None:
        self._names, self._verify, self._save = names, verify, save
        self._left: deque[str] = deque()
        self._busy = 0
        self._changed, self._closing = threading.Condition(), threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Begin with what there is now."""
        self._left.extend(sorted(self._names()))
        for at in range(SIDE_BY_SIDE):
            thread = threading.Thread(
                None, self._run, f"lorafold-verifying-{at}", (at == 0,), daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def settled(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to verify; False if that takes longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._left or self._busy), timeout)

    def end(self) -> None:
        """Begin with no other one."""
        self._closing.set()

    def close(self) -> None:
        """End the threads, after what they do now."""
        self.end()
        for thread in self._threads:
            thread.join()

    def _run(self, watching: bool) -> None:
        alone()
        self._sweep()
        saved = time.monotonic()
        while watching and not self._closing.wait(LOOK):
            try:
                new = sorted(self._names())
            except Exception:
                log.exception("the directory can't be read")
                continue
            with self._changed:
                self._left.extend(new)
            self._sweep()
            if time.monotonic() - saved > SAVE:
                saved = time.monotonic()
                self._kept()

    def _kept(self) -> None:
        try:
            self._save()
        except Exception:
            log.exception("what was verified can't be kept")

    def _sweep(self) -> None:
        begun, n = time.monotonic(), 0
        while not self._closing.is_set():
            with self._changed:
                if not self._left:
                    break
                name = self._left.popleft()
                self._busy += 1
            try:
                self._verify(name)
                n += 1
            except Busy as error:
                log.warning("%s", error)
            except Exception:
                log.exception("%s can't be verified", name)
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()
        if n:
            self._kept()
            log.info("%d adapters looked at in %.1f s", n, time.monotonic() - begun)
