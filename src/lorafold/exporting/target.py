"""What an export target has: what it can represent, how it is written, which engine verifies it.

    dW = up @ down     up (*matrices, out, r) with every scale in it, down (*matrices, r, in)

Every method whose change is a product has its factors exactly; several adapters add their ranks. Of
other methods the update is cut to the best of a rank (Eckart and Young 1936), if one is given.
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
from lorafold.core.attach import adapted_modules
from lorafold.core.delta import Delta, on_meta
from lorafold.core.layer import BaseLayer
from lorafold.errors import NotMergeable
from lorafold.fold.as_trained import attach_round_trip
from lorafold.fold.plan import deltas_of
from lorafold.inspecting.updates import (
    Factors,
    SiteFactors,
    Svd,
    matrix_names,
    of_dense,
    of_factors,
    stacked,
    unstacked,
)
from lorafold.layers import layer_of
from lorafold.merging.merge_target import Into
from lorafold.methods.parts.trainable_tokens import TokenRows
from lorafold.models.tokenizer import read_tokenizer, tokenizer_of
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base

GATE_UP, DOWN = "gate_up_proj", "down_proj"
INTERLEAVED = frozenset({"gpt_oss"})  # families in whose rows gates and ups take turns


@dataclass(frozen=True)
class Update:
    """The change of the adapters: `factors` of each matrix by module path; the method of each
    update that is no product (`dense`); other changes, such as biases and tokens (`other`); and
    the squared norms of what a cut lost and of the whole update, by matrix (`lost`).
    """

    factors: SiteFactors
    dense: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a site."""
        return max((down.shape[-2] for _, down in self.factors.values()), default=0)

    @property
    def error(self) -> float:
        """The norm of what was lost relative to that of the updates that were cut."""
        lost, whole = (sum(column) for column in zip(*self.lost.values(), strict=True))
        return math.sqrt(lost / whole) if whole else 0.0


@torch.no_grad()
def update_of(model: nn.Module, names: Sequence[str], rank: int | None = None) -> Update:
    """What the named adapters change, lowest first; the model stays as it is."""
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
        elif pair := _product(deltas):
            factors[path] = pair
        else:
            parts = [p for delta in deltas for p in delta.parts() if p.factors() is None]
            dense[path] = ", ".join(sorted({type(part).__name__ for part in parts}))
    return Update(factors, dense, other, lost)


def _other_change(layer: BaseLayer, deltas: Sequence[Delta]) -> str:
    """What the deltas change that is no matrix of the layer's shape, or nothing."""
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


def _product(deltas: Sequence[Delta]) -> Factors | None:
    """The factors of all deltas together, or None if one has none."""
    pairs = [pair for delta in deltas if (pair := delta.factors()) is not None]
    if len(pairs) < len(deltas):
        return None
    ups, downs = zip(*pairs, strict=True)
    return torch.cat(ups, -1).float(), torch.cat(downs, -2).float()


def _svds(layer: BaseLayer, deltas: Sequence[Delta]) -> Iterator[Svd]:
    """The SVD of what the deltas add to each matrix of the layer."""
    if pair := _product(deltas):
        return map(of_factors, *map(unstacked, pair))
    w, b = layer.dense()
    changed = w.float()
    for delta in deltas:
        changed, b = delta.fold(changed, b)
    return map(of_dense, unstacked(changed - w.float()))


def split_experts(kind: str, name: str, factors: Factors) -> Iterator[tuple[str, Factors]]:
    """Yield the name and the factors of each matrix that a parameter of experts is."""
    up, down = factors
    if name != GATE_UP:
        yield name, factors
        return
    gate, other = (up[:, ::2], up[:, 1::2]) if kind in INTERLEAVED else up.chunk(2, 1)
    yield "gate_proj", (gate, down)
    yield "up_proj", (other, down.clone())  # safetensors writes no tensor twice


OUT = "{out}"  # stands for the directory of the export
CONTENT = "$(cat "  # begins a word that is the content of a file, whose path follows
LITERAL = re.compile(r'"\{out\}([^"]*)"')

Word = str | Callable[[str], str]  # or what makes it from the directory
Line = str | tuple[Word, ...]  # text, Python or words of a command
FULL = "full_attention"
Progress = Callable[[int, int], None]  # done, of
ORIGINAL = Into("original", None)


def placed(line: Line, out: str) -> str:
    """A line with the directory in it, quoted for a shell, or in a Python string."""
    if isinstance(line, tuple):
        return " ".join(_word(word, out) for word in line)
    return LITERAL.sub(lambda match: json.dumps(out + match[1], ensure_ascii=False), line)


def _word(word: Word, out: str) -> str:
    if callable(word):
        return quote(word(out))
    if word.startswith(CONTENT):
        return f'"$(cat {quote(word.removeprefix(CONTENT).replace(OUT, out))})"'
    return quote(word.replace(OUT, out))


def window_notes(engine: str, config: Any) -> tuple[str, ...]:
    """What an engine that has no windows computes otherwise than the model, if it does."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return ()
    if getattr(config, "use_sliding_window", True) is False:
        return ()
    return (
        f"{engine} attends to all positions, where the model attends to the last {window:,} alone:"
        " longer texts than that are read in another way",
    )


def period_of(kinds: Sequence[str]) -> int | None:
    """Every how many layers one attends to all positions; None if they aren't regular."""
    if FULL not in kinds:
        return None
    period = kinds.index(FULL) + 1
    regular = [(n + 1) % period == 0 for n in range(len(kinds))]
    return period if regular == [kind == FULL for kind in kinds] else None


@dataclass(frozen=True)
class Subject:
    """A base with adapters, lowest first, or the base alone. `tensors` is the type that was asked
    for, `original` the adapters if `adapters` is a cut of them, `into` the weights the files
    are for.
    """

    base: Base
    adapters: tuple[SavedAdapter, ...]
    tensors: str | None = None
    original: tuple[SavedAdapter, ...] = ()
    into: Into = ORIGINAL

    @property
    def stored(self) -> str:
        """The storage of the weights that the files are for."""
        return str(self.into.trained_on) if self.into.target == "trained" else "fp32"

    @property
    def called(self) -> str | None:
        """The name of the last adapter's directory; None without adapters."""
        adapters = self.original or self.adapters
        return adapters[-1].path.resolve().name if adapters else None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Those of the adapters on `model`."""
        return tuple(f"exported{n}" for n, _ in enumerate(self.adapters))

    @cached_property
    def model(self) -> nn.Module:
        """The base on its files with the adapters, above the round trip if merged into q(W)."""
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
        paths = [saved.path for saved in self.original or self.adapters if saved.own_tokenizer]
        source = self.base.source
        return tokenizer_of(source, paths) if paths else read_tokenizer(source)


@dataclass(frozen=True)
class Written:
    """The files, the most important first; `launch`, lines that use them; notes; and what the
    engine's job needs, with paths as {out}/NAME.
    """

    files: Sequence[str]
    launch: Sequence[Line]
    notes: Sequence[str] = ()
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
        """Why the target can't represent the subject, a line each; may raise LorafoldError."""

    @abstractmethod
    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        """Write the files into the directory, which appears when all are there."""

    def proving(self, subject: Subject, scratch: Path, progress: Progress) -> Mapping[str, Any]:
        """What the engine's job needs besides, made for the proof alone."""
        return {}

    def further_jobs(self, subject: Subject) -> Mapping[str, Mapping[str, Any]]:
        """Changes of the job for further runs, whose figures are reported and reject nothing."""
        return {}

    def read_back(self, subject: Subject, directory: Path) -> str:
        """Read the files as the engine's loader would, which itself does not run here, and say what
        that showed; nothing where it was not done.
        """
        return ""


def only_products(update: Update, name: str) -> list[str]:
    """Why a form that has nothing but factors of matrices can't say this update, a line each."""
    reasons = [f"{p}: {kind}, which {name} can't represent" for p, kind in update.other.items()]
    if not (reasons or update.factors or update.dense):
        return ["found no adapter that changes anything, expected one"]
    methods: dict[str, list[str]] = {}
    for path, method in update.dense.items():
        methods.setdefault(method, []).append(path)
    return reasons + [
        f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)}: {method} is no product of"
        f" factors, all that {name} has"
        for method, paths in methods.items()
    ]
