"""Preference objectives, on pairs or single judged completions.

The reference never changes, so a run of one or more epochs caches its log-probabilities. The cache
key contains the digests of the examples, the model's files, the tensors below the trained adapter,
and the code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import nn

from lorafold.core.attach import adapted_modules, selection_of
from lorafold.data.arrow import Array, Items
from lorafold.data.batches import BatchFeed, StoredFeed
from lorafold.data.examples import WHOLE, preview
from lorafold.data.formats import PAIRS
from lorafold.data.preference_examples import (
    BranchedExamples,
    BranchedRow,
    PreferenceEncoder,
    preference_data,
)
from lorafold.data.render import Rendering
from lorafold.data.row_store import Rows
from lorafold.data.tokenizing import Encoded, Encoder
from lorafold.evaluation import Measured
from lorafold.evaluation.preference_metrics import preference_figures
from lorafold.files.terminal import print_lines
from lorafold.identity import COMPUTED_WITH, TRAINING, of_code
from lorafold.objectives import Declared
from lorafold.objectives.algorithm_options import algorithm_class, preference_algorithm
from lorafold.objectives.objective import Objective, ObjectiveRequest, Packing
from lorafold.training_step import preference_algorithms
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.preference_algorithms import Law
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "reference.npy"


@dataclass(frozen=True)
class PreferenceObjective(Objective):
    """Base class of objectives on preferences."""

    algorithm: Law

    @classmethod
    def of(cls, request: ObjectiveRequest) -> Self:
        return cls(preference_algorithm(request.name, request.beta, request.options))

    @classmethod
    def options(cls, declared: Declared) -> Mapping[str, Any]:
        algorithm = algorithm_class(declared, preference_algorithms)
        return {field.name: field.default for field in fields(algorithm)}

    def encoder(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE) -> Encoder:
        return PreferenceEncoder(tokenizer, self.algorithm.kind, rendering)

    def data(self, table: pa.Table, rows: Rows, max_length: int) -> Encoded:
        return preference_data(table, rows, max_length, self.algorithm.kind)

    def trained(self, example: BranchedRow) -> BranchedRow:
        return example.some(slice(self.algorithm.trained))

    def preview(self, example: BranchedRow, tokenizer: PreTrainedTokenizerBase) -> Text:
        from rich.text import Text

        label = "desirable" if example.desirable else "undesirable"
        names = ("chosen", "rejected") if self.algorithm.kind == PAIRS else (label, "mismatched")
        documents = zip(names, example.documents(), strict=True)
        parts = [Text(f"{name}:\n").append(preview(one, tokenizer)) for name, one in documents]
        return Text("\n").join(parts)

    @contextmanager
    def loss(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packing: Packing,
        console: Console,
    ) -> Iterator[Preferences]:
        across = packing == "auto"
        with sharing_prefixes(model, across=across) if packing else nullcontext() as support:
            if support is not None and (not support.shares or support.max_tokens):
                longer = f" in rows of more than {support.max_tokens} tokens" * support.shares
                line = "packing: this model can't share a prompt among completions"
                print_lines(console, line + longer, detail=True)
            yield Preferences(model, self.algorithm, support, self.padding(tokenizer))

    def padding(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The id of the padding token, which the attention mask hides."""
        return tokenizer.pad_token_id or 0


class ReferencedExamples(Items[BranchedRow]):
    """Examples with the reference log-probabilities of their completions, (n, k)."""

    def __init__(self, examples: Sequence[BranchedRow], logps: Array) -> None:
        self.examples, self.logps = examples, logps

    def __len__(self) -> int:
        return len(self.examples)

    def item(self, index: int) -> BranchedRow:
        return replace(self.examples[index], reference=tuple(self.logps[index].tolist()))


def with_reference(
    loss: Preferences,
    examples: BranchedExamples,
    below: Sequence[str],
    console: Console,
    layout: Replicated,
) -> ReferencedExamples:
    """The examples with their reference log-probabilities, which are cached."""
    from rich.progress import Progress

    source, start = "read from the cache", time.perf_counter()

    def write(directory: Path) -> None:
        nonlocal source
        table = np.zeros((len(examples), len(examples[0].branches)), np.float32)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("reference", total=len(examples))
            for index, logps in loss.references(examples):
                table[index] = logps
                bar.advance(task)
        np.save(directory / FILE, table)
        source = f"computed in {time.perf_counter() - start:.1f} s"

    notice = partial(print_lines, console)
    code = of_code(*TRAINING, packages=COMPUTED_WITH)
    inputs = [*below, digest(loss.model), examples.digest]
    support = loss.support and [loss.support.shares, loss.support.across]
    path = layout.cached("reference", json.dumps([code, inputs, support]), write, notice) / FILE
    notice(f"reference: log-probabilities of {len(examples)} examples, {source}")
    return ReferencedExamples(examples, np.load(path))


def digest(model: nn.Module) -> str:
    """The SHA-256 of all tensors of a model except its topmost adapter's, unless that adapter
    trains the base weights.
    """
    name = selection_of(model).names[-1]
    above = [] if trains_base_weights(model) else adapted_modules(model)
    adapter = {
        id(tensor)
        for _, module in above
        if name in module.deltas
        for tensor in chain(module.deltas[name].parameters(), module.deltas[name].buffers())
    }
    sha = sha256()
    for path, tensor in chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) not in adapter:
            sha.update(f"{path} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            # a copy, because operations gather a sharded tensor, but numpy does not
            content = tensor.detach().to("cpu", copy=True).contiguous().flatten()
            sha.update(content.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def trains_base_weights(model: nn.Module) -> bool:
    """Whether the topmost adapter trains the base weights. Then, the model without this adapter is
    the reference only before the first step.
    """
    names = selection_of(model).names
    return any(
        part.in_place
        for _, module in adapted_modules(model)
        if names and names[-1] in module.deltas
        for part in module.deltas[names[-1]].parts()  # type: ignore[operator]
    )


@dataclass(frozen=True)
class Preference(PreferenceObjective):
    """Preference learning. The reference is the model without the trained adapter."""

    def refer(
        self, loss: Preferences, feed: BatchFeed, held_out: Any, below: Sequence[str],
        console: Console, layout: Replicated,
    ) -> tuple[BatchFeed, Any]:
        if not self.algorithm.has_reference:
            return feed, held_out
        if isinstance(feed, StoredFeed) and (
            trains_base_weights(loss.model) or feed.num_epochs >= 1
        ):
            refer = partial(with_reference, loss, below=below, console=console, layout=layout)
            feed = feed.with_examples(refer)
        else:
            print_lines(console, "reference: log-probabilities are computed in each step")
        if trains_base_weights(loss.model) and isinstance(held_out, Encoded):
            examples = cast(BranchedExamples, held_out.examples)
            known = with_reference(loss, examples, below, console, layout)
            held_out = replace(held_out, examples=known)
        return feed, held_out

    def measure(self, loss: Preferences, held_out: Any) -> Measured:
        reference = self.algorithm.has_reference and not trains_base_weights(loss.model)
        figures = preference_figures(loss, held_out.examples, reference)
        return Measured(figures.preference_loss, figures.as_json(), f", {figures}")
