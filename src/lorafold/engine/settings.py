"""What an engine holds at a time, how it computes, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from lorafold.errors import LorafoldError
from lorafold.ops.arithmetic import FEW

LONGEST = 2048  # tokens of a request, unless more are asked for


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine.

    Args:
        slots: how many requests run at a time.
        length: the most tokens of a request (None: what the model has positions for, at most
            LONGEST).
        chunk: the most tokens of a prompt that are read in one pass.
        budget: the most tokens of prompts that are read in a step.
        adapter_bytes: the most bytes of adapters in memory, or None.
        fast: replace parts of the model by faster ones that compute the same, as
            `engine.fast_path` does; the matrices then take their memory twice.
        beyond: accept a length beyond the positions that the model was made for, but not beyond a
            table of them.
        invariant: keep the shapes of all passes the same, so that a request's logits are the same
            bits whatever shares the batch, without the faster parts (experts: one at a time).
        as_trained: compute training's numbers, bit by bit (`engine.operations`), with its own fused
            parts in place of those of `fast`.
        prefix_reuse: start from what a request of the same tenant and adapter has or left in a
            slot, where the prompt begins the same; never where `invariant`. What is being read is
            read once for all requests with that prompt, whatever is set here.
        strikes: requests that fail by logits that are not finite before an adapter is refused.
        tenant_slots: how many requests of a tenant run at a time; half of the slots, if that is
            less, while other tenants are there. Rows that run beside it make each of a tenant's
            steps longer, and slots that are free let the next one begin at once. None: there is no
            such limit.
        weights: the shares of tenants in what is computed; 1 for one that is not named.
        allow_other_base: accept adapters that were trained on another base.
    """

    slots: int = 16
    length: int | None = None
    chunk: int = 256
    budget: int = 512
    adapter_bytes: int | None = None
    fast: bool = True
    beyond: bool = False
    invariant: bool = False
    as_trained: bool = False
    prefix_reuse: bool = True
    strikes: int = 3
    tenant_slots: int | None = None
    weights: Mapping[str, float] | None = None
    allow_other_base: bool = False

    def fitted(self, positions: int | None, table: int | None) -> tuple[Self, int]:
        """The settings for a model, and the length. Raises LorafoldError for sizes that are too
        small, and for a length that the model has no positions for.

        Args:
            positions: those that the model was made for (None: as many as LONGEST).
            table: those of its table of positions, if it has one.
        """
        positions = min(positions or LONGEST, table or sys.maxsize)
        most = sys.maxsize if self.beyond and table is None else positions
        length = min(positions, LONGEST) if self.length is None else self.length
        sizes = {"slots": (self.slots, 1), "length": (length, 2), "chunk": (self.chunk, 2)}
        sizes["tenant_slots"] = (self.tenant_slots or 1, 1)
        wrong = [
            f"{name}: found {n}, expected {m} or more" for name, (n, m) in sizes.items() if n < m
        ]
        if not wrong and length > most:
            wrong = [f"length: found {length}, expected at most {most} positions"]
        if wrong:
            raise LorafoldError(f"engine: {'; '.join(wrong)}")
        reuse, fast = (asked and not self.invariant for asked in (self.prefix_reuse, self.fast))
        # a pass of training's numbers has FEW tokens or more
        chunk = max(min(self.chunk, length), FEW if self.as_trained else 0)
        return replace(self, length=length, chunk=chunk, prefix_reuse=reuse, fast=fast), length
