"""The interface of export targets, and the update that they write.

    dW = up @ down     up (*matrices, out, r) with every scale in it, down (*matrices, r, in)

Low-rank updates have exact factors; the factors of several adapters are concatenated, so their
ranks add up. Other updates are truncated to the best approximation of a rank (Eckart and Young
1936), if a rank is given.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lorafold.adapter import load
from lorafold.core.anatomy import grouped
from lorafold.core.attach import adapted_modules
from lorafold.core.delta import Delta, on_meta
from lorafold.core.layer import BaseLayer
from lorafold.errors import NotMergeable
from lorafold.fold.plan import deltas_of
from lorafold.fold.quantization_round_trip import attach_round_trip
from lorafold.inspecting.updates import (
    Factors,
    SiteFactors,
    Svd,
    matrix_names,
    stacked,
    svd_of_dense,
    svd_of_factors,
    unstacked,
)
from lorafold.layers import layer_of
from lorafold.merging.merge_target import MergeTarget
from lorafold.methods.common.trainable_tokens import TokenRows
from lorafold.models.tokenizer import read_tokenizer, tokenizer_of
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base

GATE_UP, DOWN = "gate_up_proj", "down_proj"
INTERLEAVED = frozenset({"gpt_oss"})  # families with interleaved rows of gate and up


@dataclass(frozen=True)
class Update:
    """The update of one or more adapters, by module path.

    factors: The factors of low-rank updates.
    dense: The methods of updates that are not low-rank.
    other: Descriptions of changes that are not matrices, such as biases and rows of tokens.
    lost: By matrix, the squared norms of the truncated part and of the whole update.
    """

    factors: SiteFactors
    dense: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return max((down.shape[-2] for _, down in self.factors.values()), default=0)

    @property
    def error(self) -> float:
        lost, whole = (sum(column) for column in zip(*self.lost.values(), strict=True))
        return math.sqrt(lost / whole) if whole else 0.0


@torch.no_grad()
def update_of(model: nn.Module, names: Sequence[str], rank: int | None = None) -> Update:
    """The update of the named adapters, given lowest first, truncated to `rank` if that is set. The
    model is not changed.
    """
    factors = {}
    dense, other = dict[str, str](), dict[str, str]()
    lost = {}
    for path, module in adapted_modules(model):
        deltas = [*deltas_of(module, names)]
        if not deltas:
            continue
        layer = layer_of(module)
        if reason := _other_change(layer, deltas):
            other[path] = reason
        elif rank is not None:
            cut = []
            matrices = matrix_names(path, layer.matrices)
            for name, svd in zip(matrices, _svds(layer, deltas), strict=True):
                squares = svd.s.double().square()
                lost[name] = float(squares[rank:].sum()), float(squares.sum())
                cut.append(svd.factors(rank))
            factors[path] = stacked(cut, layer.matrices)
        elif pair := _stacked_factors(deltas):
            factors[path] = pair
        else:
            parts = [p for delta in deltas for p in delta.parts() if p.factors() is None]
            dense[path] = ", ".join(sorted({type(p).__name__.removesuffix("Delta") for p in parts}))
    return Update(factors, dense, other, lost)


def _other_change(layer: BaseLayer, deltas: Sequence[Delta]) -> str:
    """A description of a change that is not a matrix of the layer's shape, or ""."""
    try:
        w, b = layer.dense_like()
        changed, bias = w, b
        for delta in deltas:
            changed, bias = on_meta(delta).fold(changed, bias)
    except NotMergeable as e:
        return str(e)
    if changed.shape != w.shape:
        return f"{changed.shape[0] - w.shape[0]:,} new rows"
    parts = [part for delta in deltas for part in delta.parts()]
    if rows := {i for part in parts if isinstance(part, TokenRows) for i in part.ids}:
        return f"{len(rows):,} rows of tokens"
    if bias is not b:
        return "a bias"
    return "" if w.dim() > 1 else "a vector"


def _stacked_factors(deltas: Sequence[Delta]) -> Factors | None:
    pairs = [pair for delta in deltas if (pair := delta.factors()) is not None]
    if len(pairs) < len(deltas):
        return None
    ups, downs = zip(*pairs, strict=True)
    return torch.cat(ups, -1).float(), torch.cat(downs, -2).float()


def _svds(layer: BaseLayer, deltas: Sequence[Delta]) -> Iterator[Svd]:
    if pair := _stacked_factors(deltas):
        return map(svd_of_factors, *map(unstacked, pair))
    w, b = layer.dense()
    changed = w.float()
    for delta in deltas:
        changed, b = delta.fold(changed, b)
    return map(svd_of_dense, unstacked(changed - w.float()))


def split_experts(kind: str, name: str, factors: Factors) -> Iterator[tuple[str, Factors]]:
    up, down = factors
    if name != GATE_UP:
        yield name, factors
        return
    gate, other = (up[:, ::2], up[:, 1::2]) if kind in INTERLEAVED else up.chunk(2, 1)
    yield "gate_proj", (gate, down)
    yield "up_proj", (other, down.clone())  # safetensors rejects shared tensors


OUT = "{out}"  # placeholder for the export's directory
FILE_CONTENT = "$(cat "  # prefix of a word that is a file's content; the path follows
LITERAL = re.compile(r'"\{out\}([^"]*)"')

Word = str | Callable[[str], str]  # or a function of the directory
Line = str | tuple[Word, ...]  # text, Python code, or the words of a command
FULL_ATTENTION = "full_attention"
Progress = Callable[[int, int], None]  # done, of
Job = Mapping[str, Any]  # the input of an engine's program
ORIGINAL = MergeTarget("original", None)


def show_line(line: Line, out: str) -> str:
    """A line with the directory inserted, quoted for a shell or as a Python string."""
    if isinstance(line, tuple):
        return " ".join(_quote_word(word, out) for word in line)
    return LITERAL.sub(lambda match: json.dumps(out + match[1], ensure_ascii=False), line)


def _quote_word(word: Word, out: str) -> str:
    if callable(word):
        return quote(word(out))
    if word.startswith(FILE_CONTENT):
        return f'"$(cat {quote(word.removeprefix(FILE_CONTENT).replace(OUT, out))})"'
    return quote(word.replace(OUT, out))


def window_notes(engine: str, config: Any) -> tuple[str, ...]:
    window = getattr(config, "sliding_window", None)
    unused = getattr(config, "use_sliding_window", True) is False
    if unused or window is None or window >= config.max_position_embeddings:
        return ()
    return (
        f"{engine} attends to all positions, but the model only to the last {window:,}; outputs"
        " for longer texts differ",
    )


def full_attention_period(kinds: Sequence[str]) -> int | None:
    """The period n if exactly every nth layer attends to all positions; None if there is none."""
    if FULL_ATTENTION not in kinds:
        return None
    period = kinds.index(FULL_ATTENTION) + 1
    regular = [(n + 1) % period == 0 for n in range(len(kinds))]
    return period if regular == [kind == FULL_ATTENTION for kind in kinds] else None


@dataclass(frozen=True)
class Subject:
    """A base with adapters, lowest first, or the base alone. `tensors` is the requested tensor
    type, `original` the adapters before a truncation, `into` the weights that the adapters are
    merged into or used with.
    """

    base: Base
    adapters: tuple[SavedAdapter, ...]
    tensors: str | None = None
    original: tuple[SavedAdapter, ...] = ()
    into: MergeTarget = ORIGINAL

    @property
    def training_storage(self) -> str:
        return str(self.into.trained_on) if self.into.target == "trained" else "fp32"

    @property
    def adapter_name(self) -> str | None:
        adapters = self.original or self.adapters
        return adapters[-1].path.resolve().name if adapters else None

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"exported{n}" for n, _ in enumerate(self.adapters))

    @cached_property
    def model(self) -> nn.Module:
        """The memory-mapped base with the adapters. If they are merged into quantized weights q(W),
        the base passes through the quantization round trip first.
        """
        model, other = self.base.mapped().model, self.base.allow_other_base
        if self.into.round_trip is not None:
            attach_round_trip(model, self.into.round_trip)
        for name, saved in zip(self.names, self.adapters, strict=True):
            load(model, saved, name, allow_other_base=other)
        return model

    @cached_property
    def update(self) -> Update:
        return update_of(self.model, self.names)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return self.base.config()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        paths = [saved.path for saved in self.original or self.adapters if saved.own_tokenizer]
        source = self.base.source
        return tokenizer_of(source, paths) if paths else read_tokenizer(source)


@dataclass(frozen=True)
class ExportedFiles:
    """The written files, most important first; commands or code that use them (`launch`); notes;
    and the inputs of the engine's job, with paths as {out}/NAME.
    """

    files: Sequence[str]
    launch: Sequence[Line]
    notes: Sequence[str] = ()
    job: Job = field(default_factory=dict)


class Target(ABC):
    """A file format of an engine.

    name: The value of --to.
    engine: The program of `engines` that verifies the files, or None.
    server: The program that sends requests to a running server, or None.
    tensors: The supported tensor types, the default first.
    merged: Whether adapters are merged into the model.
    tolerance: By tensor type, the share of KL(adapted, base) that may be lost if it is not 1%; None
        if the share is only reported.
    """

    name: ClassVar[str]
    engine: ClassVar[str | None] = None
    server: ClassVar[str | None] = None
    tensors: ClassVar[tuple[str, ...]] = ()
    merged: ClassVar[bool] = False
    tolerance: ClassVar[Mapping[str, float | None]] = {}

    @abstractmethod
    def problems(self, subject: Subject) -> Sequence[str]:
        """The reasons why the target can't represent the subject; empty if it can."""

    @abstractmethod
    def write(self, subject: Subject, directory: Path, progress: Progress) -> ExportedFiles:
        """Writes the files into a directory that appears when it is complete."""

    def proof_job(self, subject: Subject, scratch: Path, progress: Progress) -> Job:
        """Creates additional inputs of the engine's job that only the verification needs."""
        return {}

    def further_jobs(self, subject: Subject) -> Mapping[str, Job]:
        """Changes to the job for additional runs by name; their results are only reported."""
        return {}

    def read_back(self, subject: Subject, directory: Path) -> str:
        """Reads the files as the engine's loader would, for engines that can't run here. Returns
        the result in words, or "" if files are not read back.
        """
        return ""


def lora_problems(update: Update, name: str) -> list[str]:
    reasons = [f"{p}: {kind}, which {name} can't represent" for p, kind in update.other.items()]
    if not (reasons or update.factors or update.dense):
        return ["the adapters change no weight"]
    methods = grouped((method, path) for path, method in update.dense.items())
    return reasons + [
        f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)}: {method} is not a"
        f" product of two factors, the only form that {name} can store"
        for method, paths in methods.items()
    ]
