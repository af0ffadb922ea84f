"""Forward passes of one request at a time, for models that have no slots.

A row is computed with the model's own cache, by transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafold.engine.active_deltas import ActiveDeltas
from lorafold.engine.operations import Operations
from lorafold.engine.products import Plan, Products
from lorafold.engine.row import Row
from lorafold.engine.runner import Runner
from lorafold.engine.structure import Structure


class SoloRunner(Runner):
    """One row at a time, with the model's own cache, for models that have no slots.

    Args:
        model: a causal language model whose generation config is greedy.
    """

    slots = 1

    def __init__(self, model: Any, structure: Structure) -> None:
        self.model = model
        self.deltas = ActiveDeltas(model, Products(structure, 1, Operations()))

    def admit(self, row: Row) -> None:
        row.slot = 0
        if row.held is not None:
            self.deltas.hold(row.held)

    def release(self, row: Row, well: bool) -> None:
        row.slot, row.state = -1, None
        if row.held is not None:
            self.deltas.drop(row.held)

    def forward(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        (row,) = rows
        ids_1T = torch.tensor([row.tokens], device=self.model.device)
        # transformers leaves out what a cache has seen, except where it holds states alone
        states = [*getattr(row.state, "is_linear", ())]
        seen = row.filled if states and all(states) else 0
        context = self.deltas.alone(row.held) if row.held else self.deltas.mixed(Plan([None], {}))
        with torch.no_grad(), context:
            step = self.model.generate(
                ids_1T[:, seen:],
                attention_mask=torch.ones_like(ids_1T),
                cache=row.state,
                max_new_tokens=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        row.state = step.cache
        logits: Tensor = step.logits[0]
        return logits
