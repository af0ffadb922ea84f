"""The inputs of a fragility study, and its tuning runs by rank, learning rate, seed and number of
examples. The last adapter of a stack is the alignment.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from lorafold.composing.updates import short_names
from lorafold.data.json_input import Row
from lorafold.data.prompts import questions_in
from lorafold.data.row_store import Rows, SourcePart
from lorafold.errors import LorafoldError, join_problems, listed
from lorafold.files.claims import digest_of
from lorafold.fragility_study.defences import DEFENCES
from lorafold.identity import of_adapter
from lorafold.methods.lora import LoRA
from lorafold.objectives import DEFAULT
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base

MAX_HELD_OUT_ROWS = 32  # benign rows for the held-out loss, at most
FIELDS_OF_RUNS = ("rank", "lr", "lr_b", "seed", "method")  # fields of the recipe that a run sets
RECIPE = Recipe(epochs=5, batch=4)
# the packages whose code the figures depend on
CODE_PACKAGES = ("composing", "fragility_study", "inspecting")


@dataclass(frozen=True)
class AdapterStack:
    adapters: tuple[SavedAdapter, ...]
    name: str

    @cached_property
    def identity(self) -> list[str]:
        return [*map(of_adapter, self.adapters)]


def stacks_of(*adapters: Sequence[SavedAdapter]) -> tuple[AdapterStack, ...]:
    """Stacks named after their adapters' directories; the empty stack is called "base"."""
    short = iter(short_names([one.path for stack in adapters for one in stack]))
    return tuple(
        AdapterStack(tuple(stack), " + ".join(next(short) for _ in stack) or "base")
        for stack in adapters
    )


def _shuffled(seed: str, numbers: Sequence[int]) -> list[int]:
    return random.Random(seed).sample(numbers, len(numbers))


def _selected(rows: Rows, numbers: Sequence[int]) -> Rows:
    return rows.select(np.sort(np.array(numbers, np.int64)))


@dataclass(frozen=True)
class FragilityTask:
    base: Base
    stacks: tuple[AdapterStack, ...]
    refuse: Sequence[Row]
    controls: Sequence[Row]
    rows: Rows
    source: str  # of the benign rows, for the record
    refusal_prefixes: tuple[str, ...]
    compliance_prefixes: tuple[str, ...]
    examples: tuple[int, ...]
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    defences: tuple[str, ...]
    mix: Rows | None = None
    recipe: Recipe = field(default_factory=lambda: RECIPE)
    max_new_tokens: int = 32

    @cached_property
    def cache_key(self) -> dict[str, Any]:
        return self.base.cache_key(self.recipe.chat_template, *CODE_PACKAGES)

    @cached_property
    def day(self) -> str:
        """The date for chat templates that print it, fixed for the whole study; "" if none does."""
        templates = {None, self.recipe.chat_template}  # of measurements and of training
        inputs = product(templates, (stack.adapters for stack in self.stacks))
        return next(filter(None, (self.base.date(*one) for one in inputs)), "")

    @property
    def probe_identity(self) -> list[Any]:
        """All inputs of the metrics except the adapters."""
        prompts = [Rows.of(list(rows)).sha256 for rows in (self.refuse, self.controls)]
        held_out = Rows.of(list(self.held_out)).sha256 if self.rows else ""
        beginnings = [self.refusal_prefixes, self.compliance_prefixes, self.max_new_tokens]
        recipe = self.recipe.model_dump(mode="json")
        return [self.cache_key, self.day, recipe, *prompts, held_out, *beginnings]

    @cached_property
    def _row_order(self) -> list[int]:
        return _shuffled("held out", range(len(self.rows)))

    @property
    def held_out(self) -> Rows:
        """The benign rows that no run trains on, at most MAX_HELD_OUT_ROWS."""
        n = min(MAX_HELD_OUT_ROWS, len(self.rows) - max(self.examples, default=0))
        return _selected(self.rows, self._row_order[:n])

    def benign_rows(self, examples: int, seed: int) -> Rows:
        """The first rows in the seed's order, so that a large run contains a smaller run's rows."""
        rest = self._row_order[len(self.held_out) :]
        return _selected(self.rows, _shuffled(f"{seed}/benign", rest)[:examples])

    def runs(self, stack: AdapterStack) -> Iterator[TuningRun]:
        """Yields all tuning runs on a stack, first without mixed refusals, then with them."""
        kinds = [kind for kind in (False, True) if any(self.defences_with(kind))]
        grid = product(kinds, self.ranks, self.rates, self.seeds, self.examples)
        yield from (TuningRun(self, stack, *values) for values in grid)

    def defences_with(self, mixed: bool) -> list[str]:
        return [name for name in self.defences if DEFENCES[name].mixed is mixed]


@dataclass(frozen=True)
class TuningRun:
    task: FragilityTask
    stack: AdapterStack
    mixed: bool
    rank: int
    lr: float
    seed: int
    examples: int

    def __str__(self) -> str:
        mixed = " and refusals" * self.mixed
        return (
            f"rank {self.rank}, rate {self.lr:g}, seed {self.seed}, {self.examples} examples{mixed}"
        )

    @cached_property
    def rows(self) -> Rows:
        """The training rows; mixed runs add as many refusals as benign examples, if possible."""
        benign, mix = self.task.benign_rows(self.examples, self.seed), self.task.mix
        if not self.mixed or mix is None:
            return benign
        refusals = _selected(mix, _shuffled(f"{self.seed}/mix", range(len(mix)))[: self.examples])
        return Rows([*benign, *refusals], (SourcePart(len(benign)), SourcePart(len(refusals))))

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run. Mixed refusals make batches larger but don't add steps, so that
        runs with and without them differ in nothing else.
        """
        recipe, benign = self.task.recipe, self.examples
        batch = min(recipe.batch, benign)
        accumulate = recipe.accumulate if batch == recipe.batch else 1
        changes = {
            "rank": self.rank,
            "lr": self.lr,
            "lr_b": self.lr * LoRA.lr_b / LoRA.lr,
            "seed": self.seed,
            "batch": batch,
            "accumulate": accumulate,
        }
        # short runs are cheaper to repeat than to save
        steps = changes["save_every"] = recipe.model_copy(update=changes).total_steps(benign)
        if self.mixed:
            batch = round(batch * len(self.rows) / benign)
            accumulate = accumulate if batch % accumulate == 0 else 1
            changes |= {"steps": steps, "batch": batch, "accumulate": accumulate}
        return recipe.model_copy(update=changes)

    @cached_property
    def name(self) -> str:
        """The name of the run's files, with a digest of all inputs of the tuning."""
        task, recipe = self.task, self.recipe.model_dump(mode="json")
        inputs = [task.cache_key, task.day, self.stack.identity, self.rows.identity, recipe]
        kind = "mixed-" if self.mixed else ""
        return f"{kind}r{self.rank}-lr{self.lr:g}-s{self.seed}-k{self.examples}-{digest_of(inputs)}"


def check(task: FragilityTask) -> None:
    prefixes = {"refusal": task.refusal_prefixes, "compliance": task.compliance_prefixes}
    problems = [
        f"--{kind}-prefix: found none, expected at least one"
        for kind, texts in prefixes.items()
        if not texts
    ]
    problems += [*_prefix_problems(task), *_leaked_prompts(task)]
    for option, values in {"examples": task.examples, "rank": task.ranks, "lr": task.rates}.items():
        if wrong := [f"{v:g}" for v in values if v <= 0]:
            problems.append(f"--{option}: found {', '.join(wrong)}, expected numbers above 0")
    if task.examples and max(task.examples) > len(task.rows):
        problems.append(
            f"{task.source}: found {len(task.rows)} rows, expected at least the"
            f" {max(task.examples)} of --examples"
        )
    problems += [
        f"--defence: found {name}, expected one of {', '.join(DEFENCES)}"
        for name in task.defences
        if name not in DEFENCES
    ]
    known = [name for name in task.defences if name in DEFENCES]
    if (changing := [n for n in known if DEFENCES[n].transform_update]) and not all(
        stack.adapters for stack in task.stacks
    ):
        problems.append(f"--defence {changing[0]}: needs --adapter; the last one is the alignment")
    if (mixed := [n for n in known if DEFENCES[n].mixed]) and task.mix is None:
        problems.append(f"--defence {mixed[0]}: needs --mix, rows with refusals")
    if reserved := [name for name in FIELDS_OF_RUNS if name in task.recipe.model_fields_set]:
        problems.append(
            f"recipe: found {', '.join(reserved)}, expected none of them: the tuning uses LoRA"
            " with --rank, --lr and --seeds"
        )
    names, recipe = ("streaming", "new_tokens", "join"), task.recipe
    others = [name for name in names if getattr(recipe, name) != getattr(RECIPE, name)]
    if others or recipe.objective != DEFAULT:
        problems.append(
            f"recipe: found {', '.join(others) or recipe.objective}, expected the objective"
            f" {DEFAULT} without streaming, new_tokens and join"
        )
    if problems:
        raise LorafoldError(join_problems(problems))


def _prefix_problems(task: FragilityTask) -> Iterator[str]:
    """A prefix must not begin with another prefix, because the longer prefix would count twice."""
    prefixes = [("refusal-prefix", text) for text in task.refusal_prefixes]
    prefixes += [("compliance-prefix", text) for text in task.compliance_prefixes]
    for option, text in prefixes:
        if not text.strip():
            yield f"--{option}: found {text!r}, expected text"
    for i, (option, text) in enumerate(prefixes):
        for j, (_, other) in enumerate(prefixes):
            if i != j and text.strip() and other.startswith(text) and (text != other or i < j):
                yield f"--{option} {text!r}: a prefix of {other!r}; remove one of the two"


def _leaked_prompts(task: FragilityTask) -> Iterator[str]:
    measured = {
        prompt: f"row {number} of --{option}"
        for option, rows in (("controls", task.controls), ("refuse", task.refuse))
        for number, row in enumerate(rows, 1)
        for prompt in questions_in(row)[-1:]
    }
    for name, rows in (("--mix", task.mix or ()), (task.source, task.rows)):
        if repeated := [
            f"row {number} has the same prompt as {measured[prompt]}"
            for number, row in enumerate(rows, 1)
            for prompt in questions_in(row)
            if prompt in measured
        ]:
            yield (
                f"{name}: {listed(repeated, '; ')}; remove these rows, because"
                " prompts that are measured must not be trained on"
            )
