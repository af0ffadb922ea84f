"""Objectives of preferences: the log-probabilities of completions, and a law over them.

The reference never changes, so its log-probabilities are computed once and cached under the
identity of the examples, the model's files, its tensors except the trained adapter's, and the code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
import torch
from torch import nn

from lorafold.core.attach import adapted_modules, selection_of
from lorafold.data.arrow import Array
from lorafold.data.batches import Feed, StoredFeed
from lorafold.data.branches import Branched, BranchedExamples, PreferredData
from lorafold.evaluation import Measured
from lorafold.evaluation.preferences import preference_figures
from lorafold.identity import COMPUTED_WITH, TRAINING, of_code
from lorafold.objectives.comparing import Comparing
from lorafold.step.preferences import Preferences
from lorafold.step.replicated import Replicated

if TYPE_CHECKING:
    from rich.console import Console

FILE = "reference.npy"


class Referenced(Sequence[Branched]):
    """Examples with the log-probabilities of their completions under the reference, (n, k)."""

    def __init__(self, examples: Sequence[Branched], logps: Array) -> None:
        self.examples, self.logps = examples, logps

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Branched: ...
    @overload
    def __getitem__(self, index: slice) -> list[Branched]: ...
    def __getitem__(self, index: int | slice) -> Branched | list[Branched]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return replace(self.examples[index], reference=tuple(self.logps[index].tolist()))


def referenced(
    loss: Preferences,
    examples: BranchedExamples,
    below: Sequence[str],
    console: Console,
    layout: Replicated,
) -> Referenced:
    """The examples with their references, from the cache, or computed and added to it.

    Args:
        loss: Has the model, whose highest adapter is as it was before training.
        below: What else the model without its highest adapter depends on: files and storage.
        console: For progress, and for where they are from.
        layout: Of the model.
    """
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

    def notice(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    code = of_code(*TRAINING, packages=COMPUTED_WITH)
    made = [*below, digest(loss.model), examples.digest]
    key = json.dumps([code, made, loss.shares, loss.how is not None and loss.how.across])
    path = layout.cached("reference", key, write, notice) / FILE
    notice(f"reference: log-probabilities of {len(examples)} examples, {source}")
    return Referenced(examples, np.load(path))


def digest(model: nn.Module) -> str:
    """The SHA-256 of every tensor of a model but those of its highest adapter, unless these are the
    model's own.
    """
    name = selection_of(model).names[-1]
    above = [] if moves(model) else adapted_modules(model)
    own = {
        id(tensor)
        for _, module in above
        if name in module.deltas
        for tensor in chain(module.deltas[name].parameters(), module.deltas[name].buffers())
    }
    found = sha256()
    for path, tensor in chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) not in own:
            found.update(f"{path} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            # a copy, since one that is divided is whole for operations and not for numpy
            content = tensor.detach().to("cpu", copy=True).contiguous().flatten()
            found.update(content.view(torch.uint8).numpy().data)
    return found.hexdigest()


def moves(model: nn.Module) -> bool:
    """Whether the highest adapter trains the model's own weights, so that what is below it is the
    reference before the first step only.
    """
    names = selection_of(model).names
    return any(
        part.in_place
        for _, module in adapted_modules(model)
        if names and names[-1] in module.deltas
        for part in module.deltas[names[-1]].parts()  # type: ignore[operator]
    )


@dataclass(frozen=True)
class Preference(Comparing):
    """Preferring completions to others, by a law; the reference is the model without the adapter
    that trains.
    """

    def refer(
        self, loss: Preferences, feed: Feed, held_out: Any, below: Sequence[str], console: Console,
        layout: Replicated,
    ) -> tuple[Feed, Any]:
        if not self.law.has_reference:
            return feed, held_out
        if isinstance(feed, StoredFeed) and (moves(loss.model) or feed.passes >= 1):
            refer = partial(referenced, loss, below=below, console=console, layout=layout)
            feed = feed.with_examples(refer)
        else:
            console.print("reference: log-probabilities are computed in each step", highlight=False)
        if moves(loss.model) and isinstance(held_out, PreferredData):
            own = cast(BranchedExamples, held_out.examples)
            known = referenced(loss, own, below, console, layout)
            held_out = replace(held_out, examples=known)
        return feed, held_out

    def measure(self, loss: Preferences, held_out: Any) -> Measured:
        reference = self.law.has_reference and not moves(loss.model)
        found = preference_figures(loss, held_out.examples, reference)
        return Measured(found.preference_loss, found.as_json(), f", {found}")
