"""The engine: continuous batching of requests with any mixture of adapters, over one model.

    with Engine(model, tokenizer) as engine:
        engine.load("sft", "adapter")
        stream = engine.submit(Request("1", prompt, max_new_tokens=64, adapter="sft"))
        engine.run()                        # or engine.start(), and a thread steps
        print(stream.result().text)

A step takes what came in, gives free slots to waiting requests, decodes one token of every running
one, and reads some of the prompts (`lorafold.engine.scheduler`). Yu et al. 2022, Orca (OSDI). Each
request computes what it computes alone, and fails alone (`lorafold.engine.loop`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from lorafold.core.attach import only
from lorafold.core.modes import evaluation_mode
from lorafold.engine.adapters import KnownAdapter, Reader, Verified, attached, parts_of
from lorafold.engine.fast_path import fast_path
from lorafold.engine.grammar import Grammars
from lorafold.engine.loop import Loop
from lorafold.engine.model_state import greedy, rows_apart, taken, untrained
from lorafold.engine.operations import Operations, available
from lorafold.engine.request import Request, Stream, check
from lorafold.engine.residency import Residency
from lorafold.engine.row import Row
from lorafold.engine.runner import Runner, SlotRunner
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.settings import EngineSettings
from lorafold.engine.slots import SlotCache
from lorafold.engine.solo import SoloRunner
from lorafold.engine.structure import Structure, slotted, structure_of
from lorafold.errors import LorafoldError
from lorafold.machine.cores import considerate, disband, stacks
from lorafold.methods.parts.extras import vocabulary
from lorafold.models.positions import positions_of
from lorafold.step.fused import fused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = EngineSettings()


class Engine:
    """A model that computes many requests. While it is open, the model is the engine's: in
    evaluation mode, without gradients; `close` gives it back as it was. Adapters that are active on
    the model belong to the base, others can be adopted.

    Args:
        tokenizer: for the texts of events and for stop texts; None: tokens only.
        settings: what it holds, how it computes, and what it refuses.
        changes: settings by name, in place of those.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        settings: EngineSettings = DEFAULT,
        **changes: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        table = positions_of(model).table
        settings, self.length = replace(settings, **changes).fitted(positions, table)
        with ExitStack() as stack:
            for own in (taken(model), evaluation_mode(model), untrained(model), considerate()):
                stack.enter_context(own)
            self.structure: Structure = structure_of(model)
            dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
            room = settings.adapter_bytes
            self._reader = Reader(model, self.structure, dtype, settings.allow_other_base, room)
            if self.slotted:
                slots, chunk, whole = settings.slots, settings.chunk, settings.invariant
                device, alike = model.device.type, settings.as_trained
                operations = available(device, alike) if settings.fast else Operations()
                stack.enter_context(slotted(model, operations))
                stack.enter_context(rows_apart(model))
                cache = SlotCache(slots, self.length, chunk, operations, whole)
                self._runner: Runner = SlotRunner(model, self.structure, cache, settings)
                if alike:
                    stack.enter_context(fused(model))
                elif settings.fast:
                    deltas = self._runner.deltas
                    stack.enter_context(fast_path(model, self.structure, deltas, operations, slots))
            else:
                stack.enter_context(greedy(model))
                self._runner = SoloRunner(model, self.structure)
                settings = replace(settings, slots=1, chunk=self.length)
            self._stack = stack.pop_all()
        below = vocabulary(model, parts_of(attached(model, self._runner.deltas.base)))
        self.vocabulary: int = max(config.vocab_size, below or 0)
        self._scheduler = Scheduler(settings, settings.invariant and self.structure.routed)
        self._wake, self._lock = threading.Event(), threading.RLock()
        self.adapters = Residency(self._reader, room, self._wake.set, settings.strikes)
        self._loop = Loop(self._runner, self._scheduler, self.adapters, self._gone)
        self._rows: dict[str, Row] = {}
        self._grammars = Grammars(tokenizer, self.vocabulary)
        self._inbox: deque[Row] = deque()
        self._thread: threading.Thread | None = None
        self._closing, self._apart = False, settings.as_trained

    @property
    def slotted(self) -> bool:
        """Whether requests share passes; if not, `structure.why` says why they run one by one."""
        return not self.structure.why

    def load(
        self, name: str, path: str | Path, *, stack: Sequence[Verified] = (), wait: bool = True
    ) -> None:
        """Read and verify an adapter, and make it known under a name. Requests that run go on with
        what they have. Raises LorafoldError if it can't be read (if it waits).

        Args:
            stack: what is read for it has to be this, where that is known, as `KnownAdapter` has
                it.
            wait: return when it is in memory, or at once.
        """
        future = self.adapters.load(name, path, stack)
        if wait:
            future.result()

    def verify(self, entry: KnownAdapter) -> None:
        """Read and check an adapter as `load` does, and keep nothing. Any thread may call it."""
        self._reader.read(entry)

    def adopt(self, name: str, on_model: Sequence[str]) -> None:
        """Make adapters that are attached on the model, one over the other, known under one name.
        Raises LorafoldError for one that is not there, or is active and belongs to the base.

        Args:
            on_model: their names on the model, the lowest first.
        """
        only(self.model, *on_model)  # they are there
        if both := ", ".join(sorted(set(on_model) & set(self._runner.deltas.base))):
            raise LorafoldError(
                f"adapter {both}: found it active, so it belongs to the base, expected an engine"
                " that was opened inside lf.only(model)"
            )
        deltas = attached(self.model, on_model)
        size = vocabulary(self.model, parts_of(deltas))
        apart = self._apart
        self.adapters.adopt(name, lambda entry: self._reader.held(entry, deltas, size, apart))

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises LorafoldError for an unknown name."""
        self.adapters.unload(name)

    def submit(self, request: Request) -> Stream:
        """Queue a request; its events come in the stream. Raises LorafoldError if it is refused."""
        entry, sampling = None, request.sampling
        try:
            if request.adapter is not None:
                entry = self.adapters.bind(request.adapter)
            allowed = self._grammars.start(sampling)
            row = Row(request, entry, self.tokenizer, allowed, self._grammars.ends(sampling))
            with self._lock:
                if self._closing:
                    raise LorafoldError("the engine is closed")
                check(
                    request,
                    length=self.length,
                    vocabulary=max(self.vocabulary, self.adapters.vocabulary(entry)),
                    running=self._rows,
                    texts=self.tokenizer is not None,
                    solo=self.structure.why,
                )
                self._rows[request.id] = row
                self._inbox.append(row)
        except BaseException as error:
            if entry is not None:
                self.adapters.unbind(entry)
            if not isinstance(error, LorafoldError):
                raise
            raise LorafoldError(f"request {request.id!r}: {error}") from None
        self.wake()
        return row.stream

    def cancel(self, id: str) -> bool:
        """End a request within a step; False if no such request waits or runs."""
        with self._lock:
            row = self._rows.get(id)
            if row is not None:
                row.cancelled = True
        self.wake()
        return row is not None

    def wake(self) -> None:
        """Let the thread of `start` make a step now."""
        self._wake.set()

    def step(self) -> bool:
        """Compute one step; False if there was nothing to compute."""
        with self._lock:
            while self._inbox:
                self._scheduler.waiting.add(self._inbox.popleft())
            cancelled = [row for row in self._rows.values() if row.cancelled]
        return self._loop.step(cancelled)

    def _gone(self, row: Row) -> None:
        with self._lock:
            if row in self._inbox:
                self._inbox.remove(row)
            del self._rows[row.request.id]

    def run(self, after: Callable[[], None] = lambda: None) -> None:
        """Step until no request waits or runs, and call `after` after every step."""
        while self._rows:
            self._wake.clear()
            if not self.step() and self._rows:
                self._wake.wait(1.0)
            after()

    def forget(self) -> None:
        """Keep nothing of requests that have ended, so that the next ones compute what they compute
        in an engine that was just opened. Raises LorafoldError while one waits or runs.
        """
        if self._rows:
            raise LorafoldError(f"engine: found {len(self._rows)} requests, expected none to run")
        self._runner.rebuild()

    def start(self, after: Callable[[], None] = lambda: None) -> None:
        """Step in a thread of the engine's own, until `close`. It calls `after` after every step,
        and once a second while there is none; an error in that, or in a step, ends the thread.
        """
        assert self._thread is None
        disband()  # the engine's thread has its own team
        self._thread = threading.Thread(None, self._serve, "lorafold-engine", (after,), daemon=True)
        with stacks():
            self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread that `start` made still steps."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Cancel what runs, and give the model back as it was."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            for row in self._rows.values():
                row.cancelled = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        with self._stack:
            for row in list(self._rows.values()):
                self._loop.end(row, "cancelled")
            self.adapters.close()
            self._runner.deltas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Raise AssertionError if, between steps, it does not hold what its requests need."""
        self._loop.check(self._rows, self._inbox)

    def _serve(self, after: Callable[[], None]) -> None:
        while not self._closing:
            self._wake.clear()
            worked = self.step()
            after()
            if not worked and not self._wake.wait(1.0) and not self._rows:
                self.adapters.look()
