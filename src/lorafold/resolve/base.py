"""A base model with its loading options, and the search for the base model of saved adapters.

`base_for` tries the base model's name in the adapter as a path and as a Hub ID in the Hub cache.
Then it compares the adapter's fingerprint with the models near the adapter and in the Hub cache. If
it finds no model there either, it downloads the model by its Hub ID.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafold.data.chat_template import date_used
from lorafold.data.control_tokens import allow_tokens
from lorafold.errors import LorafoldError, listed, truncate_middle
from lorafold.files.contents import file_digest
from lorafold.files.model_card import EMBEDDED
from lorafold.files.terminal import print_lines
from lorafold.identity import COMPUTED_WITH, TRAINING, of_code, of_model
from lorafold.models import fingerprint
from lorafold.models.classifier import classifier_outputs
from lorafold.models.loading import default_storage, load_model, unquantized_weights
from lorafold.models.quantizations import (
    ON_LOAD,
    STORAGES,
    UNQUANTIZED,
    Storage,
    check_storage,
    choose_storage,
)
from lorafold.models.sources import HUB_ID, ModelSource, gguf_at, read_configuration, resolve_model
from lorafold.models.tokenizer import BUILT_IN, read_tokenizer, set_template, tokenizer_of
from lorafold.models.weights import FileWeights, Weights, model_files
from lorafold.peft.adapter_directory import SavedAdapter, training_storage_of
from lorafold.peft.provenance import ALLOW_OPTION, RecordedBase
from lorafold.runtime.devices import choose_device, native_bf16

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.models.checkpoint import MappedModel

LANGUAGE_MODEL, REWARD_MODEL = "a language model", "a reward model"


@dataclass(frozen=True)
class Base:
    """A base model and its loading options. Its files are located when they are first needed.

    model: A name or path for `resolve_model`, or its result.
    storage: The quantization or dtype, as for `choose_storage`; auto until one is chosen.
    device: The requested device; None is the fastest device available.
    revision: The branch, tag or commit of a Hub model.
    trust_remote_code: Run Python code that comes with the model.
    allow_other_base: Accept adapters that were trained on another base model.
    dtype: The compute dtype, bf16 or fp32; None chooses it by `storage` and device.
    loaded: The model itself, if the caller loaded it; `model` is its name.
    words: The tokenizer to use instead of the model's.
    where: The chosen device.
    """

    model: str | Path | ModelSource = "smollm2"
    storage: str = "auto"
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_other_base: bool = False
    dtype: str | None = None
    loaded: PreTrainedModel | None = field(default=None, repr=False)
    words: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)
    where: torch.device = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, Path, ModelSource)):
            shown = truncate_middle(repr(self.model), 80)
            raise LorafoldError(f"model: found {shown}, expected a name or a path")
        check_storage(self.storage)
        object.__setattr__(self, "where", choose_device(self.device))

    @cached_property
    def source(self) -> ModelSource:
        fp32 = self.storage == "fp32"
        return resolve_model(self.model, self.revision, self.trust_remote_code, fp32)

    @property
    def name(self) -> str:
        return self.model.name if isinstance(self.model, ModelSource) else str(self.model)

    @cached_property
    def loaded_as(self) -> Storage:
        storage = choose_storage(self.storage, self.where)
        if self.dtype is None:
            return storage
        name = f"{storage.quantization}, computed in " if storage.quantization else ""
        dtype = getattr(torch, STORAGES[self.dtype].dtype)
        why = "as in training" if self.loaded is None else "as loaded"
        return storage._replace(dtype=dtype, reason=f"{name}{self.dtype}: {why}")

    @cached_property
    def identity(self) -> str:
        """The SHA-256, in hexadecimal, of all files that can affect the model's outputs, or of a
        loaded model's fingerprint.
        """
        if self.loaded is None:
            return of_model(self.source)
        return sha256(json.dumps(fingerprint.of_model(self.loaded)).encode()).hexdigest()

    def cache_key(self, template: str | None, *packages: str) -> dict[str, Any]:
        """The cache key of a run's results, to which the caller adds recipe and rows. `packages`
        are further lorafold packages whose code the results depend on.
        """
        file = None if template is None or template in BUILT_IN else file_digest(Path(template))[1]
        return {
            "files": self.identity,
            "device": self.where.type,
            "storage": [self.loaded_as.name, str(self.loaded_as.dtype)],
            "chat_template": file,
            "code": of_code(*TRAINING, *packages, packages=COMPUTED_WITH),
        }

    def date(self, template: str | None, saved: Sequence[SavedAdapter] = ()) -> str:
        """Today's date if the chat template uses it, so that results are cached for one day only;
        else an empty string.
        """
        tokenizer = self.tokenizer(saved)
        if template is not None:
            set_template(tokenizer, template)
        return date_used(tokenizer)

    def stored(self, storage: str) -> Base:
        model = self.source if self.loaded is None else self.model
        return replace(self, model=model, storage=storage)

    def stored_as_trained(self, adapters: Sequence[SavedAdapter | RecordedBase] = ()) -> Base:
        """The same model; if its storage is auto, with the quantization of its files, or else with
        the quantization and dtype of the adapters' training (without bf16 if the device has no
        native bf16).
        """
        if self.storage != "auto":
            return self
        if (in_files := default_storage(self.source)) != "auto":
            return self.stored(in_files)
        own, made_on = self.with_files_for(adapters), training_storage_of(adapters)
        if made_on is None:
            return own.stored(in_files)
        storage = made_on.storage if made_on.storage in (*ON_LOAD, *UNQUANTIZED) else in_files
        dtype = made_on.dtype if made_on.dtype in UNQUANTIZED else None
        if dtype == "bf16" and not native_bf16(self.where)[0]:
            storage, dtype = "auto" if storage in UNQUANTIZED else storage, None
        return replace(own.stored(storage), dtype=dtype)

    def with_files_for(self, adapters: Sequence[SavedAdapter | RecordedBase]) -> Base:
        """The same model. A quantized GGUF file is dequantized to fp32 if the adapters were trained
        in fp32, because bf16 would round its values.
        """
        made_on = training_storage_of(adapters) if self.storage == "auto" else None
        if made_on is None or made_on.storage != "fp32" or self.source.gguf is None:
            return self
        return replace(self, storage="fp32")

    def config(self) -> PreTrainedConfig:
        """The configuration. It is read by name if the model's files are not located yet."""
        if self.loaded is not None:
            return self.loaded.config
        if isinstance(self.model, ModelSource):
            return read_configuration(str(self.model.path), None, self.trust_remote_code)
        return read_configuration(str(self.model), self.revision, self.trust_remote_code)

    def load(self) -> PreTrainedModel:
        """A language model in evaluation mode. Its weights are rounded to its storage dtype even if
        the compute dtype differs.
        """
        if self.loaded is not None:
            # a copy that shares the tensors, so that the caller's model stays as it is
            tensors = chain(self.loaded.parameters(), self.loaded.buffers())
            own = {id(t): nn.Parameter(t.detach()) if t.requires_grad else t for t in tensors}
            return deepcopy(self.loaded, own).eval()
        if self.storage in UNQUANTIZED and self.dtype not in (None, self.storage):
            rounded = choose_storage(self.storage, self.where)
            return load_model(self.source, rounded, self.where).float()
        return load_model(self.source, self.loaded_as, self.where)

    def tokenizer(self, adapters: Sequence[SavedAdapter] = ()) -> PreTrainedTokenizerBase:
        """The tokenizer of the last adapter that has one, or else the model's. It reads control
        tokens in text as tokens if the adapters trained them.
        """
        own = [one.path for one in adapters if one.own_tokenizer]
        if self.words is not None:
            return deepcopy(self.words)
        tokenizer = tokenizer_of(self.source, own) if own else read_tokenizer(self.source)
        ids = (one.selection.tokens for one in adapters)
        trained = {
            i for some in ids for i in (some if isinstance(some, tuple) else chain(*some.values()))
        }
        if trained:
            allow_tokens(tokenizer, map(str, tokenizer.convert_ids_to_tokens(sorted(trained))))
        return tokenizer

    def mapped(self) -> MappedModel:
        from lorafold.models.checkpoint import mapped_model_of

        return mapped_model_of(self.source)

    def in_files(self) -> Weights | None:
        """The weights in the model's files, read on access, or None if they are quantized or the
        model is loaded.
        """
        from lorafold.models.checkpoint import original_weights

        quantized = self.loaded is not None or self.source.config().get("quantization_config")
        return None if quantized else original_weights(self.source)

    def weights(self) -> Weights | None:
        """The original weights from the files if the model is quantized on load, else None."""
        return (
            unquantized_weights(self.source, self.loaded_as)
            if self.loaded_as.quantization and self.loaded is None
            else None
        )


def known_classes(base: Base, adapters: Sequence[SavedAdapter]) -> tuple[str, ...] | None:
    """The classes of a classifier, from the adapters or else from the model; None for others."""
    by_adapter = {str(one): classes for one in adapters if (classes := one.classes)}
    if len(set(by_adapter.values())) > 1:
        raise LorafoldError(
            "adapters: expected the same classes in all of them, found "
            + "; ".join(f"{', '.join(classes)} in {name}" for name, classes in by_adapter.items())
        )
    if by_adapter:
        return next(iter(by_adapter.values()))
    outputs = classifier_outputs(base.source)
    return outputs if outputs and len(outputs) > 1 else None


def model_kind(base: Base, adapters: Sequence[SavedAdapter]) -> str:
    """The kind of model, for messages: language model, reward model, or classifier with classes."""
    if classes := known_classes(base, adapters):
        return f"a classifier of {listed(classes, max_chars=60)}"
    rewards = any(one.is_reward_model for one in adapters)
    rewards = rewards or len(classifier_outputs(base.source) or ()) == 1
    return REWARD_MODEL if rewards else LANGUAGE_MODEL


def check_language_model(base: Base, adapters: Sequence[SavedAdapter], advice: str = "") -> None:
    if (kind := model_kind(base, adapters)) != LANGUAGE_MODEL:
        raise LorafoldError(
            f"{listed(adapters)}: found {kind}, expected an adapter of a language"
            f" model{advice}"
        )


HUB_PREFIX = "models--"  # prefix of a model's directory in the Hub cache
LIMIT = 44  # characters of a name or path, so that messages stay below 300


def base_for(
    model: str | Path | ModelSource | None,
    adapters: Sequence[SavedAdapter | RecordedBase],
    console: Console | None = None,
    **how: Any,
) -> Base:
    """The base model `model`, or else the adapters' base model, or else the embedded model."""
    own = [one.own_base if isinstance(one, SavedAdapter) else one for one in adapters]
    if model is None and own:
        base, line = _find_base(_common_base(own), how)
    else:
        base, line = Base(**how) if model is None else Base(model, **how), ""
        if other := {one.name for one in own if not one.fingerprint} - {"", base.name}:
            named = f"adapter_config.json names {listed(sorted(other))}"
            line = f"{base.name}; {named} (no fingerprint to compare)"
    print_lines(console, f"base: {line}" * bool(line))
    return base


def _common_base(own: Sequence[RecordedBase]) -> RecordedBase:
    """The common base model of all adapters, from a record with a fingerprint if there is one. An
    adapter that records neither a name nor a fingerprint of its base is compatible with every base
    model.
    """
    known = sorted((one for one in own if one.known), key=lambda one: not one.fingerprint)
    if not known:
        raise LorafoldError(
            f"{truncate_middle(str(own[0].adapter), LIMIT)}: its adapter_config.json has no"
            " base_model_name_or_path; pass --model PATH (in Python: model)"
        )
    first = known[0]
    if other := next((one for one in known if not first.same_as(one)), None):
        one, another = (
            f"{truncate_middle(str(each.adapter), LIMIT)} on {truncate_middle(_name(each), LIMIT)}"
            for each in (first, other)
        )
        raise LorafoldError(
            f"adapters of different bases: {one}, and {another}; use adapters of one base, or pass"
            f" --model (model) and {ALLOW_OPTION}"
        )
    return first


def _name(own: RecordedBase) -> str:
    return own.name or "a base without a name"


def _find_base(own: RecordedBase, how: dict[str, Any]) -> tuple[Base, str]:
    def line(path: str, found_by: str = "") -> str:
        if path == own.name:
            return f"{path}, from {own.named_in}"
        return f"{path}{found_by}; {own.named_in} names {_name(own)}"

    if own.name == EMBEDDED:
        return Base(**how), line(EMBEDDED)
    named = [*_paths_by_name(own)]
    for path in named:
        if gguf_at(path) or not own.fingerprint or fits(path, own):
            return Base(str(path), **how), line(str(path))
    by_hub = bool(HUB_ID.fullmatch(own.name)) and not Path(own.name).exists()
    revision = how.get("revision") or (own.revision if by_hub else None)
    of_hub = Base(own.name, **{**how, "revision": revision}) if by_hub else None
    if of_hub:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(own.name, "config.json", revision=revision)
        known = isinstance(cached, str) and (revision or not own.fingerprint)
        if known or (isinstance(cached, str) and fits(Path(cached).parent, own)):
            return of_hub, line(own.name)
    if own.fingerprint and not how.get("revision"):
        for path, name in _nearby_models(own):
            if fits(path, own):
                trusted = bool(how.get("trust_remote_code"))
                source = ModelSource(path, name, trust_remote_code=trusted)
                return Base(source, **how), line(name, ", found by its fingerprint")
    if named:  # its weights differ, which is an error when the adapters are loaded
        return Base(str(named[0]), **how), line(str(named[0]))
    paths = (own.adapter, own.name or "(no name)", own.adapter.absolute().parent, hub_cache())
    adapter, name, directory, cache = (truncate_middle(str(p), LIMIT) for p in paths)
    missing = (
        f"{adapter}: its base {name} was found neither at its path, next to the adapter in"
        f" {directory}, nor in {cache}; pass --model PATH (in Python: model)"
    )
    if of_hub is None:
        raise LorafoldError(missing)
    try:
        return replace(of_hub, model=of_hub.source), line(own.name)
    except LorafoldError as error:
        reason = truncate_middle(str(error).rpartition(" the hub: ")[2].partition(";")[0], 60)
        raise LorafoldError(f"{missing}; downloading it from the hub failed: {reason}") from error


def hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def fits(path: Path, own: RecordedBase) -> bool:
    """Whether the model in a directory has the fingerprint of an adapter's base model."""
    try:
        return fingerprint.matches(own.fingerprint, FileWeights(model_files(path)))
    except (LorafoldError, OSError):
        return False


def _paths_by_name(own: RecordedBase) -> Iterator[Path]:
    """Models at the paths that a base model's name may refer to: first the path itself, then paths
    next to the adapter and inside it.
    """
    if not own.name:
        return
    at, adapter = Path(own.name).expanduser(), own.adapter.absolute()
    above = (adapter.parent, adapter)
    for place in dict.fromkeys([at, *(p / at for p in above), *(p / at.name for p in above)]):
        with suppress(LorafoldError, OSError):
            if (place / "config.json").is_file() or gguf_at(place):
                yield place


def _nearby_models(own: RecordedBase) -> Iterator[tuple[Path, str]]:
    """All models in and next to the adapter, next to its base model's path, and in the Hub cache.
    """
    adapter = own.adapter.absolute()
    at = Path(own.name).expanduser()
    parents = [adapter, adapter.parent, *([at.parent] if own.name else [])]
    if not at.is_absolute():
        parents.append(adapter.parent / at.parent)
    for parent in dict.fromkeys(parents):
        for path in _inside(parent):
            if (path / "config.json").is_file():
                yield path, str(path)
    for repo in _inside(Path(hub_cache())):
        if repo.name.startswith(HUB_PREFIX):
            name = repo.name.removeprefix(HUB_PREFIX).replace("--", "/")
            yield from ((path, name) for path in _inside(repo / "snapshots"))


def _inside(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir())
    except OSError:
        return []
