"""Losses as modules over a model, so that what accelerate wraps is the whole step: inputs in,
summed loss out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.data.batches import collate, labelled, micro_batches
from lorafold.data.examples import Example
from lorafold.data.labelled import LabelledExample
from lorafold.step.head import labelled_loss, row_losses


class Loss(nn.Module, ABC):
    """Abstract: a sum over what `count` counts, so that micro-batches add up to the batch exactly.

    It starts in its model's mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    @property
    def device(self) -> torch.device:
        """Where its model lies."""
        return next(self.parameters()).device

    @abstractmethod
    def count(self, example: Any) -> int:
        """By how much the example weighs in the mean."""

    def micro_batches(self, examples: Sequence[Any], n: int, tokens: int) -> list[Sequence[Any]]:
        """The examples of a step in the parts that are computed at a time: n of them, or more where
        a part would exceed `tokens`.
        """
        return micro_batches(examples, n)

    @abstractmethod
    def collate(self, examples: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward` for these examples."""

    @abstractmethod
    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor: ...


class Completions(Loss):
    """Next-token loss at labelled positions, in nats."""

    def __init__(self, model: nn.Module, packed: bool, pad_id: int) -> None:
        super().__init__(model)
        self.packed, self.pad_id = packed, pad_id

    def count(self, example: Example) -> int:
        return labelled(example)

    def collate(self, examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
        return {k: v.to(device) for k, v in collate(examples, self.packed, self.pad_id).items()}

    def micro_batches(
        self, examples: Sequence[Example], n: int, tokens: int
    ) -> list[Sequence[Example]]:
        return micro_batches(examples, n, tokens if self.packed else None)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return labelled_loss(self.model, labels, inputs)[0]

    # (B,), padded rows; without gradients
    def by_row(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return row_losses(self.model, labels, inputs)


class Classification(Loss):
    """Cross entropy of the class, in nats, one a row.

    The model: anything that answers with `.logits` (B, classes).
    """

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        super().__init__(model)
        self.pad_id = pad_id

    def count(self, example: LabelledExample) -> int:
        return 1

    def collate(
        self, examples: Sequence[LabelledExample], device: torch.device
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask (B, T), padded at the right, and labels (B,)."""
        ids = [torch.tensor(e.ids, device=device) for e in examples]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        return {
            "input_ids": padded,
            "attention_mask": mask,
            "labels": torch.tensor([e.label for e in examples], device=device),
        }

    def logits(self, **inputs: Tensor) -> Tensor:  # (B, classes), fp32
        logits: Tensor = self.model(**inputs).logits
        return logits.float()

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(**inputs), labels, reduction="sum")


