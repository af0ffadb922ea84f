"""Losses over rows whose documents share a prefix, such as the completions of one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from math import inf

import numpy as np
import torch
from torch import Tensor, nn

from lorafold.core.active_adapters import token_names
from lorafold.core.attach import only, selection_of
from lorafold.data.arrow import Array
from lorafold.data.batches import collate, micro_batches
from lorafold.data.examples import NO_LOSS
from lorafold.data.preference_examples import BranchedRow
from lorafold.data.prefix_forest import (
    MAX_SIZE,
    WINDOW,
    PrefixForest,
    batches_by_prefix,
    owners,
    prefix_forest,
)
from lorafold.models.positions import max_sequence_tokens
from lorafold.ops.host_tensors import on_host, send
from lorafold.training_step.losses import Loss, row_at, similar_lengths
from lorafold.training_step.shared_prefixes import PrefixSupport


class BranchedLoss(Loss):
    """Base class of losses over rows of branches. A row's prefix is computed once if the model
    supports it.
    """

    def __init__(
        self, model: nn.Module, support: PrefixSupport | None, pad_id: int, tokens: int = 2048
    ) -> None:
        super().__init__(model)
        self.pad_id, self.tokens = pad_id, tokens
        self.support = support if support is not None and support.packs else None

    def micro_batches(
        self, examples: Sequence[BranchedRow], n: int, tokens: int
    ) -> list[Sequence[int]]:
        rows, sizes = range(len(examples)), [*map(self._own_size, examples)]
        if self.support is None:
            return micro_batches(rows, n)
        capacity = min(tokens, max_sequence_tokens(self.model) or tokens)
        if self.shares_across_rows(examples):
            prompts = [example.shared for example in examples]
            return batches_by_prefix(rows, n, capacity, prompts.__getitem__, sizes.__getitem__)
        return micro_batches(rows, n, capacity, sizes.__getitem__)

    def shares_across_rows(self, examples: Sequence[BranchedRow]) -> bool:
        """Whether a micro-batch of these examples needs fewer tokens if different rows share
        prefixes.
        """
        if self.support is None or not self.support.across or not self.shares_prefixes(examples):
            return False
        each = sum(map(self._own_size, examples))
        return len(self._forest([self.trained(e) for e in examples]).ids) <= MAX_SIZE * each

    def _own_size(self, example: BranchedRow) -> int:
        return self.size(self.trained(example))

    def trained(self, example: BranchedRow) -> BranchedRow:
        """The example with only the branches that have gradients (default: all)."""
        return example

    def size(self, example: BranchedRow) -> int:
        """The number of tokens in the forward pass of an example."""
        prompts = 1 if self.shares_prefixes([example]) else len(example.branches)
        return sum(len(branch.ids) for branch in example.branches) + len(example.shared) * prompts

    def shares_prefixes(self, examples: Sequence[BranchedRow]) -> bool:
        """Whether the prompt of each example is computed only once in a batch of these examples."""
        longest = max(len(e.shared) + len(b.ids) for e in examples for b in e.branches)
        support = self.support
        return support is not None and support.shares and longest <= (support.max_tokens or inf)

    def computed(self, examples: Sequence[BranchedRow]) -> int:
        if self.shares_prefixes(examples):
            return len(self._forest(examples).ids)
        return sum(map(self.size, examples))

    def layout_tensors(self, examples: Sequence[BranchedRow]) -> dict[str, Tensor]:
        """input_ids and labels (B, T), position_ids or an attention mask, and `document` (B, T),
        the branch of each position. If prefixes are shared, `lens` (n, 2) contains the number of
        tokens of each document, and how many it shares with the previous document.
        """
        if self.shares_prefixes(examples):
            tensors = self._forest(examples).tensors()
            del tensors["counts"]  # shared tokens are not trained
            return tensors
        documents = [document for e in examples for document in e.documents()]
        tensors = collate(documents, self.support is not None, self.pad_id)
        number = torch.arange(len(documents))
        if self.support is None:
            tensors["document"] = number[:, None].expand_as(tensors["labels"])
        else:
            lengths = torch.tensor([len(document.ids) for document in documents])
            tensors["document"] = number.repeat_interleave(lengths)[None]
        return tensors

    def order(self, examples: Sequence[BranchedRow]) -> Tensor:
        """The indices (n,) of the documents' trained tokens, in the order of `layout_tensors`."""
        if not self.shares_prefixes(examples):
            return torch.arange(sum(label != NO_LOSS for e in examples for label in e.labels))
        return torch.from_numpy(np.concatenate(self._forest(examples).trained)).argsort()

    def _forest(self, examples: Sequence[BranchedRow]) -> PrefixForest:
        limits = [len(e.shared) for e in examples for _ in e.branches]
        documents = [document for e in examples for document in e.documents()]
        rows = [row for row, e in enumerate(examples) for _ in e.branches]
        across = self.support is not None and self.support.across
        return prefix_forest(documents, limits, None if across else rows)

    def rows_of(self, examples: Sequence[BranchedRow]) -> list[Array]:
        rows = super().rows_of(examples)
        if self.support is None or not self.support.across:
            return rows
        prompts = owners([e.shared for e in examples])
        return [np.append(*pair) for pair in zip(prompts, rows, strict=True)]

    def names(
        self, examples: Sequence[BranchedRow], rows: Sequence[Array], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        document, device = on_host(inputs["document"]), inputs["document"].device
        documents = [
            (number, len(e.shared), branch)
            for number, e in enumerate(examples)
            for branch, _ in enumerate(self.trained(e).branches)
        ]
        example, shared, branch = torch.tensor(documents).t()[:, document]
        given = inputs.get("position_ids")
        positions = torch.arange(document.shape[1]) if given is None else on_host(given)
        # a prompt's tokens have the same names, computed once or with each completion
        branch = branch * (positions >= shared)
        return send(token_names(row_at(rows, example, positions), positions, branch), device)

    def below(self) -> AbstractContextManager[None]:
        """Context in which the model is the reference, without its topmost adapter (which is
        trained).
        """
        return only(self.model, *selection_of(self.model).names[:-1])

    def groups(self, examples: Sequence[BranchedRow]) -> list[list[int]]:
        """Batches of example indices of at most `tokens` tokens, sorted by shared prefix or by
        length.
        """
        batches, unshared = list[list[int]](), list[int]()
        for first in range(0, len(examples), WINDOW):
            window = range(first, min(first + WINDOW, len(examples)))
            some = [examples[i] for i in window]
            if self.shares_across_rows(some):
                prompt, size = lambda i: examples[i].shared, lambda i: self.size(examples[i])
                batches += map(list, batches_by_prefix(window, 1, self.tokens, prompt, size))
            else:
                unshared += window
        sizes = {i: self.size(examples[i]) for i in unshared}
        return batches + similar_lengths(unshared, sizes.__getitem__, self.tokens)
