"""The plan of a merge, made before anything is written: the tensors that change, the changes to
`config.json`, and all problems.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lorafold.adapter import load_all
from lorafold.core.anatomy import tied_parameters
from lorafold.errors import LorafoldError, NotMergeable, listed
from lorafold.fold.plan import (
    WHOLE_MODEL,
    FoldPlan,
    Switches,
    TensorShape,
    enable_switches,
    module_of,
    plan_fold,
)
from lorafold.fold.quantization_round_trip import ROUND_TRIP, attach_round_trip
from lorafold.models.checkpoint import (
    Checkpoint,
    MappedModel,
    as_unquantized,
    build_on_meta,
    mapped_model,
    open_checkpoint,
)
from lorafold.models.sources import HUB_FILES, remember_source
from lorafold.models.weight_conversion import Conversion
from lorafold.models.weights import TensorEntry
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base


def untied_config(
    config: dict[str, Any], mapped: MappedModel, apart: Collection[str], trust_remote_code: bool
) -> tuple[dict[str, Any], list[str]]:
    """`config.json` without tied weights, and the parameters that the files need in addition."""
    written = _without_ties(config, True)
    loose = type(mapped.model.config).from_dict(copy.deepcopy(written))
    still = tied_parameters(build_on_meta(loose, trust_remote_code))
    if wrong := sorted(still.keys() & set(apart)):
        raise LorafoldError(
            f"{', '.join(wrong)}: the architecture always ties these weights, so they can't"
            " be untied"
        )
    there, lacking = {*mapped.entries, *mapped.converted}, []
    for name in mapped.tied:
        if there.isdisjoint(names := (name, *still.get(name, ()))):
            lacking.append(name)
            there.update(names[:1])
    return written, lacking


def _without_ties(config: dict[str, Any], declare: bool) -> dict[str, Any]:
    """The config without tied weights, including sub-configs; `declare` adds a missing key."""
    written = {
        key: _without_ties(value, key == "text_config") if isinstance(value, dict) else value
        for key, value in config.items()
    }
    if declare or "tie_word_embeddings" in config:
        written["tie_word_embeddings"] = False
    return written


def _with_text_config(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    if "text_config" not in config:
        return {**config, **values}
    return {**config, "text_config": {**config["text_config"], **values}}


def with_biases(
    config: dict[str, Any], mapped: MappedModel, switches: Switches
) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """`config.json` and new entries for added biases; the model's new biases become zero."""
    model = mapped.model
    enable_switches(model, switches)
    entries = {}
    for path in chain(*switches.values()):
        if (like := mapped.entries.get(f"{path}.weight")) is None:
            raise NotMergeable(
                f"{path}: transformers converts the weight on loading, so a bias can't be added to"
                " the files"
            )
        bias: Any = model.get_submodule(path)._parameters["bias"]
        name = like.name.removesuffix("weight") + "bias"
        entries[f"{path}.bias"] = replace(
            like, name=name, shape=tuple(bias.shape), size=bias.nbytes
        )
    mapped.entries.update(entries)
    return _with_text_config(config, dict.fromkeys(switches, True)), entries


def with_vocabulary_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    written = _with_text_config(config, {"vocab_size": size})
    return written | ({"vocab_size": size} if "vocab_size" in config else {})


Problems = dict[str, list[str]]  # paths by reason
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class MergePlan:
    """The tensors to write, by name.

    changed: The parameter that a changed tensor stores.
    converted: The conversion from changed tensors to parameters.
    added: The entry of a new tensor; it is in `zeros` if no adapter changes it.
    dequantized: The path of the quantized module.
    sites: By changed parameter, the module's path and the parameter's name in it.
    vocabulary: The size of the vocabulary if it grew.
    other_base: A message for each adapter that was trained on another base.
    """

    checkpoint: Checkpoint
    model: nn.Module
    adapters: tuple[str, ...]
    changed: dict[str, str]
    converted: dict[str, Conversion]
    added: dict[str, TensorEntry]
    zeros: dict[str, Tensor]
    dequantized: dict[str, str]
    config: dict[str, Any]
    sites: dict[str, tuple[str, str]]
    shapes: dict[str, TensorShape]
    vocabulary: int | None
    other_base: tuple[str, ...] = ()

    def layout(self, file: str) -> list[tuple[str, TensorEntry]]:
        """The names and entries of the tensors to write to `file`, in order."""
        entries = [
            *self.checkpoint.files[file].entries.items(),
            *((name, e) for name, e in self.added.items() if e.file.name == file),
        ]
        return [(name, entry.shaped(self.shapes.get(name, entry.shape))) for name, entry in entries]

    @property
    def weight_bytes(self) -> int:
        return sum(entry.size for file in self.checkpoint.files for _, entry in self.layout(file))


def plan_merge(
    base: Base, adapters: Sequence[SavedAdapter], *, round_trip: str | None = None
) -> MergePlan:
    """Attaches the adapters and finds the tensors that change, without computing or writing."""
    checkpoint = open_checkpoint(base.source, HUB_FILES)  # all, because unchanged files are copied
    checkpoint, mapped, dequantized = as_unquantized(checkpoint, mapped_model(checkpoint))
    remember_source(mapped.model, base.source)
    if round_trip is not None:
        attach_round_trip(mapped.model, round_trip)
    loaded = load_all(mapped.model, adapters, "merged", allow_other_base=base.allow_other_base)
    names = tuple(adapter.name for adapter in loaded)
    planned = plan_fold(mapped.model, (ROUND_TRIP, *names))
    problems = defaultdict(list)
    for path, reason in planned.problems:
        problems[reason].append(path)
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    biases: dict[str, TensorEntry] = {}
    with _collecting_problems(problems, "added biases"):
        config, biases = with_biases(config, mapped, planned.switches)
    untied: list[str] = []
    if planned.untied:
        with _collecting_problems(problems, "tied weights"):
            config, untied = untied_config(config, mapped, planned.untied, base.trust_remote_code)
    changed, converted = _changed_tensors(mapped, planned, untied, problems)
    added = {entry.name: entry for entry in biases.values()}
    for name in untied:
        with _collecting_problems(problems, name):
            added[name] = _entry(mapped, name)[1]
    if planned.vocabulary is not None:
        config = with_vocabulary_size(config, planned.vocabulary)
    if not (changed or converted or problems):
        problems["the adapters change no weight"].append(str(checkpoint.path))
    if problems:
        reasons = (f"{listed(paths, max_chars=80)}: {reason}" for reason, paths in problems.items())
        raise NotMergeable(listed(reasons, "; "))
    zeros = {
        entry.name: mapped.model.get_parameter(name).data
        for name, entry in biases.items()
        if entry.name not in changed
    }
    return MergePlan(
        checkpoint,
        mapped.model,
        names,
        changed,
        converted,
        added,
        zeros,
        dequantized,
        config,
        planned.sites,
        {name: planned.shapes[parameter] for name, parameter in changed.items()},
        planned.vocabulary,
        tuple(one.other_base for one in loaded if one.other_base),
    )


def _changed_tensors(
    mapped: MappedModel, planned: FoldPlan, untied: Sequence[str], problems: Problems
) -> tuple[dict[str, str], dict[str, Conversion]]:
    """The parameter, or the conversion, of each changed tensor; errors become `problems`."""
    changed = {}
    converted: dict[str, Conversion] = {}
    known = {*mapped.entries, *mapped.tied, *mapped.converted}
    for parameter, shape in planned.shapes.items():
        if parameter in planned.tied and parameter not in (*mapped.entries, *untied):
            continue  # the files contain this tied weight under another name
        if parameter not in known:
            continue  # a bias that the architecture can't have, already among the problems
        with _collecting_problems(problems, module_of(parameter) or WHOLE_MODEL):
            if (conversion := mapped.converted.get(parameter)) is not None:
                _check_dtypes(conversion.entries)
                if shape != (before := tuple(conversion.like[parameter].shape)):
                    raise NotMergeable(
                        "transformers converts this weight on loading, so its shape can't"
                        f" change: found {list(shape)}, expected {list(before)}"
                    )
                converted |= {entry.name: conversion for entry in conversion.entries}
                continue
            changed[_entry(mapped, parameter)[0]] = parameter
    # one parameter per converter shows whether it can be reversed
    for conversion in {id(c.converter): c for c in reversed(converted.values())}.values():
        with _collecting_problems(problems, conversion.name):
            conversion.check_reversible()
    return changed, converted


@contextmanager
def _collecting_problems(problems: Problems, path: str) -> Iterator[None]:
    try:
        yield
    except LorafoldError as error:
        problems[str(error)].append(path)


def _entry(mapped: MappedModel, parameter: str) -> tuple[str, TensorEntry]:
    """A parameter's name in the files, and its entry or the entry of a tied parameter."""
    names = (parameter, *mapped.tied.get(parameter, ()))
    if any(n in mapped.converted for n in names):
        raise NotMergeable(
            "the weight is tied to a weight that transformers converts on loading, so it can't"
            " be written to the files"
        )
    entry = next(mapped.entries[n] for n in names if n in mapped.entries)
    _check_dtypes([entry])
    return (entry.name if parameter in mapped.entries else parameter), entry


def _check_dtypes(entries: Sequence[TensorEntry]) -> None:
    found = sorted({entry.dtype for entry in entries})
    if len(found) > 1 or found[0] not in FLOATS:
        raise NotMergeable(
            f"the weight is stored as {' and '.join(found)}, expected one of {', '.join(FLOATS)}"
        )
