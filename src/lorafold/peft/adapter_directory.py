"""Adapter directories in PEFT's format, read and written.

    adapter_config.json            method, targets, bias, modules to save
    adapter_model.safetensors      fp32, under PEFT's names: base_model.model.<module
                                   path>.lora_A.weight ...
    lorafold.json                  the base's fingerprint, the base adapters, the recipe
    README.md, tokenizer.json ...  the model card; the tokenizer, if the adapter has its own

Reading is strict: unsupported fields, and missing or unknown tensors, are errors that leave the
model unchanged. Directories written by PEFT have no lorafold.json. If the model is part of a
multimodal model, files use the module paths of the multimodal model (`models.architecture`); files
with the paths of the part can be read too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import nn

from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import Origin
from lorafold.core.expert_matrices import Matrices
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError, join_problems
from lorafold.files.atomic import MANIFEST, atomic_directory, write_json
from lorafold.files.contents import Contents
from lorafold.files.model_card import (
    CARD,
    CLASSES,
    OVER,
    REWARD,
    VOCABULARY,
    ResultFiles,
    training_card,
)
from lorafold.files.record import BASE, RECORD, TURNS, current_names
from lorafold.methods.common.biases_and_modules import Bias, ReplaceDelta
from lorafold.models import fingerprint
from lorafold.models.architecture import auto_class_name, whole_model_of
from lorafold.models.classifier import new_heads
from lorafold.models.quantizations import UNQUANTIZED
from lorafold.models.tokenizer import CONFIG as TOKENIZER
from lorafold.models.weights import InMemory, Weights
from lorafold.peft import tokens
from lorafold.peft.config import (
    CONFIG,
    WEIGHTS,
    PeftSelection,
    buffers_beneath,
    missing_config_error,
    read_config,
    select_exactly,
    write_config,
)
from lorafold.peft.convolution import TUCKER_CORES, multiply_tucker_cores
from lorafold.peft.form import DROPOUT, PER_EXPERT, format_of, warn_limits, with_dropout
from lorafold.peft.provenance import DIGEST_FILES, RecordedBase, TrainingStorage, parse_over
from lorafold.peft.table_types import ROOT, JsonObject
from lorafold.peft.tensors import Parts, key_problem, nonfinite_problem, saved_tensors, sites_of

FILES = (CONFIG, WEIGHTS, RECORD)
HEAD_SUFFIXES = (".score.weight", ".classifier.weight")  # in the files of PEFT's classifiers
KEY_PREFIX = f"{ROOT}."

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's method, targets (by the user's patterns), biases, and modules to save (by the
    user's names).
    """

    spec: Spec
    matches: Matches
    bias: Bias = "none"
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedAdapter:
    """The contents of an adapter directory, which were read and checked, but not compared with a
    model.
    """

    path: Path
    spec: Spec
    bias: Bias
    selection: PeftSelection
    weights: InMemory
    own_base: RecordedBase  # the base that the adapter was trained on
    over: tuple[Origin, ...]  # the base adapters, lowest first
    record: JsonObject  # lorafold.json; empty if PEFT wrote the adapter
    task: str | None  # PEFT's type of task
    files: Mapping[str, tuple[int, str]]  # size and hex SHA-256 of each file that was read
    sha256: str  # of DIGEST_FILES
    own_tokenizer: bool

    @classmethod
    def open(cls, path: str | Path | Contents) -> SavedAdapter:
        """Reads an adapter directory, or parses contents that were already read."""
        contents = path if isinstance(path, Contents) else Contents(path, FILES)
        if CONFIG not in contents.files:
            raise missing_config_error(contents.path)
        problems: list[str] = []
        written = _collect_problem(problems, lambda: contents.object(CONFIG))
        config = None
        if written is not None:
            config = _collect_problem(problems, partial(read_config, written))
        weights = _collect_problem(problems, lambda: _weights(contents))
        record = _collect_problem(problems, lambda: contents.record) or {}
        try:
            own_base = RecordedBase.of(contents.path, written or {}, record)
            over = parse_over(record) if OVER in record else ()
        except LorafoldError as e:
            problems.append(f"{RECORD}: {e}")
        contents.check_intact()  # first, because damaged files cause the other problems
        if problems or written is None or config is None or weights is None:
            raise LorafoldError(f"{contents.path}: {join_problems(problems)}")
        spec, selection, bias = config
        # missing or damaged tokenizer files are reported when the tokenizer is loaded
        named = contents.object(MANIFEST).get("files", ()) if MANIFEST in contents.files else ()
        return cls(
            contents.path,
            with_dropout(spec, record) if selection.target_parameters else spec,
            bias,
            selection,
            weights,
            own_base,
            over,
            record,
            written.get("task_type"),
            contents.entries,
            contents.digest_of(DIGEST_FILES),
            TOKENIZER in named or (contents.path / TOKENIZER).is_file(),
        )

    def __str__(self) -> str:
        return str(self.path)

    @property
    def recipe(self) -> JsonObject:
        """The training recipe with current field names; empty if the adapter has none."""
        return current_names(self.record.get("recipe") or {})

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names of a classifier's adapter, in order; None for other adapters."""
        names = self.record.get(CLASSES)
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise LorafoldError(
                f"{self.path / RECORD}: field {CLASSES}: found {names!r}, expected a list of names"
            )
        return tuple(names)

    @property
    def is_reward_model(self) -> bool:
        """Whether the adapter belongs to a reward model. An adapter written by PEFT does if its
        classification head has a single output.
        """
        if self.record or self.task != "SEQ_CLS":
            return self.record.get(REWARD) is True
        heads = [name for name in self.weights.names if name.endswith(HEAD_SUFFIXES)]
        return bool(heads) and self.weights.shape(heads[0])[0] == 1

    @property
    def single_turn(self) -> bool:
        """Whether all rows that it was trained on had a single question."""
        return self.record.get(TURNS) == 1

    def for_model(self, model: nn.Module) -> SavedAdapter:
        """A copy with the module paths of this model, if it is part of the model that the files
        describe.
        """
        modules = {path for path, _ in Anatomy.of(model).modules}
        keys = (name for name in self.weights.names if name.startswith(KEY_PREFIX))
        roots = {".".join(key.removeprefix(KEY_PREFIX).split(".")[:2]) for key in keys}
        whole = None if roots <= modules else whole_model_of(model)
        if whole is None:
            return self
        names = {old: map_key(old, whole.path_in_part) for old in self.weights.names}
        names = {old: new for old, new in names.items() if new != old}
        moved = {new: self.weights.get(old) for old, new in names.items()}
        weights = self.weights.with_others(names, moved)
        return replace(self, selection=self.selection.under(whole.paths), weights=weights)

    def targets(self, model: nn.Module) -> Matches:
        each = [key for key in self.weights.names if PER_EXPERT.search(key)]
        if each and any(isinstance(m, Matrices) for _, m in Anatomy.of(model).modules):
            raise LorafoldError(
                f"found tensors of single experts ({len(each)}, such as {min(each)}), the"
                " format of transformers 4; load the adapter with PEFT, which converts"
                " them to target_parameters, and save the adapter again"
            )
        return self.selection.targets(model)

    def attach_options(self, model: nn.Module) -> dict[str, Any]:
        """The arguments of `attach` for this model, except the spec and the tokens."""
        return {
            "targets": self.targets(model),
            "bias": self.bias,
            "modules_to_save": self.selection.saved(model),
        }

    def token_rows(self, model: nn.Module, base: Weights) -> tuple[tokens.ByPath, SavedAdapter]:
        """The ids of trained tokens by module path, and a copy of the adapter in which rows for
        these tokens replace resized matrices.
        """
        resolved = tokens.resolve(model, self.selection.tokens)
        ids, weights = tokens.with_resized_rows(model, resolved, self.weights, base)
        return ids, replace(self, weights=weights)

    def load_into(
        self,
        model: nn.Module,
        parts: Parts,
        targets: Sequence[str],
        base: Weights,
        problems: Sequence[str],
    ) -> None:
        """Assigns the adapter's tensors to attached deltas, in fp32. Deltas on the meta device get
        tensors on the CPU.
        """
        expected = saved_tensors(sites_of(model, parts, targets, base))
        keys = set(self.weights.names)
        loaded = {key: self.weights.get(key) for key in sorted(keys & expected.keys())}
        wrong = [
            *problems,
            *(key_problem(key, self.weights, base) for key in sorted(keys - expected.keys())),
            *(f"missing key {key}" for key in sorted(expected.keys() - keys)),
            *(expected[key].problem(key, tensor, loaded) for key, tensor in loaded.items()),
        ]
        if wrong := [*filter(None, wrong)]:
            raise LorafoldError(join_problems(wrong))
        for key, saved in expected.items():
            saved.assign(loaded[key])


def write_adapter(
    path: str | Path,
    model: nn.Module,
    chosen: AdapterConfig,
    parts: Parts,
    base: Weights,
    beside: ResultFiles,
) -> Path:
    """Writes an adapter directory atomically."""
    spec, matches, targets = chosen.spec, chosen.matches, chosen.matches.paths
    replaced = [p for p, (first, *_) in parts.items() if isinstance(first, ReplaceDelta)]
    form, whole = format_of(model, spec, targets), whole_model_of(model)
    named = whole.path_in_whole if whole else str
    of_parameters = {named(p): named(parameter) for p, parameter in form.parameters.items()}
    selection = select_exactly(
        whole.model if whole else model, [named(p) for p in targets if p],
        tuple(matches.by_pattern), [named(p) for p in replaced if p not in targets],
        chosen.modules_to_save, replace(form, parameters=of_parameters),
    )  # fmt: skip
    sites = sites_of(model, parts, targets, base)
    config = write_config(model, spec, sites, selection, chosen.bias, form)
    saved = {key: one.encoded() for key, one in saved_tensors(sites).items()}
    if names := selection.modules_to_save:  # PEFT also reads their buffers
        buffers = buffers_beneath(model, names)
        saved = {f"{KEY_PREFIX}{name}": buffer for name, buffer in buffers.items()} | saved
    tensors = {
        map_key(key, named) if whole else key: t.contiguous().cpu() for key, t in saved.items()
    }
    if wrong := [text for key, t in tensors.items() if (text := nonfinite_problem(key, t))]:
        raise LorafoldError(f"{path} was not written: {join_problems(wrong)}")
    record = {k: v for k, v in beside.record.items() if k != DROPOUT}
    if form.dropout:
        record[DROPOUT] = form.dropout
    replaced_heads = new_heads(model) if OVER in record else ()  # the base adapters replaced these
    known = record.get(BASE) or fingerprint.of(base, [*replaced, *replaced_heads])
    shown = {k: record[k] for k in (OVER, VOCABULARY) if k in record}
    card = beside.card or training_card(
        config["base_model_name_or_path"] or "",
        shown | {"recipe": {"method": type(spec).__name__, **vars(spec)}},
        {},
        opened_by=auto_class_name(model),
        in_peft=form.in_peft,
    )
    with atomic_directory(path, beside.overwrite) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        write_json(directory / CONFIG, config)
        write_json(directory / RECORD, {**record, "lorafold": version("lorafold"), BASE: known})
        if beside.tokenizer is not None:
            beside.tokenizer.save_pretrained(directory)
        (directory / CARD).write_text(card, encoding="utf-8")
    warn_limits(form, path)
    return Path(path)


def open_all(paths: Sequence[str | Path]) -> tuple[SavedAdapter, ...]:
    """Reads several adapter directories. One error lists the problems of all of them."""
    problems: list[str] = []
    adapters = [_collect_problem(problems, partial(SavedAdapter.open, path)) for path in paths]
    if problems:
        raise LorafoldError(join_problems(problems))
    return tuple(one for one in adapters if one is not None)


def training_storage_of(adapters: Sequence[SavedAdapter | RecordedBase]) -> TrainingStorage | None:
    """The quantization and dtype of the base in training; None if unknown, or if the adapters were
    trained in different unquantized dtypes.
    """
    own = [one.own_base if isinstance(one, SavedAdapter) else one for one in adapters]
    records = {str(one.adapter): one.trained_on for one in own if one.trained_on}
    storages = {one.storage for one in records.values()}
    if len(storages) > 1 and not storages <= {*UNQUANTIZED, "auto"}:
        listed = ", ".join(f"{path} on {one.storage}" for path, one in records.items())
        raise LorafoldError(
            f"these adapters were trained on bases with different quantization ({listed});"
            " choose one with --quantization"
        )
    if len(storages) != 1:
        return None
    dtypes = {one.dtype for one in records.values()}
    return TrainingStorage(storages.pop(), dtypes.pop() if len(dtypes) == 1 else None)


def map_key(key: str, path: Callable[[str], str]) -> str:
    """A tensor's key in a file, after `path` has mapped the module path."""
    return KEY_PREFIX + path(key.removeprefix(KEY_PREFIX)) if key.startswith(KEY_PREFIX) else key


def _collect_problem(problems: list[str], do: Callable[[], T]) -> T | None:
    try:
        return do()
    except LorafoldError as e:
        problems.append(str(e))
        return None


def _weights(contents: Contents) -> InMemory:
    if WEIGHTS in contents.files:
        file = InMemory.read(contents.files[WEIGHTS], contents.path / WEIGHTS)
        has_cores = any(name.endswith(TUCKER_CORES) for name in file.names)
        return multiply_tucker_cores(file) if has_cores else file
    pickles = sorted(p.name for p in contents.path.glob("adapter_model.*"))
    reason = (
        f"found {', '.join(pickles)}, which can run code when loaded; convert to safetensors"
        if pickles else "the file is missing"
    )
    raise LorafoldError(f"{WEIGHTS}: {reason}")
