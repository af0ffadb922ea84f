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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from lorafold.core.attach import only
from lorafold.core.evaluating import evaluation_mode
from lorafold.engine.adapters import Entry, Reader, attached, parts_of
from lorafold.engine.admission import check, sized
from lorafold.engine.fast import fast as faster
from lorafold.engine.grammar import Grammars
from lorafold.engine.loop import Loop
from lorafold.engine.operations import Operations, available
from lorafold.engine.request import Request, Stream
from lorafold.engine.residency import Residency
from lorafold.engine.row import Row
from lorafold.engine.runner import Runner, SlotRunner
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.setting import greedy, taken, untrained
from lorafold.engine.solo import SoloRunner
from lorafold.engine.structure import Structure, slotted, structure_of
from lorafold.errors import LorafoldError
from lorafold.machine.threads import disband
from lorafold.machine.waiting import considerate
from lorafold.methods.parts.extras import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 2048  # tokens of a request, unless more are asked for


class Engine:
    """A model that computes many requests. While it is open, the model is the engine's: in
    evaluation mode, without gradients; `close` gives it back as it was. Adapters that are active on
    the model belong to the base, others can be adopted.

    Args:
        model: a causal language model.
        tokenizer: for the texts of events and for stop texts; None: tokens only.
        slots: how many requests run at a time.
        length: the most tokens of a request (None: what the model has positions for, at most
            LONGEST).
        chunk: the most tokens of a prompt that are read in one pass.
        budget: the most tokens of prompts that are read in a step.
        adapter_bytes: the most bytes of adapters in memory, or None.
        fast: replace parts of the model by faster ones that compute the same (`engine.fast`); the
            matrices then take their memory twice.
        beyond: accept a length beyond the positions that the model was made for.
        invariant: keep the shapes of all passes the same, so that a request's logits are the same
            bits whatever shares the batch, without the faster parts (experts: one at a time).
        prefix_reuse: start from what a request of the same tenant and adapter left in a slot, where
            the prompt begins the same; never where `invariant`.
        strikes: requests that fail by logits that are not finite before an adapter is refused.
        tenant_slots: how many requests of a tenant run at a time, as `Scheduler` has it.
        weights: the shares of tenants in what is computed; 1 for one that is not named.
        allow_other_base: accept adapters that were trained on another base.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        slots: int = 16,
        length: int | None = None,
        chunk: int = 256,
        budget: int = 512,
        adapter_bytes: int | None = None,
        fast: bool = True,
        beyond: bool = False,
        invariant: bool = False,
        prefix_reuse: bool = True,
        strikes: int = 3,
        tenant_slots: int | None = None,
        weights: Mapping[str, float] | None = None,
        allow_other_base: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or LONGEST
        self.length = min(positions, LONGEST) if length is None else length
        sized(slots=(slots, 1), length=(self.length, 2), chunk=(chunk, 2),
              tenant_slots=(tenant_slots or 1, 1))  # fmt: skip
        if self.length > positions and not beyond:
            told = f"length: found {self.length}, expected at most {positions} positions"
            raise LorafoldError(f"engine: {told}")
        chunk = min(chunk, self.length)
        with ExitStack() as stack:
            for own in (taken(model), evaluation_mode(model), untrained(model), considerate()):
                stack.enter_context(own)
            self.structure: Structure = structure_of(model)
            dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
            self._reader = Reader(model, self.structure, dtype, allow_other_base)
            if self.slotted:
                fast = fast and not invariant
                operations = available(model.device.type) if fast else Operations()
                stack.enter_context(slotted(model, operations))
                self._runner: Runner = SlotRunner(
                    model, self.structure, operations, slots, self.length, chunk, invariant,
                    prefix_reuse, fast,
                )  # fmt: skip
                if fast:
                    laid = self._runner.laid
                    stack.enter_context(faster(model, self.structure, laid, operations, slots))
            else:
                stack.enter_context(greedy(model))
                self._runner, chunk = SoloRunner(model, self.structure), self.length
            self._stack = stack.pop_all()
        below = vocabulary(model, parts_of(attached(model, self._runner.laid.base)))
        self.vocabulary: int = max(config.vocab_size, below or 0)
        sizes = self._runner.slots, chunk, budget
        single = invariant and self.structure.routed
        self._scheduler = Scheduler(*sizes, invariant, single, tenant_slots, weights)
        self._wake, self._lock = threading.Event(), threading.RLock()
        self.adapters = Residency(self._reader, adapter_bytes, self._wake.set, strikes)
        self._loop = Loop(self._runner, self._scheduler, self.adapters, self._gone)
        self._rows: dict[str, Row] = {}
        self._grammars = Grammars(tokenizer, self.vocabulary)
        self._inbox: deque[Row] = deque()
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def slotted(self) -> bool:
        """Whether requests share passes; if not, `structure.why` says why they run one by one."""
        return not self.structure.why

    def load(
        self, name: str, path: str | Path, *, stack: Sequence[str] = (), wait: bool = True
    ) -> None:
        """Read and verify an adapter, and make it known under a name. Requests that run go on with
        what they have. Raises LorafoldError if it can't be read (if it waits).

        Args:
            name: the name for requests.
            path: the adapter's directory.
            stack: what is read for it has to be this, where that is known, as `Entry` has it.
            wait: return when it is in memory, or at once.
        """
        future = self.adapters.load(name, path, stack)
        if wait:
            future.result()

    def verify(self, entry: Entry) -> None:
        """Read and check an adapter as `load` does, and keep nothing. Any thread may call it."""
        self._reader.read(entry)

    def adopt(self, name: str, on_model: Sequence[str]) -> None:
        """Make adapters that are attached on the model, one over the other, known under one name.
        Raises LorafoldError for one that is not there, or is active and belongs to the base.

        Args:
            name: the name for requests.
            on_model: their names on the model, the lowest first.
        """
        only(self.model, *on_model)  # they are there
        if both := ", ".join(sorted(set(on_model) & set(self._runner.laid.base))):
            raise LorafoldError(
                f"adapter {both}: found it active, so it belongs to the base, expected an engine"
                " that was opened inside lf.only(model)"
            )
        deltas = attached(self.model, on_model)
        size = vocabulary(self.model, parts_of(deltas))
        self.adapters.adopt(name, lambda entry: self._reader.held(entry, deltas, size))

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

    def run(self) -> None:
        """Step until no request waits or runs."""
        while self._rows:
            self._wake.clear()
            if not self.step() and self._rows:
                self._wake.wait(1.0)

    def start(self, after: Callable[[], None] = lambda: None) -> None:
        """Step in a thread of the engine's own, until `close`. It calls `after` after every step,
        and once a second while there is none; an error in that, or in a step, ends the thread.
        """
        assert self._thread is None
        disband()  # the engine's thread has its own team
        self._thread = threading.Thread(None, self._serve, "lorafold-engine", (after,), daemon=True)
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
            self._runner.laid.close()

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
