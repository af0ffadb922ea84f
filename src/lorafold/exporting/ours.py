"""What lorafold itself computes in fp32, which an engine's answers are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.exporting.answers import GREEDY, Answers, Prompts, answers, last, prompts_of
from lorafold.exporting.target import Progress, Subject
from lorafold.exporting.ties import exchanged
from lorafold.generation import end_tokens
from lorafold.merging.run import adapted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answered(subject: Subject, storage: str, source: str | Path | None) -> Tensor:
    """The log-probabilities (prompts, vocabulary) after each prompt of what is exported, over
    another storage of its base, computed in fp32.
    """
    model = adapted(subject.base, subject.adapters, storage)
    return torch.stack([last(model, ids) for ids in prompts_of(subject.tokenizer, source).ids])


@dataclass(frozen=True)
class Ours:
    """A loaded model with active adapters, its prompts, and its answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    answers: Answers

    @classmethod
    def of(cls, subject: Subject, source: str | Path | None, progress: Progress) -> Ours:
        """Load what is exported, over the weights that its files are for, and ask it.

        Args:
            source: a file of rows with prompts; None takes the built-in ones.
        """
        tokenizer = subject.tokenizer
        prompts = prompts_of(tokenizer, source)
        model = adapted(subject.base, subject.adapters, subject.stored)
        return cls(model, tokenizer, prompts, answers(model, tokenizer, prompts, progress))

    def first(self, n: int) -> Ours:
        """The same of the first n prompts."""
        asked = self.prompts
        prompts = Prompts(asked.texts[:n], asked.ids[:n], asked.chats[:n])
        found = self.answers
        few = Answers(found.adapted[:n], found.base[:n], found.greedy[:n])
        return replace(self, prompts=prompts, answers=few)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a completion."""
        return end_tokens(self.model, self.tokenizer)

    def job(self, own: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        """The job of an engine's program.

        Args:
            own: what the target's engine needs, {out} for the directory.
            directory: where the files are for now.
        """
        placed = {
            key: value.replace("{out}", str(directory)) if isinstance(value, str) else value
            for key, value in own.items()
        }
        asked = {"ids": self.prompts.ids, "texts": self.prompts.texts, "greedy": GREEDY,
                 "chats": self.prompts.chats}  # fmt: skip
        return {**asked, "ends": sorted(self.ends), **placed}

    def exchanged(self, prompt: int) -> Iterator[Tensor]:
        """Yield answers (vocabulary,) with two close experts exchanged (`ties.exchanged`)."""
        return exchanged(self.model, self.prompts.ids[prompt])

    def margin(self, prompt: int, at: int) -> float:
        """The difference of the two largest log-probabilities after so many greedy tokens."""
        ids = [*self.prompts.ids[prompt], *self.answers.greedy[prompt][:at]]
        first, second = last(self.model, ids).topk(2).values
        return float(first - second)
