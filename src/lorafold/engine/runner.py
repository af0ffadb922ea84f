"""Forward passes of running requests.

A decoding pass runs over a view of the first slots. Idle slots among them compute an unused token
at a position that is overwritten before it is read. With `invariant`, all passes have the same
shapes: all slots decode together, prompts are prefilled one row at a time in chunks of one size,
and a mixture-of-experts model also decodes one row at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lorafold.engine.adapters import LoadedAdapter
from lorafold.engine.kv_cache import CachedPrefixes, SlotCache, SlotView, common_length
from lorafold.engine.mixed_adapters import ActiveDeltas, AdapterRows, SlotAdapters
from lorafold.engine.model_structure import Structure, forward_pass
from lorafold.engine.operations import BlockMatmuls, Operations
from lorafold.engine.request import EngineSettings
from lorafold.engine.sequence import Row
from lorafold.ops.arithmetic import FEW, multiplies_bf16, override_widening, widens
from lorafold.ops.host_tensors import select_rows, send


class Runner(ABC):
    slots: int
    deltas: ActiveDeltas

    @abstractmethod
    def admit(self, row: Row) -> None:
        """Assigns a free slot to a request."""

    @abstractmethod
    def release(self, row: Row, ended_normally: bool) -> None:
        """Frees a request's slot. `ended_normally` is False after a failure or a cancellation."""

    def share(self, row: Row, others: Sequence[Row]) -> None:
        """Copies the prefilled prompt of a request to the others that wait for it."""
        return None

    @abstractmethod
    def forward(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        """Returns the logits (B, V) after the given numbers of pending tokens. All rows must have
        the same `separate_adapter`.
        """

    def rebuild(self) -> None:
        """Replaces the KV cache by an empty one."""
        return None

    def compact(self) -> None:
        """Moves requests to the first slots, so that decoding passes have few idle slots."""
        return None


def separate_adapter(row: Row) -> LoadedAdapter | None:
    """Returns the request's adapter if it can't be mixed with others, else None. Requests with the
    same result can share a forward pass.
    """
    return row.adapter if row.adapter is not None and row.adapter.separate else None


class SlotRunner(Runner):
    def __init__(
        self, model: Any, structure: Structure, cache: SlotCache, settings: EngineSettings
    ) -> None:
        self.model, self.structure, self.cache, slots = model, structure, cache, cache.slots
        self.slots, self.invariant, self.chunk = slots, settings.invariant, settings.chunk
        self.prefix_reuse, self.prefixes = settings.prefix_reuse, CachedPrefixes()
        self.fast, self.as_trained = settings.fast, settings.as_trained
        self.single = self.invariant and structure.routed
        self.slot_adapters = SlotAdapters(structure, slots, cache.operations)
        self.deltas = ActiveDeltas(model, self.slot_adapters)
        self.rows: list[Row | None] = [None] * slots
        self._views: dict[LoadedAdapter | None, SlotView] = {None: SlotView(self.cache)}
        self._planned: list[int] | None = None  # ids of the adapters in `_plan`
        self._plan = AdapterRows([], {})

    def admit(self, row: Row) -> None:
        free = [slot for slot, other in enumerate(self.rows) if other is None]
        oldest = min(free, key=self.prefixes.age)
        source, n = self._cached(row) if row.prefiller is None else (-1, 0)
        lost = self.prefixes.length(source) - n  # cached tokens that the row would overwrite
        at = source if source in free and lost <= self.prefixes.length(oldest) else oldest
        row.slot, row.computed, row.cached = at, n, n
        if row.slot != source:
            self.cache.copy(source, [row.slot], n)
        self.cache.zero(row.slot, n)
        self.prefixes.slots.pop(row.slot, None)
        if row.adapter is not None:
            self.deltas.attach(row.adapter)
            if not row.adapter.separate:
                self.slot_adapters.place(row.slot, row.adapter)
            elif row.adapter not in self._views:
                self._views[row.adapter] = SlotView(self.cache)
        self.rows[row.slot] = row
        self._planned = None

    def _cached(self, row: Row) -> tuple[int, int]:
        """Returns the free or running slot with the longest common prefix, and the prefix's length,
        or (-1, 0). The last token never counts, because its logits must be computed.
        """
        if not self._reusable(row) or row.request.prompt_logprobs is not None:
            return -1, 0
        slot, most = self.prefixes.find(row.prefix, row.tokens)
        for other in self.rows:
            if other is not None and other.prefix == row.prefix and self._reusable(other):
                n = common_length(other.tokens[: other.computed], row.tokens[:-1])
                slot, most = (other.slot, n) if n > most else (slot, most)
        return slot, most

    def share(self, row: Row, others: Sequence[Row]) -> None:
        self.cache.copy(row.slot, [other.slot for other in others], row.computed)
        for other in others:
            other.prefiller, other.computed, other.cached = None, row.computed, row.computed
            other.scores = row.scores

    def release(self, row: Row, ended_normally: bool) -> None:
        self.rows[row.slot] = None
        self.slot_adapters.clear(row.slot)
        reusable = row.computed if ended_normally and self._reusable(row) else 0
        self.cache.zero(row.slot, reusable)
        if reusable:
            self.prefixes.add(row.slot, row.prefix, row.tokens[:reusable])
        if row.adapter is not None:
            self.deltas.detach(row.adapter)
            if row.adapter not in {r.adapter for r in self.rows if r is not None}:
                self._views.pop(row.adapter, None)
        row.slot = -1
        self._planned = None

    def _reusable(self, row: Row) -> bool:
        """Whether requests with the same tokens and `PrefixKey` may reuse the row's KV cache."""
        return self.prefix_reuse and separate_adapter(row) is None

    def rebuild(self) -> None:
        self.prefixes = CachedPrefixes()
        self.cache = self.cache.empty_copy()
        self._views = {adapter: SlotView(self.cache) for adapter in self._views}

    def compact(self) -> None:
        live = [r for r in self.rows if r is not None]
        if self.invariant or not live:
            return
        last = live[-1].slot
        if last + 1 <= 1.25 * len(live) and last < min(self.prefixes.slots, default=self.slots):
            return
        for row in reversed(live):
            target = next((i for i, r in enumerate(self.rows) if r is None), self.slots)
            if target > row.slot:
                return
            source, cached = row.slot, self.prefixes.length(target)
            self.cache.swap(source, target, max(row.computed, cached))
            self.cache.zero(target, row.computed)
            self.cache.zero(source, cached)
            self.prefixes.move(target, source)
            if row.adapter is not None and not row.adapter.separate:
                self.slot_adapters.place(target, row.adapter)
            self.slot_adapters.clear(source)
            self.rows[source], self.rows[target], row.slot = None, row, target
            self._planned = None

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        separate = separate_adapter(rows[0])
        decoding = max(counts) == 1
        at: slice | list[int]
        if decoding and separate is None and not self.single:
            last = self.slots if self.invariant else max(row.slot for row in rows) + 1
            by_slot, at, num_tokens = {row.slot: row for row in rows}, slice(0, last), [1] * last
            taken = [by_slot.get(slot) for slot in range(last)]
            starts = [
                self.prefixes.length(slot) if r is None else r.computed
                for slot, r in enumerate(self.rows[:last])
            ]
        else:
            ordered = sorted(zip(rows, counts, strict=True), key=lambda pair: pair[0].slot)
            taken, num_tokens = [row for row, _ in ordered], [n for _, n in ordered]
            starts, slots = [row.computed for row, _ in ordered], [row.slot for row, _ in ordered]
            first, behind = slots[0], slots[0] + len(slots)
            at = slice(first, behind) if slots == [*range(first, behind)] else slots
        width = self.chunk if self.invariant and not decoding else max(num_tokens)
        width = max(width, min(self.chunk, -(-self._min_rows(separate) // len(taken))))
        with self._batch_invariant():
            logits = self._pass(separate, taken, num_tokens, at, starts, width)
        index = {id(row): b for b, row in enumerate(taken) if row is not None}
        return select_rows(logits, [index[id(row)] for row in rows])

    @contextmanager
    def _batch_invariant(self) -> Iterator[None]:
        if not (self.as_trained or self.fast):
            yield
            return
        widened = widens(self.model.dtype) if self.as_trained else not multiplies_bf16()
        # `fast_path` pads matmuls itself
        packed = self.as_trained or self.structure.index_of.keys() <= self.deltas.aware
        blocks = BlockMatmuls(FEW) if self.slot_adapters.in_blocks and not packed else nullcontext()
        with override_widening(widened=widened, rows=1), blocks:
            yield

    def _min_rows(self, separate: LoadedAdapter | None) -> int:
        if self.as_trained:
            return FEW
        all_packed = self.structure.index_of.keys() <= self.deltas.aware
        if not self.fast or (separate is None and all_packed):
            return 1
        return self.slot_adapters.min_rows(self.model.dtype, self.model.device)

    def _pass(
        self,
        separate: LoadedAdapter | None,
        taken: Sequence[Row | None],
        num_tokens: Sequence[int],
        at: Any,
        starts: Sequence[int],
        width: int,
    ) -> Tensor:  # (B, V)
        device = self.model.device
        ids = []
        for row, n in zip(taken, num_tokens, strict=True):
            tokens = [0] if row is None else row.tokens[row.computed : row.computed + n]
            ids.append(tokens + tokens[-1:] * (width - len(tokens)))
        rows = at if isinstance(at, slice) else send(torch.tensor(at), device)
        view = self._views[separate].select(rows, send(torch.tensor(starts), device), width)
        with_counts = [*zip(taken, num_tokens, strict=True)]
        to_score = [0 if row is None else row.to_score(n) for row, n in with_counts]
        positions = sorted({n - 1 for n in num_tokens})
        positions = [*range(max(num_tokens))] if any(to_score) else positions
        if self.as_trained:  # the LM head needs FEW rows too
            positions = sorted({*positions, *range(-(-FEW // len(num_tokens)))})
        keep = send(torch.tensor(positions), device)
        adapters = [None if row is None else row.adapter for row in taken]
        ids_of = [id(adapter) for adapter in adapters]
        if separate is None and self._planned != ids_of:
            self._planned = ids_of
            self._plan = AdapterRows(adapters, self.slot_adapters.places, self.invariant)
        ids_BT, counts_B = send(torch.tensor(ids), device), send(torch.tensor(num_tokens), device)
        with self.deltas.separate(separate) if separate else self.deltas.mixed(self._plan):
            logits = forward_pass(self.model, view, ids_BT, counts_B, keep)  # (B, positions, V)
        for row, logits_TV, n in zip(taken, logits, to_score, strict=True):
            if row is not None and n:
                row.score(logits_TV[:n])
        if len(positions) == 1:
            return logits[:, 0]
        at = send(torch.tensor([positions.index(n - 1) for n in num_tokens]), device)
        return logits[torch.arange(len(num_tokens), device=device), at]


class SoloRunner(Runner):
    """Runs one request at a time with `generate`, for models that can't be batched."""

    slots = 1

    def __init__(self, model: Any, structure: Structure) -> None:
        self.model = model
        self.deltas = ActiveDeltas(model, SlotAdapters(structure, 1, Operations()))

    def admit(self, row: Row) -> None:
        row.slot = 0
        if row.adapter is not None:
            self.deltas.attach(row.adapter)

    def release(self, row: Row, ended_normally: bool) -> None:
        row.slot, row.state = -1, None
        if row.adapter is not None:
            self.deltas.detach(row.adapter)

    def forward(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        (row,) = rows
        ids_1T = torch.tensor([row.tokens], device=self.model.device)
        # generate skips cached tokens itself, unless the cache has only recurrent states
        states = [*getattr(row.state, "is_linear", ())]
        seen, adapter = row.computed if states and all(states) else 0, row.adapter
        base = AdapterRows([None], {})
        with torch.no_grad(), self.deltas.separate(adapter) if adapter else self.deltas.mixed(base):
            step = self.model.generate(
                ids_1T[:, seen:],
                attention_mask=torch.ones_like(ids_1T),
                cache=row.state,
                max_new_tokens=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        row.state = step.cache
        return step.logits[0]
