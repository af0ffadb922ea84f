"""A checkpoint directory as a model whose weights stay in its files.

The architecture is built on the meta device and every parameter replaced by the tensor of the file,
mapped and not read: laying adapters over it costs their own memory only. Names in the files become
names in the model by transformers' own rules.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lorafold.core.anatomy import tied_parameters
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.models.container import Container, Entry, read_container, read_tensors
from lorafold.models.load_errors import loading
from lorafold.models.sources import ModelSource
from lorafold.models.weights import INDEX, MODEL_FILES, model_files

WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
)


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a directory by name, and the index beside them if they are several."""

    path: Path
    files: dict[str, Container]
    index: dict[str, Any] | None

    @property
    def entries(self) -> dict[str, Entry]:
        return {name: entry for file in self.files.values() for name, entry in file.entries.items()}

    def other_files(self) -> list[Path]:
        """What is carried over as it is, relative to the directory: config, tokenizer, chat
        template ..., but no weights of any format.
        """
        found = (
            p.relative_to(self.path)
            for p in sorted(self.path.rglob("*"))
            if p.is_file() and not p.name.endswith(WEIGHTS)
        )
        return [
            p
            for p in found
            if str(p) != MANIFEST and not any(part.startswith(".") for part in p.parts)
        ]


@dataclass(frozen=True)
class MappedModel:
    """The model over its files.

    `entries` by parameter name; `tied` gives, for a shared parameter, the other names it goes by;
    `converted` are parameters that transformers computes from the files' tensors instead of reading
    them.
    """

    model: PreTrainedModel
    entries: dict[str, Entry]
    tied: dict[str, tuple[str, ...]]
    converted: frozenset[str]


def open_checkpoint(source: ModelSource, patterns: Sequence[str] = MODEL_FILES) -> Checkpoint:
    """Read the headers of all weight files. `patterns`: which of the files are going to be read.

    LorafoldError where there are none, one of those that the index names is missing, or one is not
    the one that was written.
    """
    path = source.intact(*patterns)
    files = model_files(path)
    if missing := [file.name for file in files if not file.is_file()]:
        raise LorafoldError(f"{path}: {INDEX} names files that are not there: {', '.join(missing)}")
    index = (
        json.loads((path / INDEX).read_text(encoding="utf-8")) if (path / INDEX).is_file() else None
    )
    return Checkpoint(path, {file.name: read_container(file) for file in files}, index)


def build(config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The architecture alone, on the meta device."""
    with loading("the model's architecture"), torch.device("meta"):
        return (
            AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            .eval()
            .requires_grad_(False)
        )


def mapped_model(checkpoint: Checkpoint, trust_remote_code: bool) -> MappedModel:
    """LorafoldError lists every weight that the files lack or hold in another shape."""
    with loading(f"model {checkpoint.path}"):
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    if quantization := getattr(config, "quantization_config", None):
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, dict)
            else quantization
        )
        raise LorafoldError(
            f"{checkpoint.path}: its weights are quantized ({method}); merge into the model that it"
            " was quantized from"
        )
    model = build(config, trust_remote_code)
    entries, converted = _by_parameter(model, checkpoint.entries)
    tied = tied_parameters(model)
    problems = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in entries and entries[name].shape != tuple(parameter.shape):
            problems.append(
                f"{entries[name].name}: shape {list(entries[name].shape)}, expected"
                f" {list(parameter.shape)}"
            )
        elif not any(n in entries or n in converted for n in (name, *tied.get(name, ()))):
            problems.append(f"{name}: in no weight file")
    if problems:
        raise LorafoldError(f"{checkpoint.path}: {'; '.join(problems)}")
    _map_files(model, entries, tied)
    return MappedModel(model, entries, tied, converted)


def mapped_model_of(source: ModelSource, trust_remote_code: bool = False) -> MappedModel:
    """The model by that name over its mapped files, as adapters that are laid over it should name
    their base.
    """
    mapped = mapped_model(open_checkpoint(source), trust_remote_code)
    mapped.model.config._name_or_path = mapped.model.name_or_path = source.name
    return mapped


def _by_parameter(
    model: PreTrainedModel, entries: dict[str, Entry]
) -> tuple[dict[str, Entry], frozenset[str]]:
    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    known = model.state_dict()
    found, converted = {}, set()
    for key, entry in entries.items():
        name, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        if name not in known and key in known:
            name, converter = key, None
        if converter is None:
            found[name] = entry
        else:
            converted.add(name)
    return found, frozenset(converted)


def _map_files(
    model: nn.Module, entries: dict[str, Entry], tied: dict[str, tuple[str, ...]]
) -> None:
    """Put the files' tensors in the parameters' places; a name that has none, or an equal one,
    takes that of one it is tied to.
    """
    by_file = defaultdict(list)
    for entry in entries.values():
        by_file[entry.file].append(entry.name)
    tensors = {
        name: t for file, names in by_file.items() for name, t in read_tensors(file, names).items()
    }
    parameters = {
        name: nn.Parameter(tensors[entry.name], requires_grad=False)
        for name, entry in entries.items()
    }
    # stored more than once: transformers ties them if they are equal
    for name in tied.keys() & parameters.keys():
        first = min(n for n in (name, *tied[name]) if n in parameters)
        if first != name and torch.equal(parameters[first], parameters[name]):
            parameters[name] = parameters[first]
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        source = next((n for n in (name, *tied.get(name, ())) if n in parameters), None)
        if source is not None:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = parameters[source]
