"""A stack on a loaded model, on which states are measured one after the other.

    bench.before()              the stack itself
    bench.after(path, name)     with a tuning over it, under a defence
    bench.alone(path, instead)  with a finished adapter over it, or in its place
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorafold.adapter import Adapter, load
from lorafold.core.attach import only, selection_of
from lorafold.data.examples import NO_LOSS, encode
from lorafold.data.prompts import prompts_of
from lorafold.data.templates import on_day
from lorafold.errors import LorafoldError
from lorafold.inspecting.updates import of_factors
from lorafold.peft.saved import Saved
from lorafold.training.request import rendering_of
from lorafold.undoing.defences import DEFENCES, laid
from lorafold.undoing.measure import Probe, State, completed, distributions, measure, probe_of
from lorafold.undoing.subspaces import Updates, overlap, updates_of
from lorafold.undoing.task import Stack, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TUNED = "tuned"
KEPT = 1e9  # bytes of distributions
Opened = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]
Opening = Callable[[Sequence[Saved]], Opened]  # loads the model with these adapters over it


class Bench:
    """A stack on its model. Raises LorafoldError for an adapter that does not fit."""

    def __init__(self, task: Task, stack: Stack, opening: Opening) -> None:
        self.task, self.stack = task, stack
        self.model, tokenizer = opening(stack.adapters)
        self.tokenizer = on_day(tokenizer, task.day)
        self.names = selection_of(self.model).names
        self._tuning: tuple[Path, Updates | None] | None = None

    @cached_property
    def probe(self) -> Probe:
        """What is asked; the completions of the controls are the stack's."""
        task = self.task
        held_out = task.held_out if len(task.rows) else []
        rendering, length = rendering_of(task.recipe), task.recipe.max_length
        benign = (
            encode(held_out, self.tokenizer, length, None, rendering).examples
            if len(held_out)
            else ()
        )
        refuse, controls = (
            prompts_of(rows, self.tokenizer, name)
            for rows, name in ((task.refuse, "refuse"), (task.controls, "controls"))
        )
        with only(self.model, *self.names):  # whatever lies over the stack meanwhile
            asked = completed(controls, self.model, self.tokenizer, task.max_new_tokens)
        return probe_of(
            refuse, asked, task.refusal, task.compliance, self.tokenizer, benign
        )

    @cached_property
    def alignment(self) -> Updates | None:
        """The update of the stack's last adapter; None without one, or if it has no subspace."""
        if not self.stack.adapters:
            return None
        with only(self.model, *self.names[:-1]):
            adapter = self._load(self.stack.adapters[-1], "alignment")
        found = updates_of(adapter)
        adapter.detach()
        return found

    def check(self) -> None:
        """Raises LorafoldError for a defence that the alignment is not fit for."""
        needing = [name for name in self.task.defences if DEFENCES[name].lay]
        if needing and self.alignment is None:
            raise LorafoldError(
                f"{self.stack.adapters[-1]}: found a change that is not added to a weight, expected"
                f" an update that has a subspace, for --defence {', '.join(needing)}"
            )

    @cached_property
    def _weights(self) -> Any:
        return self.task.base.weights()

    def before(self) -> dict[str, Any]:
        """The figures of the stack itself under `before`, and under `without` those of the model
        without the alignment; None if there is none.
        """
        without, found = self.names[:-1], {"before": asdict(self._measured()), "without": None}
        if self.names:
            with only(self.model, *without):
                found["without"] = asdict(self._measured())
        return found

    def _measured(self) -> State:
        return measure(self.model, self.tokenizer, self.probe, self._before or self._anew())

    @cached_property
    def _before(self) -> list[Tensor] | None:
        """The stack's distributions on the controls, (n, vocabulary) each, if there is room."""
        labels = sum(label != NO_LOSS for one in self.probe.controls for label in one.labels)
        small = 4 * labels * self.model.get_output_embeddings().weight.shape[0] <= KEPT
        return list(self._anew()) if small else None

    def _anew(self) -> Iterator[Tensor]:
        found = distributions(self.model, self.probe.controls)
        while True:
            with only(self.model, *self.names):
                one = next(found, None)
            if one is None:
                return
            yield one

    def _load(self, saved: Path | Saved, name: str) -> Adapter:
        allowed = self.task.base.allow_other_base
        return load(self.model, saved, name, base=self._weights, allow_other_base=allowed)

    def after(self, path: Path, defence: str) -> dict[str, Any]:
        """The figures of a tuning over the stack, under a defence, by their names in the JSON.

        Args:
            path: The tuning's adapter.
            defence: A name in DEFENCES.
        """
        lay = DEFENCES[defence].lay
        if lay is None:
            adapter = self._load(path, TUNED)
            found = self._figures(self._updates(adapter, path))
            adapter.detach()
            return found
        tuning, alignment = self.tuning(path), self.alignment
        assert tuning is not None  # a run trains LoRA
        assert alignment is not None  # checked
        factors = lay(tuning, alignment)
        with laid(self.model, factors):
            return self._figures({at: of_factors(*pair) for at, pair in factors.items()})

    def alone(self, path: Path, instead: bool) -> dict[str, Any]:
        """The figures of a finished adapter over the stack, by their names in the JSON.

        Args:
            path: Its directory.
            instead: In the place of the stack, and not over it; it then has no overlap.
        """
        with only(self.model, *(() if instead else self.names)):
            adapter = self._load(path, TUNED)
            found = self._figures(None if instead else updates_of(adapter))
            adapter.detach()
        return found

    def tuning(self, path: Path) -> Updates | None:
        """The update of a saved adapter; the last one is kept for its next defence."""
        if self._tuning is None or self._tuning[0] != path:
            adapter = self._load(path, TUNED)
            self._updates(adapter, path)
            adapter.detach()
        assert self._tuning is not None
        return self._tuning[1]

    def _updates(self, adapter: Adapter, path: Path) -> Updates | None:
        self._tuning = path, updates_of(adapter)
        return self._tuning[1]

    def _figures(self, tuning: Updates | None) -> dict[str, Any]:
        """The figures of what is active, and where the tuning lies."""
        found = asdict(self._measured())
        lies = tuning and self.alignment and overlap(tuning, self.alignment)
        return found | {"overlap": asdict(lies) if lies else None}
