"""One step of the engine, and what becomes of requests that fail in it.

What fails fails alone: a pass that raises is halved until the requests are found that it raises
for. Nothing that the others have is lost by it, since a row counts its tokens as computed only once
their pass is over, and what it wrote before is written again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from torch import Tensor

from lorafold.engine.choosing import chosen
from lorafold.engine.request import Reason
from lorafold.engine.residency import Residency
from lorafold.engine.row import Row
from lorafold.engine.runner import Runner
from lorafold.engine.sampler import Choice, NotFinite, Unfit
from lorafold.engine.scheduler import Batch, Scheduler
from lorafold.errors import STOPS, LorafoldError, place
from lorafold.ops.host import picked


class Loop:
    """The rows of an engine, and the passes that compute them.

    Args:
        gone: called with each row once nothing is held for it, before its last event.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, adapters: Residency, gone: Callable[[Row], None]
    ) -> None:
        self.runner, self.scheduler, self.adapters, self._gone = runner, scheduler, adapters, gone

    def step(self, cancelled: Sequence[Row]) -> bool:
        """End the cancelled rows, admit others, decode, and read prompts; False if there was
        nothing to do.
        """
        for row in cancelled:
            self.end(row, "cancelled")
        for row in self.scheduler.admitted(self._ready):
            row.stream.began = time.monotonic()
            self.scheduler.join(row)
            self._guarded(row, partial(self.runner.admit, row))
        self.runner.compact()
        decoding = self.scheduler.decoding()
        for batch in decoding:
            self._pass(batch)
        reading = self.scheduler.reading()
        for batch in reading:
            self._pass(batch)
        return bool(cancelled or decoding or reading)

    def fail(self, row: Row, error: BaseException) -> None:
        """End a request that an error was raised for."""
        ours = isinstance(error, LorafoldError)
        message = str(error) if ours else f"{type(error).__name__}: {error}"
        setting = error.setting if isinstance(error, Unfit) else ""
        fault = f"its {setting} admits no more" if setting else message if ours else place(error)
        self.end(row, "failed", message, fault, setting)

    def end(
        self, row: Row, reason: Reason, message: str = "", fault: str = "", setting: str = ""
    ) -> None:
        """Free what a request holds, and put its last event.

        Args:
            fault: the same in words that have nothing of the request's texts.
            setting: the setting that it follows from.
        """
        if row in self.scheduler.running:
            self.scheduler.leave(row)
            self.runner.release(row, well=reason in ("end", "length", "stop"))
        elif row in self.scheduler.waiting:
            self.scheduler.waiting.remove(row)
        if row.entry is not None:
            if row.held is not None:
                self.adapters.release(row.entry)
            self.adapters.unbind(row.entry)
        self._gone(row)
        row.end(reason, message, fault, setting)

    def check(self, rows: Mapping[str, Row], inbox: Collection[Row]) -> None:
        """Raise AssertionError if what is held is not what these requests need.

        Args:
            inbox: those of them that no step has seen.
        """
        running, waiting = self.scheduler.running, self.scheduler.waiting
        ids = [row.request.id for row in (*running, *waiting, *inbox)]
        assert sorted(ids) == sorted(rows), "every request waits or runs once"
        assert len({row.slot for row in running}) == len(running) <= self.runner.slots
        assert all(row.stream.ended is None for row in rows.values())
        assert all(row.reader is None or row.reader in running for row in running)
        self.runner.check(running)
        self.adapters.check()

    def _ready(self, row: Row) -> bool:
        if row.entry is None:
            return True
        try:
            row.held = self.adapters.lease(row.entry)
        except LorafoldError as error:
            self.fail(row, error)
        return row.held is not None

    def _pass(self, batch: Batch) -> None:
        """Compute a batch, or, if that raises, both halves of it. A half that was computed has
        moved on, so that the other half writes behind it.
        """
        rows, counts = batch
        try:
            logits_BV = self.runner.forward(rows, counts)
        except Exception as error:
            if len(rows) == 1:
                self.fail(rows[0], error)
                return
            n = len(rows) // 2
            self._pass(Batch(rows[:n], counts[:n]))
            self._pass(Batch(rows[n:], counts[n:]))
            if all(row.stream.ended for row in rows):  # the fault is no request's
                self.runner.rebuild()
                for row in self.scheduler.running:
                    row.filled = row.cached = 0
                    row.state = None
            return
        for row, n in zip(rows, counts, strict=True):
            row.filled += n
        done = [(b, row) for b, row in enumerate(rows) if not row.pending]
        for b, row in tuple(done):
            if others := self.scheduler.joined(row):
                self._guarded(row, partial(self.runner.share, row, others))
                done += [(b, other) for other in others if not other.pending]
        self._choose([(b, row) for b, row in done if row.stream.ended is None], logits_BV)

    def _choose(self, rows: list[tuple[int, Row]], logits_BV: Tensor) -> None:
        for _, row in rows:
            self._guarded(row, row.show_prompt)
        rows = [(b, row) for b, row in rows if row.stream.ended is None]
        for _, row in rows:
            if not row.request.max_new_tokens:
                self.end(row, "length")
        rows = [(b, row) for b, row in rows if row.request.max_new_tokens]
        choices = chosen([row.sampler for _, row in rows], picked(logits_BV, [b for b, _ in rows]))
        for (_, row), choice in zip(rows, choices, strict=True):

            def take(row: Row = row, choice: Choice | Exception = choice) -> None:
                if isinstance(choice, Exception):
                    raise choice
                if (reason := row.take(choice)) is not None:
                    self.end(row, reason)

            self._guarded(row, take)

    def _guarded(self, row: Row, do: Callable[[], None]) -> None:
        try:
            do()
        except STOPS:
            raise
        except BaseException as error:  # a panic in a tokenizer is no Exception
            if isinstance(error, NotFinite) and row.entry is not None:
                self.adapters.strike(row.entry)
            self.fail(row, error)
