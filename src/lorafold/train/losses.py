"""Objectives as modules over a model, so that what accelerate wraps is the whole step: inputs in, summed loss out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafold.ops.head import labelled_loss
from lorafold.train.data import Example
from lorafold.train.packing import collate


class Completions(nn.Module):
    """Next-token loss at labelled positions: the sum over them, so that micro-batches add up to the batch exactly."""

    def __init__(self, model: nn.Module, packed: bool, pad_id: int) -> None:
        super().__init__()
        self.model, self.packed, self.pad_id = model, packed, pad_id

    def collate(self, examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
        return {k: v.to(device) for k, v in collate(examples, self.packed, self.pad_id).items()}

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return labelled_loss(self.model, labels, inputs)[0]


def labelled(example: Example) -> int:
    """Tokens of the example that count in the loss; the first token of a row has nothing to be predicted from."""
    return sum(label != -100 for label in example.labels[1:])
