"""What every target has: what it can say, how it is written, which engine proves it."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from lorafold.adapter import load
from lorafold.exporting.update import Update, update_of
from lorafold.fold.as_trained import attach_round_trip
from lorafold.merging.into import Into
from lorafold.models.tokenizer import tokenizer_of
from lorafold.opening import Base
from lorafold.peft.saved import Saved

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

OUT = "{out}"  # stands for the directory of the export
CONTENT = "$(cat "  # begins a word that is the content of a file, whose path follows
LITERAL = re.compile(r'"\{out\}([^"]*)"')

Word = str | Callable[[str], str]  # or what makes it from the directory
Line = str | tuple[Word, ...]  # text, Python or words of a command
FULL = "full_attention"
Progress = Callable[[int, int], None]  # done, of
ORIGINAL = Into("original", None)


def placed(line: Line, out: str) -> str:
    """A line with the directory in it. Words are quoted as a shell wants them; in text, the path
    may be in a Python string alone.
    """
    if isinstance(line, tuple):
        return " ".join(_word(word, out) for word in line)
    return LITERAL.sub(lambda found: json.dumps(out + found[1], ensure_ascii=False), line)


def _word(word: Word, out: str) -> str:
    if callable(word):
        return quote(word(out))
    if word.startswith(CONTENT):
        return f'"$(cat {quote(word.removeprefix(CONTENT).replace(OUT, out))})"'
    return quote(word.replace(OUT, out))


def window_of(config: Any) -> int | None:
    """How many positions some layers attend to alone, or None where all attend to all."""
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return window


def told(engine: str, config: Any) -> tuple[str, ...]:
    """What an engine that has no windows computes otherwise than the model, if it does."""
    window = window_of(config)
    if window is None:
        return ()
    return (
        f"{engine} attends to all positions, where the model attends to the last {window:,} alone:"
        " longer texts than that are read in another way",
    )


def period_of(kinds: Sequence[str]) -> int | None:
    """Every how many layers one attends to all positions, and the others to a window; None where
    they do not lie so.

    Args:
        kinds: of the layers, as `layer_types` has them.
    """
    if FULL not in kinds:
        return None
    period = kinds.index(FULL) + 1
    regular = [(n + 1) % period == 0 for n in range(len(kinds))]
    return period if regular == [kind == FULL for kind in kinds] else None


@dataclass(frozen=True)
class Subject:
    """What is exported: a base with adapters, lowest first, or the base alone.

    tensors: the type of the tensors that was asked for, in the target's words; None is its own.
    given: what people gave, where `adapters` is a cut of it: names and tokenizers are its own.
    into: the weights that the files are for, trained or original, and how training stored them.
    """

    base: Base
    adapters: tuple[Saved, ...]
    tensors: str | None = None
    given: tuple[Saved, ...] = ()
    into: Into = ORIGINAL

    @property
    def stored(self) -> str:
        """The storage of the weights that the files are for."""
        return str(self.into.trained_on) if self.into.target == "trained" else "fp32"

    @property
    def called(self) -> str | None:
        """The name of the last adapter's directory; None without adapters."""
        found = self.given or self.adapters
        return found[-1].path.resolve().name if found else None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Those of the adapters on `model`."""
        return tuple(f"exported{n}" for n, _ in enumerate(self.adapters))

    @cached_property
    def model(self) -> nn.Module:
        """The base on its files, with the adapters attached, above the round trip of the weights
        that they were trained on where they are merged into these.
        """
        model, other = self.base.mapped().model, self.base.allow_other_base
        if self.into.round_trip is not None:
            attach_round_trip(model, self.into.round_trip)
        for name, saved in zip(self.names, self.adapters, strict=True):
            load(model, saved, name, allow_other_base=other)
        return model

    @cached_property
    def update(self) -> Update:
        """What the adapters change."""
        return update_of(self.model, self.names)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The base's configuration."""
        return self.base.config()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the last adapter that has one, or the base's."""
        own = [one.path for one in self.given or self.adapters if one.own_tokenizer]
        return tokenizer_of(self.base.source, own)


@dataclass(frozen=True)
class Written:
    """What a target wrote.

    Attributes:
        files: their names in the directory, the most important first.
        launch: how one uses them, a line each, as `launching` has them.
        notes: what was adapted to say it there, a sentence each.
        job: what the engine's process needs beside prompts (`engines/`), paths in the directory as
            {out}/NAME.
    """

    files: tuple[str, ...]
    launch: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    job: Mapping[str, Any] = field(default_factory=dict)


class Target(ABC):
    """Abstract: a form of files that an engine reads.

    name: as --to has it.
    engine: the process of `engines` that proves it, or None if none can.
    server: that which asks a running server, where there is one.
    tensors: the types that its tensors may have, the usual one first.
    merged: whether adapters go in folded.
    tolerance: the share of KL(adapted, base) that the proof may have by the type of the tensors,
        where that is another than 1%; None for a type whose share is only told.
    """

    name: ClassVar[str]
    engine: ClassVar[str | None] = None
    server: ClassVar[str | None] = None
    tensors: ClassVar[tuple[str, ...]] = ()
    merged: ClassVar[bool] = False
    tolerance: ClassVar[Mapping[str, float | None]] = {}

    @abstractmethod
    def problems(self, subject: Subject) -> Sequence[str]:
        """Why the target can't say the subject, a line each; asked before anything is written."""

    @abstractmethod
    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        """Write the files into the directory, which appears when all are there."""

    def proving(self, subject: Subject, scratch: Path, progress: Progress) -> Mapping[str, Any]:
        """What the engine's job needs besides, made for the proof alone.

        Args:
            scratch: a directory, there or not, which is removed after the proof.
        """
        return {}

    def beside(self, subject: Subject) -> Mapping[str, Mapping[str, Any]]:
        """What of the job is another where the engine is asked once more, for figures that are told
        and refuse nothing: by what they are of.
        """
        return {}

    def read_back(self, subject: Subject, directory: Path) -> str:
        """Read the files as the engine's loader would, which itself does not run here, and say what
        that showed; nothing where it was not done. Raises LorafoldError if they say another thing.
        """
        return ""


def only_products(update: Update, name: str) -> list[str]:
    """Why a form that has nothing but factors of matrices can't say this update, a line each.

    Args:
        name: of the form.
    """
    found = [f"{path}: {what}, which {name} can't say" for path, what in update.beside.items()]
    if not (found or update.factors or update.dense):
        return ["found no adapter that changes anything, expected one"]
    methods: dict[str, list[str]] = {}
    for path, method in update.dense.items():
        methods.setdefault(method, []).append(path)
    return found + [
        f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)}: {method} is no product of"
        f" factors, all that {name} has"
        for method, paths in methods.items()
    ]
