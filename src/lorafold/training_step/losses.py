"""Loss modules, which return the loss summed over a micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, inf
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorafold.core.active_adapters import token_names
from lorafold.data.arrow import Array
from lorafold.data.batches import collate, micro_batches, num_targets
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.prefix_forest import MAX_SIZE, batches_by_prefix, owners, prefix_forest
from lorafold.models.positions import max_sequence_tokens
from lorafold.ops.host_tensors import on_host, send, send_all
from lorafold.runtime.processes import SINGLE_PROCESS, Processes
from lorafold.training_step.lm_head_loss import (
    document_losses,
    has_balancing_loss,
    labelled_loss,
    token_losses,
    weights_balancing,
)
from lorafold.training_step.shared_prefixes import PrefixSupport, document_layout


class Loss(nn.Module, ABC):
    """Base class of losses, which are sums instead of means, so that micro-batches add up exactly.

    `pace` multiplies a method's learning rates, and `pace_up` the learning rates of its up factors
    (LoRA+). `counts` are saved in checkpoints.
    """

    pace = 1.0
    pace_up: float | None = None  # None: `pace`

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training
        self.counts: dict[str, float] = {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def count(self, example: Any) -> int:
        """The weight of the example in the mean loss, such as its number of labelled tokens."""

    def learns(self, example: Any) -> bool:
        """Whether the example's loss has a gradient. If not, the example is not computed, but its
        `count` is part of the mean loss.
        """
        return True

    def micro_batches(self, examples: Sequence[Any], n: int, tokens: int) -> list[Sequence[int]]:
        """Divides the indices of a step's examples into n micro-batches, or more if packed
        micro-batches would exceed `tokens` tokens.
        """
        return micro_batches(range(len(examples)), n)

    def computed(self, examples: Sequence[Any]) -> int:
        """The number of tokens in the forward pass of a micro-batch, without padding."""
        return sum(len(e.ids) for e in examples)

    @abstractmethod
    def collate(self, examples: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward`, on the device: (B, T) each, with labels (B,) for
        classification.
        """

    def of_step(
        self, examples: Sequence[Any], idle: Sequence[Any] = (), passes: Callable[[int], int] = int
    ) -> dict[str, Tensor]:
        """The arguments of `forward` that all micro-batches of a step share: sums (k,) over the
        step's examples, which the caller adds over processes. A process that needs n forward passes
        must run `passes(n)`, the additional ones on the examples `idle`.
        """
        return {}

    def figures(self, processes: Processes = SINGLE_PROCESS) -> Mapping[str, float]:
        """The last step's metrics over all processes, without the loss; called once per step."""
        return {}

    def rows_of(self, examples: Sequence[Any]) -> list[Array]:
        """The row index (t,) that identifies each token of each example: the example's own row or,
        in a shared prefix, the first row with this prefix.
        """
        return [np.full(1, row) for row in range(len(examples))]

    def names(
        self, examples: Sequence[Any], rows: Sequence[Array], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Integers (B, T) that identify the tokens of a micro-batch; dropout masks depend on them.
        """
        ids, position_ids = inputs["input_ids"], inputs.get("position_ids")
        if position_ids is None:
            document = torch.arange(len(ids))[:, None]
            positions = torch.arange(ids.shape[1])
        else:
            positions = on_host(position_ids)
            shared = inputs.get("document")  # with shared prefixes
            document = (positions == 0).cumsum(1) - 1 if shared is None else on_host(shared)
        return send(token_names(row_at(rows, document, positions), positions), ids.device)

    @abstractmethod
    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The loss in nats, (), summed over labels (B, T), or (B,) for a classifier."""


def row_at(rows: Sequence[Array], document: Tensor, positions: Tensor) -> Tensor:
    """The row index (B, T) of each token, from `Loss.rows_of`. document and positions are (B, T).
    """
    longest = max(map(len, rows))
    table = np.stack([np.pad(row, (0, longest - len(row)), "edge") for row in rows])
    return torch.from_numpy(table)[document, positions.clamp(max=longest - 1)]


class PrefixSharingLoss(Loss):
    """Base class of losses that compute shared prefixes once if that saves tokens."""

    def __init__(
        self, model: nn.Module, packed: bool, pad_id: int, support: PrefixSupport | None = None
    ) -> None:
        super().__init__(model)
        self.packed, self.pad_id = packed, pad_id
        self.balanced = has_balancing_loss(model)
        shares = support and support.across and (not self.balanced or weights_balancing(model))
        self.support = support if shares else None

    def shares_prefixes(self, examples: Sequence[Any]) -> bool:
        """Whether the shared prefixes of these examples are computed once."""
        lengths, support = [len(e.ids) for e in examples], self.support
        if support is None or not support.shares or max(lengths) > (support.max_tokens or inf):
            return False
        return len(prefix_forest(examples).ids) <= MAX_SIZE * sum(lengths)

    def computed(self, examples: Sequence[Any]) -> int:
        once = self.shares_prefixes(examples)
        return len(prefix_forest(examples).ids) if once else sum(len(e.ids) for e in examples)

    def micro_batches(self, examples: Sequence[Any], n: int, tokens: int) -> list[Sequence[int]]:
        ids = [example.ids for example in examples]
        rows = range(len(ids))
        capacity = min(tokens, max_sequence_tokens(self.model) or tokens)
        if self.shares_prefixes(examples):
            return batches_by_prefix(rows, n, capacity, ids.__getitem__)
        return micro_batches(rows, n, capacity if self.packed else None, lambda i: len(ids[i]))

    def rows_of(self, examples: Sequence[Any]) -> list[Array]:
        return owners([e.ids for e in examples]) if self.support else super().rows_of(examples)


class CompletionLoss(PrefixSharingLoss):
    """The next-token loss in nats, summed over the labelled positions of packed or padded
    sequences.
    """

    def count(self, example: Example) -> int:
        return num_targets(example)

    def collate(self, examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
        if self.shares_prefixes(examples):
            shared = prefix_forest(examples)
            tensors = shared.tensors() | ({"rows": shared.rows()} if self.balanced else {})
        else:
            tensors = collate(examples, self.packed, self.pad_id)
        return send_all(tensors, device)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        inputs.pop("document", None)
        counts, rows, lens = (inputs.pop(name, None) for name in ("counts", "rows", "lens"))
        with document_layout(self.support, lens, labels.device):
            return labelled_loss(self.model, labels, inputs, counts, rows)[0]

    @torch.no_grad()
    def by_row(self, examples: Sequence[Example]) -> Tensor:
        """The loss of each row, (n,), summed over its labelled positions, without gradients."""
        if not self.shares_prefixes(examples):
            inputs = send_all(collate(examples, False, self.pad_id), self.device)
            labels = inputs.pop("labels")
            row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
            return document_losses(self.model, labels, inputs, row, len(labels))[0]
        inputs = self.collate(examples, self.device)
        labels, lens = inputs.pop("labels"), inputs.pop("lens")
        for name in ("document", "counts", "rows"):
            inputs.pop(name, None)
        with document_layout(self.support, lens, labels.device):
            losses = token_losses(self.model, labels, inputs)
        place = (on_host(labels)[0] != NO_LOSS).cumsum(0) - 1  # the index among labelled tokens
        trained = prefix_forest(examples).trained
        return torch.stack([losses[place[torch.from_numpy(of)]].sum() for of in trained])


def similar_lengths(
    rows: Iterable[int], length: Callable[[int], int], tokens: int
) -> list[list[int]]:
    """Batches of rows of similar length: at most `tokens` tokens with padding, or one row."""
    batches: list[list[int]] = []
    for i in sorted(rows, key=length):
        if not batches or (len(batches[-1]) + 1) * length(i) > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def next_token_loss(model: Any, inputs: Mapping[str, Tensor], labelled: int) -> Tensor:
    """The next-token loss () of `labelled` positions, for fake tensors. inputs (1, T) or (B, T)."""
    ids = inputs["input_ids"]
    labels = ids.new_zeros((len(ids), ceil(labelled / len(ids))))
    return labelled_loss(model, labels, inputs)[0]
