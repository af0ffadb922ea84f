"""The engine: continuous batching of requests with any mixture of adapters on one model.

    with Engine(model, tokenizer) as engine:
        engine.load("sft", "adapter")
        stream = engine.submit(Request("1", prompt, max_new_tokens=64, adapter="sft"))
        engine.run()                        # or engine.start(), which steps in a thread
        print(stream.result().text)

Continuous batching is from Yu et al. 2022, Orca (OSDI). Results are batch invariant. If a forward
pass raises, the engine splits its batch in halves until the failing requests are isolated. The
other requests lose no tokens, because a row counts tokens as computed only after a successful pass.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lorafold.core.attach import only
from lorafold.core.contexts import evaluating
from lorafold.engine.adapter_cache import AdapterCache
from lorafold.engine.adapters import KnownAdapter, Reader, VerifiedAdapter, delta_parts, deltas_of
from lorafold.engine.kv_cache import BLOCK, BlockCache
from lorafold.engine.model_structure import Structure, reserve, separate_rows, slotted, structure_of
from lorafold.engine.operations import Operations, operations_on
from lorafold.engine.plan import plan_of
from lorafold.engine.request import EngineSettings, EventStream, Reason, Request, require
from lorafold.engine.runner import Runner, SlotRunner, SoloRunner
from lorafold.engine.sampler import GrammarError, Grammars, NotFinite, SampledToken, sample_tokens
from lorafold.engine.scheduler import Batch, Scheduler
from lorafold.engine.sequence import Row
from lorafold.errors import EXITS, LorafoldError, error_location
from lorafold.methods.common.biases_and_modules import vocabulary
from lorafold.models.positions import positions_of
from lorafold.ops.host_tensors import select_rows
from lorafold.runtime.memory import free_bytes, trim_heap
from lorafold.runtime.processor import end_team, sleep_if_busy, stack_size
from lorafold.training_step.fused_modules import fused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = EngineSettings()


class Engine:
    """Runs requests on a model, which it takes over until `close`: the model is in evaluation mode
    and without gradients. Adapters that are active on the model are part of the base; others can be
    registered with `adopt`. Without a tokenizer, events have no text. `changes` override fields of
    `settings`.
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
            reserve(model, stack)
            stack.enter_context(evaluating(model, gradients=True))
            stack.enter_context(sleep_if_busy())
            self.structure: Structure = structure_of(model)
            self.is_batched = not self.structure.unbatched_reason
            dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
            budget, self._as_trained = settings.adapter_bytes, settings.as_trained
            planned = self.is_batched and settings.fast and not settings.as_trained
            plan = plan_of(model) if planned else None
            others = settings.allow_other_base
            self._reader = Reader(model, self.structure, dtype, others, budget, plan)
            if self.is_batched:
                device = model.device.type
                fast = settings.fast
                operations = operations_on(device, self._as_trained) if fast else Operations()
                stack.enter_context(slotted(model, operations))
                separate_rows(model, stack)
                self.kv_tokens = self._kv_tokens(settings)
                self.length = min(self.length, self.kv_tokens)
                settings = replace(settings, length=self.length)
                cache = BlockCache(self.kv_tokens // BLOCK, model.device)
                self._runner: Runner = SlotRunner(
                    model, self.structure, cache, settings, operations, plan
                )
                if self._as_trained:
                    stack.enter_context(fused(model))
                elif settings.fast:
                    norm, rotary, gate = operations.rms_norm, operations.rotary, operations.gated
                    stack.enter_context(fused(model, False, norm, rotary, gate))
            else:
                from transformers import GenerationConfig

                stack.callback(setattr, model, "generation_config", model.generation_config)
                greedy = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
                model.generation_config = greedy
                self._runner, self.kv_tokens = SoloRunner(model, self.structure), self.length
                settings = replace(settings, slots=1, chunk=self.length)
            self._stack = stack.pop_all()
        below = vocabulary(model, delta_parts(deltas_of(model, self._runner.deltas.base)))
        self.vocabulary: int = max(config.vocab_size, below or 0)
        single = settings.invariant and self.structure.routed
        self._scheduler = Scheduler(settings, single, plan is not None)
        self._wake, self._lock = threading.Event(), threading.RLock()
        self.adapters = AdapterCache(self._reader, budget, self._wake.set, settings.strikes)
        self._rows: dict[str, Row] = {}
        self._grammars = Grammars(tokenizer, self.vocabulary)
        self._inbox: deque[Row] = deque()
        self._thread: threading.Thread | None = None
        self._closing = False

    def _kv_tokens(self, settings: EngineSettings) -> int:
        """The number of tokens in whole blocks for which there is memory."""
        free, token_bytes = free_bytes(self.model.device), self.structure.token_bytes
        half = (free - min(settings.adapter_bytes or 0, free // 2)) // 2  # of what adapters leave
        given, least = settings.kv_bytes, BLOCK * token_bytes
        if given is not None and given < least:
            message = f"{least:,} or more, for a block of {BLOCK} tokens"
            raise LorafoldError(f"engine: kv_bytes: found {given:,}, expected {message}")
        return (max(half, least) if given is None else given) // least * BLOCK

    def load(
        self, name: str, path: str | Path, *, stack: Sequence[VerifiedAdapter] = (),
        wait: bool = True,
    ) -> None:  # fmt: skip
        """Reads and verifies an adapter and registers it under a name. Running requests keep the
        previous adapter of that name. `stack` lists the expected files (`KnownAdapter.stack`). With
        `wait`, returns when the adapter is in memory.
        """
        future = self.adapters.load(name, path, stack)
        if wait:
            future.result()

    def verify(self, entry: KnownAdapter) -> None:
        self._reader.read(entry)

    def adopt(self, name: str, on_model: Sequence[str]) -> None:
        """Registers adapters that are attached to the model, the lowest first, under one name."""
        only(self.model, *on_model)  # raises unless they are attached
        if active := ", ".join(sorted(set(on_model) & set(self._runner.deltas.base))):
            raise LorafoldError(
                f"adapter {active}: already active on the model, so part of the engine's base; open"
                " the engine inside lf.only(model)"
            )
        deltas = deltas_of(self.model, on_model)
        size, separate = vocabulary(self.model, delta_parts(deltas)), self._as_trained
        self.adapters.adopt(name, lambda key: self._reader.loaded(key, deltas, size, separate))

    def unload(self, name: str) -> None:
        self.adapters.unload(name)

    def submit(self, request: Request) -> EventStream:
        entry, sampling = None, request.sampling
        try:
            if request.adapter is not None:
                entry = self.adapters.bind(request.adapter)
            allowed = self._grammars.start(sampling)
            row = Row(request, entry, self.tokenizer, allowed, self._grammars.ends(sampling))
            with self._lock:
                if self._closing:
                    raise LorafoldError("the engine is closed")
                self._check(request, max(self.vocabulary, entry.vocabulary if entry else 0))
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

    def _check(self, request: Request, vocabulary: int) -> None:
        prompt, n, k = request.prompt, request.max_new_tokens, request.prompt_logprobs
        length, why, least = self.length, self.structure.unbatched_reason, 1 if k is None else 0
        checks = {
            f"id: found {request.id!r}, the id of a running request, expected a new one": (
                request.id not in self._rows
            ),
            "prompt: found no tokens, expected at least one": bool(prompt),
            f"max_new_tokens: found {n}, expected 1 or more, or 0 with prompt_logprobs": n >= least,
            f"prompt and max_new_tokens: found {len(prompt)} + {n} tokens, expected at most"
            f" {length} in total": n < least or len(prompt) + n <= length,
        }
        for name, ids in (("prompt", prompt), ("logit_bias", request.sampling.logit_bias)):
            for i in ids:
                if not (isinstance(i, int) and 0 <= i < vocabulary):
                    checks[f"{name}: found token {i!r}, expected 0 to {vocabulary - 1}"] = False
                    break
        scores = f"prompt_logprobs: found {k}, expected"
        require(
            checks
            | {
                f"{scores} 0 to 20, or None": k is None or 0 <= k <= 20,
                f"{scores} None for this model, since {why}": k is None or not why,
                "stop: stop strings need a tokenizer, and this engine has no tokenizer": (
                    self.tokenizer is not None or not request.sampling.stop
                ),
            }
        )

    def cancel(self, id: str) -> bool:
        """Ends a request within the next step. Returns False if no such request is running or
        waiting.
        """
        with self._lock:
            row = self._rows.get(id)
            if row is not None:
                row.cancelled = True
        self.wake()
        return row is not None

    def wake(self) -> None:
        self._wake.set()

    def step(self) -> bool:
        with self._lock:
            while self._inbox:
                self._scheduler.waiting.add(self._inbox.popleft())
            cancelled = [row for row in self._rows.values() if row.cancelled]
        for row in cancelled:
            self._end(row, "cancelled")
        self._runner.expire(self.adapters.generations)
        for row in self._scheduler.admit(self._runner.fits, self._ready):
            row.stream.began = row.stream.began or time.monotonic()
            self._guarded(row, self._runner.admit, row)
            self._scheduler.share_prefill(row)
        for row in [*self._scheduler.running]:
            while row.slot >= 0 and not self._runner.extend(row):
                self._requeue(self._scheduler.running[-1])  # it computes its tokens again
        decode_batches = self._scheduler.decode_batches()
        for batch in decode_batches:
            self._pass(batch)
        prefill_batches = self._scheduler.prefill_batches()
        for batch in prefill_batches:
            self._pass(batch)
        return bool(cancelled or decode_batches or prefill_batches)

    def run(self, after: Callable[[], None] = lambda: None) -> None:
        while self._rows:
            self._wake.clear()
            if not self.step() and self._rows:
                self._wake.wait(1.0)
            after()

    def forget(self) -> None:
        if self._rows:
            raise LorafoldError(f"engine: found {len(self._rows)} active requests, expected none")
        self._runner.rebuild()

    def start(self, after: Callable[[], None] = lambda: None) -> None:
        """Starts a thread that steps until `close`. It calls `after` after each step, and at least
        once per second when idle. An error in a step or in `after` ends the thread.
        """
        assert self._thread is None
        end_team()  # because the engine's thread creates another OpenMP team
        self._thread = threading.Thread(None, self._serve, "lorafold-engine", (after,), daemon=True)
        with stack_size():
            self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            for row in self._rows.values():
                row.cancelled = True
        self._runner.stop()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        with self._stack:
            for row in list(self._rows.values()):
                self._end(row, "cancelled")
            self.adapters.close()
            self._runner.deltas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, after: Callable[[], None]) -> None:
        while not self._closing:
            self._wake.clear()
            worked = self.step()
            after()
            if not worked and not self._wake.wait(1.0) and not self._rows:
                self.adapters.check_memory()
                trim_heap()

    def _fail(self, row: Row, error: BaseException) -> None:
        message, fault, setting = f"{type(error).__name__}: {error}", error_location(error), ""
        if isinstance(error, LorafoldError):
            message = fault = str(error)
        if isinstance(error, GrammarError):
            fault, setting = f"its {error.setting} allows no further token", error.setting
        self._end(row, "failed", message, fault, setting)

    def _end(
        self, row: Row, reason: Reason, message: str = "", fault: str = "", setting: str = ""
    ) -> None:
        if row in self._scheduler.running:
            self._scheduler.remove(row)
            self._runner.release(row, ended_normally=reason in ("end", "length", "stop"))
        elif row in self._scheduler.waiting:
            self._scheduler.waiting.remove(row)
        if row.entry is not None:
            if row.adapter is not None:
                self.adapters.release(row.entry)
            self.adapters.unbind(row.entry)
        with self._lock:
            if row in self._inbox:
                self._inbox.remove(row)
            del self._rows[row.request.id]
        row.end(reason, message, fault, setting)

    def _ready(self, row: Row) -> bool:
        if row.entry is None or row.adapter is not None:  # it ran before
            return True
        try:
            row.adapter = self.adapters.lease(row.entry)
        except LorafoldError as error:
            self._fail(row, error)
        return row.adapter is not None

    def _requeue(self, row: Row) -> None:
        self._scheduler.remove(row)
        self._runner.release(row, ended_normally=False)
        self._scheduler.waiting.add(row)  # it keeps its adapter, whose files may be others by then

    def _pass(self, batch: Batch) -> None:
        rows, counts = batch
        if rows[0].slot < 0:  # it waits again
            return
        try:
            logits_BV = self._runner.forward(rows, counts)
        except Exception as error:
            if self._closing:
                return
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            n = len(rows) // 2
            self._pass(Batch(rows[:n], counts[:n]))
            self._pass(Batch(rows[n:], counts[n:]))
            if all(row.stream.ended for row in rows):  # the cause may be the cache
                for row in self._scheduler.running[::-1]:
                    self._requeue(row)
                self._runner.rebuild()
            return
        for row, n in zip(rows, counts, strict=True):
            row.computed += n
        done = [(b, row) for b, row in enumerate(rows) if not row.num_pending]
        for b, row in enumerate(rows):
            for other in self._scheduler.waiting_for(row):
                if other.awaited <= row.computed:
                    self._guarded(other, self._runner.share, other, row.blocks, other.awaited)
                    other.scores = row.scores
                    self._scheduler.share_prefill(other)
                    done += [(b, other)] * (not other.num_pending)
        self._choose([(b, row) for b, row in done if row.stream.ended is None], logits_BV)

    def _choose(self, rows: list[tuple[int, Row]], logits_BV: Tensor) -> None:
        for _, row in rows:
            self._guarded(row, row.publish_prompt)
            if row.stream.ended is None and not row.request.max_new_tokens:
                self._end(row, "length")
        rows = [(b, row) for b, row in rows if row.stream.ended is None]
        logits_nV = select_rows(logits_BV, [b for b, _ in rows])
        choices = sample_tokens([row.sampler for _, row in rows], logits_nV)
        for (_, row), choice in zip(rows, choices, strict=True):
            self._guarded(row, self._take, row, choice)

    def _take(self, row: Row, choice: SampledToken | Exception) -> None:
        if isinstance(choice, Exception):
            raise choice
        if (reason := row.append(choice)) is not None:
            self._end(row, reason)

    def _guarded(self, row: Row, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except EXITS:
            raise
        except BaseException as error:  # a Rust panic of a tokenizer is not an Exception
            if isinstance(error, NotFinite) and row.entry is not None:
                row.entry.strikes += 1
            self._fail(row, error)
