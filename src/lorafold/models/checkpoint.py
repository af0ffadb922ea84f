"""Model directories opened as models whose weights stay memory-mapped in the files.

The architecture is built on the meta device; then every parameter is replaced by a tensor mapped
from a file. transformers' rules rename tensors and combine them into parameters, for example:

    block_sparse_moe.gate.weight                    ->  mlp.gate.weight
    experts.0.w1.weight, experts.0.w3.weight, ...   ->  experts.gate_up_proj
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    rename_source_key,
)

from lorafold.core.anatomy import Anatomy, tied_parameters
from lorafold.core.expert_matrices import Matrices
from lorafold.errors import LorafoldError, join_problems, listed
from lorafold.files.atomic import MANIFEST, read_object
from lorafold.layers.compressed import CompressedLinear
from lorafold.layers.expert_storage import BLOCKS, stored_matrices
from lorafold.models.architecture import text_auto_class
from lorafold.models.load_errors import loading, one_line
from lorafold.models.prequantized import can_read, check_codes, make_quantized, match_scale_dtypes
from lorafold.models.sources import ModelSource, remember_source
from lorafold.models.weight_conversion import Conversion, SourceTensor
from lorafold.models.weights import (
    INDEX,
    MODEL_FILES,
    NAMES,
    SINGLE_FILE,
    Container,
    FileWeights,
    InMemory,
    TensorEntry,
    Weights,
    model_files,
    read_container,
    read_tensors,
)

WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".h5", ".msgpack", ".gguf",
)  # fmt: skip
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a model directory, and their index if there is one."""

    source: ModelSource
    files: dict[str, Container]
    index: dict[str, Any] | None

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def entries(self) -> dict[str, TensorEntry]:
        return {name: entry for file in self.files.values() for name, entry in file.entries.items()}

    def other_files(self) -> list[Path]:
        """The relative paths of the files without weights, except hidden files and the manifest."""
        files = (p for p in sorted(self.path.rglob("*")) if p.is_file())
        paths = (p.relative_to(self.path) for p in files if not p.name.endswith(WEIGHT_SUFFIXES))
        return [
            p for p in paths if str(p) != MANIFEST and not any(x.startswith(".") for x in p.parts)
        ]


@dataclass(frozen=True)
class MappedModel:
    """A model whose parameters are memory-mapped. By parameter name, `entries` are the tensors in
    files, `tied` the other names of tied parameters, and `converted` the conversions of parameters
    that are computed from several tensors.
    """

    model: PreTrainedModel
    entries: dict[str, TensorEntry]
    tied: dict[str, tuple[str, ...]]
    converted: dict[str, Conversion]


def open_checkpoint(source: ModelSource, patterns: Sequence[str] = MODEL_FILES) -> Checkpoint:
    """Reads the headers of a model's weight files, and checks that files matching `patterns` are
    undamaged.
    """
    path = source.intact(*patterns)
    files = {file.name: read_container(file) for file in model_files(path)}
    return Checkpoint(source, files, None if SINGLE_FILE in files else read_object(path / INDEX))


def build_on_meta(config: Any, trust_remote_code: bool) -> PreTrainedModel:
    auto = text_auto_class(config, "the model's architecture")
    with loading("the model's architecture"), torch.device("meta"):
        return (
            auto.from_config(config, trust_remote_code=trust_remote_code)
            .eval()
            .requires_grad_(False)
        )


def mapped_model(checkpoint: Checkpoint) -> MappedModel:
    """The model of a checkpoint with memory-mapped weights. If weights are missing or misshapen,
    the error lists them.
    """
    what, trusted = f"model {checkpoint.path}", checkpoint.source.trust_remote_code
    with loading(what):
        config = checkpoint.source.hf_config()
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        if not ((named := isinstance(settings, dict)) and can_read(settings)):
            method = settings.get("quant_method", "unknown") if named else settings
            raise LorafoldError(
                f"{checkpoint.path}: the weights are quantized ({method}); use the"
                " unquantized model instead"
            )
        del config.quantization_config
    model = build_on_meta(config, trusted)
    if settings is not None:
        make_quantized(model, settings, what)
    entries, parts = map_to_parameters(model, checkpoint.entries)
    if settings is not None:
        match_scale_dtypes(model, entries, what)
    tensors, converted, failed = make_conversions(model, parts, checkpoint.entries.values())
    tied, problems = tied_parameters(model), list(failed.values())
    known = {*entries, *converted, *failed}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own, shape, expected = entries.get(name), None, tuple(parameter.shape)
        if name in converted:
            shape = tuple(converted[name].like[name].shape)
        elif own:
            shape = own.shape
        if shape is not None and shape != expected:
            label = own.name if own else name
            problems.append(f"{label}: shape {list(shape)}, expected {list(expected)}")
        elif known.isdisjoint((name, *tied.get(name, ()))):
            problems.append(f"{name}: missing in the weight files")
    if problems:
        raise LorafoldError(f"{checkpoint.path}: {join_problems(problems)}")
    _set_parameters(model, _mapped_parameters(entries, tensors, converted, tied), tied)
    check_codes(model, what)
    return MappedModel(model, entries, tied, converted)


def mapped_model_of(source: ModelSource) -> MappedModel:
    """The model of a source with memory-mapped weights. Its `name_or_path` is the source's name."""
    mapped = mapped_model(open_checkpoint(source))
    remember_source(mapped.model, source)
    mapped.model.config._name_or_path = mapped.model.name_or_path = source.name
    return mapped


def tensor_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of all weight files of a model directory, by name."""
    return {
        name: entry
        for file in model_files(path)
        for name, entry in read_container(file).entries.items()
    }


# (parameter, its converter) -> the entries that it is computed from, each with the converter's
# pattern for its name, and its name before the conversion
ConversionSources = dict[tuple[str, WeightConverter], list[tuple[TensorEntry, str, str]]]


def map_to_parameters(
    model: PreTrainedModel, entries: dict[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], ConversionSources]:
    """The files' tensors by parameter name, and the tensors from which transformers computes
    parameters.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    renamed_entries, parts = {}, defaultdict(list)
    for key, entry in entries.items():
        renamed = apply_renamings(key, renamings)
        alone, pattern = apply_converters(renamed, converters)
        name, _ = rename_source_key(alone, [], [], prefix, known)  # adds the model's prefix
        if name not in known and key in known:
            name, pattern = key, None
        if pattern is None:
            renamed_entries[name] = entry
        elif name in known:
            if name != alone and name.endswith(alone):
                renamed = name.removesuffix(alone) + renamed
            elif name != alone:
                renamed = renamed.removeprefix(alone.removesuffix(name))
            parts[name, of_pattern[pattern]].append((entry, pattern, renamed))
    return renamed_entries, parts


def make_conversions(
    model: PreTrainedModel, parts: ConversionSources, entries: Iterable[TensorEntry]
) -> tuple[dict[str, Tensor], dict[str, Conversion], dict[str, str]]:
    """The mapped tensors (any shape) by name, the conversions by parameter, and error messages by
    parameter for failed conversions.
    """
    by_file = defaultdict(list)
    for entry in entries:
        by_file[entry.file].append(entry.name)
    tensors: dict[str, Tensor] = {}
    for file, names in by_file.items():
        tensors |= read_tensors(file, names)
    converted: dict[str, Conversion] = {}
    problems = {}
    for (name, converter), group in parts.items():
        sources = [
            SourceTensor(e, tensors[e.name], pattern, renamed) for e, pattern, renamed in group
        ]
        try:
            conversion = Conversion(model, converter, name, sources)
        except (RuntimeError, ValueError, LookupError, TypeError) as e:
            problems[name] = (
                f"{name}: transformers can't convert the tensors found for this weight"
                f" ({len(sources)}, such as {sources[0].entry.name}): {one_line(e)}"
            )
        else:
            converted |= dict.fromkeys(conversion.like, conversion)
    return tensors, converted, problems


def _mapped_parameters(
    entries: dict[str, TensorEntry],
    tensors: Mapping[str, Tensor],
    converted: dict[str, Conversion],
    tied: dict[str, tuple[str, ...]],
) -> dict[str, nn.Parameter]:
    parameters = {n: nn.Parameter(tensors[entry.name], False) for n, entry in entries.items()}
    # if the files contain both tensors, transformers ties them only if they are equal
    for name in tied.keys() & parameters.keys():
        first = min(n for n in (name, *tied[name]) if n in parameters)
        if first != name and torch.equal(parameters[first], parameters[name]):
            parameters[name] = parameters[first]
    return parameters | {name: c.parameter(name) for name, c in converted.items()}


def _set_parameters(
    model: nn.Module, parameters: dict[str, nn.Parameter], tied: dict[str, tuple[str, ...]]
) -> None:
    """Sets the model's parameters, and buffers of the same names. Parameters without a value are
    tied to a parameter that has one.
    """
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        source = next((n for n in (name, *tied.get(name, ())) if n in parameters), None)
        if source is not None:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = parameters[source]
    for name, buffer in list(model.named_buffers()):
        if name in parameters and parameters[name].shape == buffer.shape:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = parameters[name].data


def original_weights(source: ModelSource) -> Weights:
    """The weights in a base's files by parameter name. The files must have been verified before."""
    config = source.config()
    kinds = {config.get("model_type"), config.get("text_config", {}).get("model_type")}
    rules = [rule for kind in kinds for rule in get_checkpoint_conversion_mapping(kind) or ()]
    if not any(isinstance(rule, WeightConverter) for rule in rules):
        return FileWeights(model_files(source.path))
    with loading(f"model {source.name}"):
        model = build_on_meta(source.hf_config(), source.trust_remote_code)
    entries = tensor_entries(source.path)
    own, parts = map_to_parameters(model, entries)
    tensors, converted, problems = make_conversions(model, parts, entries.values())
    if problems:
        raise LorafoldError(f"model {source.name}: {listed(problems.values(), '; ')}")
    plain = {name: tensors[entry.name] for name, entry in own.items()}
    return InMemory(plain | {name: c.parameter(name) for name, c in converted.items()})


def as_unquantized(
    checkpoint: Checkpoint, mapped: MappedModel
) -> tuple[Checkpoint, MappedModel, dict[str, str]]:
    """The checkpoint and model with the entries of unquantized weights, and the paths of the
    quantized modules by tensor name. The weights are not dequantized here.
    """
    dtype = mapped.model.config.dtype
    dtype = dtype if dtype in FLOAT_DTYPES else torch.bfloat16
    entries, by_name = dict(mapped.entries), checkpoint.entries
    paths = {}
    for path, module, parameter, own, shape in _quantized_weights(mapped):
        codes = entries[own[0]]
        name = codes.name.removesuffix("_packed").removesuffix(BLOCKS)
        size = prod(shape) * dtype.itemsize
        plain = TensorEntry(name, NAMES[dtype], shape, codes.file, codes.offset, size)
        module.compute_dtype = dtype
        for part in own:
            del by_name[entries.pop(part).name]
        entries[parameter] = by_name[name] = plain
        paths[name] = path
    ordered = sorted(by_name.values(), key=lambda e: e.offset)
    files = {
        name: Container({e.name: e for e in ordered if e.file.name == name}, container.metadata)
        for name, container in checkpoint.files.items()
    }
    return replace(checkpoint, files=files), replace(mapped, entries=entries), paths


def _quantized_weights(
    mapped: MappedModel,
) -> Iterator[tuple[str, Any, str, list[str], tuple[int, ...]]]:
    """Yields for each quantized weight its path, the module with its `compute_dtype`, its
    parameter's path in an unquantized model, the paths of its tensors (codes first), and its
    unquantized shape.
    """
    by_module = defaultdict(list)
    for name in mapped.entries:
        by_module[name.rpartition(".")[0]].append(name)
    for path, module in Anatomy.of(mapped.model).modules:
        if isinstance(module, CompressedLinear):
            codes = f"{path}.{'weight_packed' if module.fmt.packed else 'weight'}"
            others = [n for n in by_module[path] if n not in (codes, f"{path}.bias")]
            shape = (module.out_features, module.in_features)
            yield path, module, f"{path}.weight", [codes, *others], shape
        elif isinstance(module, Matrices) and (stored := stored_matrices(module)).quantized:
            own = [path.removesuffix(module.name) + name for name in stored.names]
            yield path, module.owner, path, own, (stored.number, *stored.stored_shape)
