"""A base model: which files it is read from, and how; and what it is with its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafold.data.control_tokens import allow
from lorafold.data.templates import day_of
from lorafold.errors import LorafoldError, listed, shortened
from lorafold.files.contents import of_file
from lorafold.identity import COMPUTED_WITH, TRAINING, of_code, of_model
from lorafold.models.classifier import outputs_of_model
from lorafold.models.loading import default_storage, load_model, weights_of
from lorafold.models.quantizations import (
    MADE,
    PLAIN,
    STORAGES,
    Storage,
    check_storage,
    choose_storage,
)
from lorafold.models.sources import ModelSource, configuration, resolve_model
from lorafold.models.tokenizer import BUILT_IN, read_tokenizer, set_template, tokenizer_of
from lorafold.peft.provenance import OwnBase
from lorafold.peft.saved import Saved, trained_on
from lorafold.peft.tokens import all_of
from lorafold.runtime.devices import choose_device, native_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.models.checkpoint import MappedModel
    from lorafold.models.weights import Weights

LANGUAGE_MODEL, REWARD_MODEL = "a language model", "a reward model"


@dataclass(frozen=True)
class Base:
    """A model as it was asked for. It is found when it is first needed, once; then the files that
    were found are what counts, and a name that leads elsewhere later does not matter.

    model: A name or path as `resolve_model` takes it, or what was found for one.
    storage: How it stores its weights, as `choose_storage` takes it; auto until it is settled.
    device: As asked; None is the fastest there is.
    revision: The branch, tag or commit of a hub model.
    trust_remote_code: Its own Python files run.
    allow_other_base: Adapters that were trained on another base are loaded all the same.
    dtype: What it computes in, bf16 or fp32; None is what its storage and the device choose.
    where: The device that was chosen.
    """

    model: str | Path | ModelSource = "smollm2"
    storage: str = "auto"
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_other_base: bool = False
    dtype: str | None = None
    where: torch.device = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise LorafoldError for what is no name, and for a storage or a device that there is not,
        used or not.
        """
        if not isinstance(self.model, (str, Path, ModelSource)):
            found = shortened(repr(self.model), 80)
            raise LorafoldError(f"model: found {found}, expected a name or a path")
        check_storage(self.storage)
        object.__setattr__(self, "where", choose_device(self.device))

    @cached_property
    def source(self) -> ModelSource:
        """Its files. Raises LorafoldError as `resolve_model`."""
        asked = self.storage == "fp32"
        return resolve_model(self.model, self.revision, self.trust_remote_code, asked)

    @property
    def name(self) -> str:
        """The name that was asked for."""
        return self.model.name if isinstance(self.model, ModelSource) else str(self.model)

    @cached_property
    def held(self) -> Storage:
        """The storage on the device, with the reason for it."""
        found = choose_storage(self.storage, self.where)
        if self.dtype is None:
            return found
        name = f"{found.quantization}, computed in " if found.quantization else ""
        dtype = getattr(torch, STORAGES[self.dtype].dtype)
        return found._replace(dtype=dtype, why=f"{name}{self.dtype}: as in training")

    @cached_property
    def identity(self) -> str:
        """The SHA-256 over all of its files that can change an answer, in hexadecimal."""
        return of_model(self.source)

    def cache_key(self, template: str | None, *packages: str) -> dict[str, Any]:
        """What figures of runs over this model depend on besides recipe and rows: its identity and
        that of a recipe's chat template, how and where it is loaded, and the code of training and
        of these packages.
        """
        file = None if template is None or template in BUILT_IN else of_file(Path(template))[1]
        return {
            "files": self.identity,
            "device": self.where.type,
            "storage": [self.held.name, str(self.held.dtype)],
            "chat_template": file,
            "code": of_code(*TRAINING, *packages, packages=COMPUTED_WITH),
        }

    def date(self, template: str | None, saved: Sequence[Saved] = ()) -> str:
        """Today's date if a recipe's chat template, or the one of the model and the adapters that
        are loaded on it, writes it, so that figures are cached for one day; else empty.
        """
        tokenizer = self.tokenizer(saved)
        if template is not None:
            set_template(tokenizer, template)
        return day_of(tokenizer)

    def stored(self, storage: str) -> Base:
        """The same model in a storage that was chosen."""
        return replace(self, model=self.source, storage=storage)

    def stored_as_trained(self, adapters: Sequence[Saved | OwnBase] = ()) -> Base:
        """The same model, if its storage is auto, in that of its files or in the one that the
        adapters were trained on, computing in the dtype that they were trained in. Where the device
        does not multiply bf16 natively, an adapter that was trained in bf16 is computed in fp32.
        """
        if self.storage != "auto":
            return self
        if (in_files := default_storage(self.source)) != "auto":
            return self.stored(in_files)
        own, made_on = self.with_files_for(adapters), trained_on(adapters)
        if made_on is None:
            return own.stored(in_files)
        storage = made_on.storage if made_on.storage in (*MADE, *PLAIN) else in_files
        dtype = made_on.dtype if made_on.dtype in PLAIN else None
        if dtype == "bf16" and not native_bf16(self.where)[0]:
            storage, dtype = "auto" if storage in PLAIN else storage, None
        return replace(own.stored(storage), dtype=dtype)

    def with_files_for(self, adapters: Sequence[Saved | OwnBase]) -> Base:
        """The same model; where it is a quantized GGUF file and the adapters were trained on it in
        fp32, with what bf16 would round.
        """
        made_on = trained_on(adapters) if self.storage == "auto" else None
        if made_on is None or made_on.storage != "fp32" or self.source.gguf is None:
            return self
        return replace(self, storage="fp32")

    def config(self) -> PreTrainedConfig:
        """The configuration, which is read by the name where the files were not found yet."""
        if isinstance(self.model, ModelSource):
            return configuration(str(self.model.path), None, self.trust_remote_code)
        return configuration(str(self.model), self.revision, self.trust_remote_code)

    def load(self) -> PreTrainedModel:
        """A language model, in evaluation mode, whose weights are rounded to its storage whatever
        it computes in. Raises LorafoldError as `load_model`.
        """
        if self.storage in PLAIN and self.dtype not in (None, self.storage):
            rounded = choose_storage(self.storage, self.where)
            return load_model(self.source, rounded, self.where).float()
        return load_model(self.source, self.held, self.where)

    def tokenizer(self, adapters: Sequence[Saved] = ()) -> PreTrainedTokenizerBase:
        """The tokenizer of the last adapter that has one, or the model's. Contents may have tokens
        that the adapters trained.
        """
        own = [one.path for one in adapters if one.own_tokenizer]
        tokenizer = tokenizer_of(self.source, own) if own else read_tokenizer(self.source)
        trained = {i for one in adapters for i in all_of(one.selection.tokens)}
        if trained:
            allow(tokenizer, map(str, tokenizer.convert_ids_to_tokens(sorted(trained))))
        return tokenizer

    def mapped(self) -> MappedModel:
        """The model on its files, of which a weight is read when it is used."""
        from lorafold.models.checkpoint import mapped_model_of

        return mapped_model_of(self.source)

    def in_files(self) -> Weights | None:
        """Its weights as the files have them, of which nothing is read yet, before it is loaded;
        None if they are quantized there.
        """
        from lorafold.models.checkpoint import original_weights

        quantized = self.source.config().get("quantization_config")
        return None if quantized else original_weights(self.source)

    def weights(self) -> Weights | None:
        """The original weights, if those in memory are quantized and the files have others."""
        return weights_of(self.source, self.held) if self.held.quantization else None


def known_classes(base: Base, adapters: Sequence[Saved]) -> tuple[str, ...] | None:
    """The classes of the adapters, or else of the model, or None if neither has classes.

    Raises LorafoldError if the adapters' classes differ.
    """
    found = {str(one): classes for one in adapters if (classes := one.classes)}
    if len(set(found.values())) > 1:
        raise LorafoldError(
            "adapters: expected the same classes in all of them, found "
            + "; ".join(f"{', '.join(classes)} in {name}" for name, classes in found.items())
        )
    if found:
        return next(iter(found.values()))
    outputs = outputs_of_model(base.source)
    return outputs if outputs and len(outputs) > 1 else None


def kind_of(base: Base, adapters: Sequence[Saved]) -> str:
    """In words: a language model, a reward model, or a classifier of its classes. Raises
    LorafoldError as `known_classes` does.
    """
    if classes := known_classes(base, adapters):
        return f"a classifier of {listed(classes, room=60)}"
    scores = any(one.scores for one in adapters) or len(outputs_of_model(base.source) or ()) == 1
    return REWARD_MODEL if scores else LANGUAGE_MODEL


def check_language_model(base: Base, adapters: Sequence[Saved], advice: str = "") -> None:
    """Raise LorafoldError unless the adapters are those of a language model.

    Args:
        advice: What to do instead, for the message.
    """
    if (kind := kind_of(base, adapters)) != LANGUAGE_MODEL:
        raise LorafoldError(
            f"{listed(adapters)}: found {kind}, expected an adapter of a language"
            f" model{advice}"
        )
