"""A reward that is computed in a process of its own, which is killed where it takes too long.

The process is started when the reward is made, which shows whether it can judge at all, and again
after it was killed. It lives for many calls.
"""

from __future__ import annotations

import json
import pickle
import signal
import time
from collections.abc import Sequence
from typing import Any

from lorafold.machine.killable import Died, Killable, Late, packed
from lorafold.rewards.judged import Judged, failure

LIMIT = 30.0  # seconds of a call
OPENING = 120.0  # seconds in which what judges must be there, with all that it imports
# a set's order is the same in each run, so that a run which goes on gives the same rewards
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}


class SeparateReward:
    """A reward in a process of its own. One thread at a time may call it.

    Args:
        kind: of `kinds.KINDS`.
        text: what of that kind.
        limit: the seconds that a call may take; it may be set later.
    """

    def __init__(
        self, name: str, kind: str, text: str, weight: float = 1.0, limit: float = LIMIT
    ) -> None:
        self.name, self.weight, self.limit = name, weight, limit
        self._opening = json.dumps({"kind": kind, "text": text}).encode()
        self._process = self._started()

    def __call__(self, judged: Sequence[Judged]) -> list[float | None]:
        """A finite number for each, or None. Raises LorafoldError."""
        if not judged:
            return []
        message = packed(pickle.dumps([self._sent(one) for one in judged]))
        if not self._process.lives:
            self.close()
            self._process = self._started()
        process, found = self._process, list[float | None]()
        until = time.monotonic() + self.limit
        try:
            process.write(message, until)
            while len(found) < len(judged):
                answer = json.loads(process.read(until))
                if isinstance(answer, dict):
                    at = answer["at"]
                    about = judged if at is None else judged[at : at + 1]
                    raise failure(self.name, answer["wrong"], about)
                found += answer
        except Late:
            self.close()
            done = "" if self._batched else f"{len(found)} done of "
            told = f"it took more than {self.limit:g} s ({done}{len(judged)} completions)"
            told += "; expected less, or a longer limit"
            raise failure(self.name, told, self._at_work(judged, found)) from None
        except Died as error:
            self.close()
            raise failure(self.name, _end(error.code), self._at_work(judged, found)) from None
        except KeyboardInterrupt:
            self.close()
            raise
        return found

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._process.kill()

    def _started(self) -> Killable:
        process = Killable("lorafold.rewards.worker", ENVIRONMENT)
        until = time.monotonic() + OPENING
        try:
            process.write(packed(self._opening), until)
            answer = json.loads(process.read(until))
        except Late:
            process.kill()
            told = f"it was not loaded within {OPENING:g} s"
            raise failure(self.name, told) from None
        except Died as error:
            process.kill()
            raise failure(self.name, f"while it was loaded {_end(error.code)}") from None
        except KeyboardInterrupt:
            process.kill()
            raise
        if "wrong" in answer:
            process.kill()
            raise failure(self.name, answer["wrong"])
        self._batched: bool = answer["batched"]
        return process

    def _sent(self, one: Judged) -> bytes:
        try:
            return pickle.dumps((one.prompt, one.completion, dict(one.row)))
        except Exception as error:  # whatever a field's own way of being pickled raises
            told = f"its row can't be sent to another process: {error}"
            raise failure(self.name, told, [one]) from None

    def _at_work(self, judged: Sequence[Judged], found: Sequence[Any]) -> Sequence[Judged]:
        """What was judged when the process ended."""
        return judged if self._batched else judged[len(found) : len(found) + 1]


def _end(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    known = {int(number): number.name for number in signal.Signals}
    memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return f"its process was killed by {known.get(-code, f'signal {-code}')}{memory}"
