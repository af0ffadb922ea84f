"""Forward passes of running requests.

With `invariant`, all passes have the same shapes: all slots decode together, idle ones compute a
token that is neither written nor used, prompts are prefilled one row at a time in chunks of one
size, all passes read the whole length, and a mixture-of-experts model also decodes one row at a
time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lorafold.engine.adapters import LoadedAdapter
from lorafold.engine.kv_cache import BLOCK, BlockCache, BlockView, CachedPrefixes, num_blocks
from lorafold.engine.mixed_adapters import ActiveDeltas, AdapterRows, SlotAdapters
from lorafold.engine.model_structure import Structure, forward_pass
from lorafold.engine.operations import BlockMatmuls, Operations
from lorafold.engine.plan import StepPlan
from lorafold.engine.request import EngineSettings
from lorafold.engine.sequence import Row
from lorafold.ops.arithmetic import FEW, multiplies_bf16, override_widening, widens
from lorafold.ops.host_tensors import select_rows, send


class Runner(ABC):
    slots: int
    deltas: ActiveDeltas

    def fits(self, row: Row) -> bool:
        """Whether the KV cache has room for a request. Drops cached prefixes if necessary."""
        return True

    def extend(self, row: Row) -> bool:
        """Reserves the KV cache of a running request's tokens. Returns False if there is none."""
        return True

    @abstractmethod
    def admit(self, row: Row) -> None:
        """Assigns a free slot and KV cache to a request."""

    @abstractmethod
    def release(self, row: Row, ended_normally: bool) -> None:
        """Frees a request's slot. `ended_normally` is False after a failure or a cancellation."""

    def share(self, row: Row, blocks: Sequence[int], tokens: int) -> None:
        """Lets a request start with the first tokens in these blocks: whole blocks by reference,
        the last tokens as a copy.
        """
        return None

    def expire(self, generations: Collection[int]) -> None:
        """Drops cached prefixes that are old or whose adapter is not one of these."""
        return None

    @abstractmethod
    def forward(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        """Returns the logits (B, V) after the given numbers of pending tokens. All rows must have
        the same `separate_adapter`.
        """

    def rebuild(self) -> None:
        """Empties the KV cache. No request may be admitted."""
        return None

    def stop(self) -> None:
        """Makes a running pass raise soon, if it can."""
        return None


def is_planned(row: Row) -> bool:
    """Whether a planned step can compute the request's adapter."""
    return row.adapter is None or row.adapter.packed is not None


def separate_adapter(row: Row) -> LoadedAdapter | None:
    """Returns the request's adapter if it can't be mixed with others, else None. Requests with the
    same result can share a forward pass.
    """
    return row.adapter if row.adapter is not None and row.adapter.separate else None


class SlotRunner(Runner):
    def __init__(
        self, model: Any, structure: Structure, cache: BlockCache, settings: EngineSettings,
        operations: Operations, plan: StepPlan | None = None,
    ) -> None:  # fmt: skip
        self.model, self.structure, self.cache, self.plan = model, structure, cache, plan
        self.slots, self.chunk = settings.slots, settings.chunk
        self.invariant = settings.invariant
        self.width = (settings.length or 0) + self.chunk if self.invariant else 0
        self.prefix_reuse, self.prefixes = settings.prefix_reuse, CachedPrefixes(cache)
        self.fast, self.as_trained = settings.fast, settings.as_trained
        self.single = self.invariant and structure.routed
        self.slot_adapters = SlotAdapters(structure, self.slots, operations)
        self.deltas = ActiveDeltas(model, self.slot_adapters)
        self.rows: list[Row] = []
        self._views: dict[LoadedAdapter | None, BlockView] = {None: BlockView(self.cache)}
        self._planned: list[int] | None = None  # ids of the adapters in `_plan`
        self._plan = AdapterRows([], {})

    def fits(self, row: Row) -> bool:
        needed = num_blocks(len(row.tokens) + 1) - self._cached(row)[1] // BLOCK
        # and some blocks for the running requests, which would soon push it out again
        return self._make_room(needed + len(self.rows) // 4)

    def extend(self, row: Row) -> bool:
        more = max(0, num_blocks(len(row.tokens)) - len(row.blocks))
        if not self._make_room(more):
            return False
        row.blocks += self.cache.allocate(more)
        return True

    def _make_room(self, blocks: int) -> bool:
        while self.cache.num_free < blocks:
            if not self.prefixes.prefixes:
                return False
            self.prefixes.drop(self.prefixes.prefixes[:1])
        return True

    def admit(self, row: Row) -> None:
        taken = {other.slot for other in self.rows}
        row.slot = next(slot for slot in range(self.slots) if slot not in taken)
        self.rows.append(row)
        self.share(row, *self._cached(row))
        if row.adapter is not None and row.adapter.packed is None:
            self.deltas.attach(row.adapter)
            if not row.adapter.separate:
                self.slot_adapters.place(row.slot, row.adapter)
            elif row.adapter not in self._views:
                self._views[row.adapter] = BlockView(self.cache)
        self._planned = None

    def _cached(self, row: Row) -> tuple[Sequence[int], int]:
        """Returns the blocks of an ended or running request with the longest common prefix, and the
        prefix's length. The last token never counts, because its logits must be computed.
        """
        if not self._reusable(row) or row.request.prompt_logprobs is not None:
            return (), 0
        others = [r for r in self.rows if r is not row and self._reusable(r)]
        running = [(r.prefix, r.tokens[: r.computed], r.blocks) for r in others]
        return self.prefixes.find(row.prefix, row.tokens[:-1], running)

    def share(self, row: Row, blocks: Sequence[int], tokens: int) -> None:
        whole = tokens // BLOCK
        self.cache.retain(blocks[:whole])
        before, row.blocks = row.blocks, [*blocks[:whole], *row.blocks[whole:]]
        self.cache.release(before[:whole])
        row.blocks += self.cache.allocate(num_blocks(len(row.tokens) + 1) - len(row.blocks))
        if tokens % BLOCK:
            self.cache.copy(blocks[whole], row.blocks[whole], tokens % BLOCK)
        row.computed, row.cached = tokens, min(tokens, len(row.request.prompt))

    def release(self, row: Row, ended_normally: bool) -> None:
        self.rows.remove(row)
        self.slot_adapters.clear(row.slot)
        if ended_normally and self._reusable(row):
            self.prefixes.add(row.prefix, row.tokens[: row.computed], row.blocks)
        self.cache.release(row.blocks)
        if row.adapter is not None:
            self.deltas.detach(row.adapter)
            if row.adapter not in {other.adapter for other in self.rows}:
                self._views.pop(row.adapter, None)
        row.slot, row.blocks = -1, []
        self._planned = None

    def _reusable(self, row: Row) -> bool:
        """Whether requests with the same tokens and `PrefixKey` may reuse the row's KV cache."""
        return self.prefix_reuse and separate_adapter(row) is None

    def expire(self, generations: Collection[int]) -> None:
        self.prefixes.expire(generations)

    def stop(self) -> None:
        if self.plan is not None:
            self.plan.stop[0] = 1

    def rebuild(self) -> None:
        self.prefixes.prefixes.clear()
        self.cache.clear()

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        if self.plan is not None and is_planned(rows[0]):
            return self._planned_pass(self.plan, rows, counts)
        separate = separate_adapter(rows[0])
        decoding = max(counts) == 1
        taken: list[Row | None]
        if self.invariant and decoding and separate is None and not self.single:
            by_slot = {row.slot: row for row in rows}
            taken, num_tokens = [by_slot.get(n) for n in range(self.slots)], [1] * self.slots
        else:
            ordered = sorted(zip(rows, counts, strict=True), key=lambda pair: pair[0].slot)
            taken, num_tokens = [row for row, _ in ordered], [n for _, n in ordered]
        width = self.chunk if self.invariant and not decoding else max(num_tokens)
        width = max(width, min(self.chunk, -(-self._min_rows() // len(taken))))
        with self._batch_invariant():
            logits = self._pass(separate, taken, num_tokens, width)
        index = {id(row): b for b, row in enumerate(taken) if row is not None}
        return select_rows(logits, [index[id(row)] for row in rows])

    def _planned_pass(self, plan: StepPlan, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        # rows with the same adapter are computed together
        order = sorted(range(len(rows)), key=lambda b: id(rows[b].adapter))
        rows, counts = [rows[b] for b in order], [counts[b] for b in order]
        to_score = [row.to_score(n) for row, n in zip(rows, counts, strict=True)]
        ends, wanted = [*accumulate(counts)], list[int]()
        for end, n, scored in zip(ends, counts, to_score, strict=True):
            wanted += [*range(end - n, end - n + scored), *[end - 1] * (scored < n)]
        pairs = zip(rows, counts, strict=True)
        logits = plan.step(
            self.cache,
            [row.tokens[row.computed : row.computed + n] for row, n in pairs],
            [row.computed for row in rows],
            [row.blocks for row in rows],
            [None if row.adapter is None else row.adapter.packed for row in rows],
            wanted,
        )
        scores = [(scored, min(scored + 1, n)) for scored, n in zip(to_score, counts, strict=True)]
        last = [n - 1 for n in accumulate(n for _, n in scores)]
        for row, end, (scored, n) in zip(rows, last, scores, strict=True):
            if scored:
                row.score(logits[end + 1 - n :][:scored])
        places = dict(zip(order, last, strict=True))
        return select_rows(logits, [places[b] for b in range(len(rows))])

    @contextmanager
    def _batch_invariant(self) -> Iterator[None]:
        if not (self.as_trained or self.fast):
            yield
            return
        widened = widens(self.model.dtype) if self.as_trained else not multiplies_bf16()
        in_blocks = self.slot_adapters.in_blocks and not self.as_trained
        blocks = BlockMatmuls(FEW) if in_blocks else nullcontext()
        with override_widening(widened=widened, rows=1), blocks:
            yield

    def _min_rows(self) -> int:
        if self.as_trained:
            return FEW
        if not self.fast:
            return 1
        return self.slot_adapters.min_rows(self.model.dtype, self.model.device)

    def _pass(
        self,
        separate: LoadedAdapter | None,
        taken: Sequence[Row | None],
        num_tokens: Sequence[int],
        width: int,
    ) -> Tensor:  # (B, V)
        device = self.model.device
        ids = []
        for row, n in zip(taken, num_tokens, strict=True):
            tokens = [0] if row is None else row.tokens[row.computed : row.computed + n]
            ids.append(tokens + tokens[-1:] * (width - len(tokens)))
        with_counts = [*zip(taken, num_tokens, strict=True)]
        selected = [([], 0, 0) if r is None else (r.blocks, r.computed, n) for r, n in with_counts]
        view = self._views[separate].select(selected, width, self.width)
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
