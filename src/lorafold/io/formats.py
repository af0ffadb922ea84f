"""PEFT's names for what lorafold calls its own: one table both ways, a row a method.

    PARTS       delta class  -> the tensors it has in a file
    FORMATS     spec class   -> peft_type, and its fields in adapter_config.json

A method that PEFT lacks has the same layout under a peft_type of our own. Shapes and keys are those PEFT 0.21 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorafold.bases.dense import Embedding
from lorafold.core.delta import Delta
from lorafold.core.layer import Base
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.bitfit import BiasDelta
from lorafold.methods.lora import LoRA, LoRADelta
from lorafold.methods.replace import ReplaceDelta

Config = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `key` follows the module's path, or `base_model.` where `shared`; `name` is the delta's tensor.

    The file holds the delta's tensor in `shape` (None: its own), plus the module's own parameter `plus` where that is given.
    """

    key: str
    name: str
    shape: tuple[int, ...] | None = None
    plus: str | None = None
    shared: bool = False


Entries = Callable[[Delta, Base], list[Entry]]


def named(**keys: str) -> Entries:
    """Entries by the delta's tensor names, for a delta that is stored in one way whatever it lies on."""
    return lambda delta, layer: [Entry(key, name) for name, key in keys.items()]


def lora_entries(delta: Delta, layer: Base) -> list[Entry]:
    a, b = {True: ("lora_embedding_A", "lora_embedding_B"), False: ("lora_A.weight", "lora_B.weight")}[isinstance(layer, Embedding)]
    return [Entry(a, "A"), Entry(b, "B")]


PARTS: dict[type[Delta], Entries] = {
    LoRADelta: lora_entries,
    BiasDelta: lambda delta, layer: [Entry("bias", "offset", plus="bias")],
    ReplaceDelta: lambda delta, layer: [Entry(name.removeprefix("copy."), name) for name, _ in delta.named_parameters()],
}


@dataclass(frozen=True)
class Format:
    """How a spec is written in a config. `marks` tell rows of one peft_type apart; `fields` maps config fields to spec fields.

    `fixed` fields are written as they are; read, they may hold nothing else. `defaults` is what a config that lacks a field means.
    """

    peft_type: str
    fields: Mapping[str, str]
    marks: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Config], Config] = lambda config: config  # last touches to the written fields
    read: Callable[[Config], Config] = lambda options: options  # and to the spec's options


def _init_words(config: Config) -> Config:
    return config | {"init_lora_weights": True if config["init_lora_weights"] == "kaiming" else config["init_lora_weights"]}


def _init_of_words(options: Config) -> Config:
    init = options["init"]
    if init not in (True, False, "gaussian"):
        raise LorafoldError(f"init_lora_weights={init!r} is not supported: such a file is relative to a residual base that is not stored")
    return options | {"init": "gaussian" if init == "gaussian" else "kaiming"}


FORMATS: dict[type[Spec], Format] = {
    LoRA: Format(
        "LORA",
        {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "init_lora_weights": "init",
         "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"},
        marks={"use_dora": False},
        defaults={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "init_lora_weights": True, "rank_pattern": {},
                  "alpha_pattern": {}, "use_dora": False},
        write=_init_words, read=_init_of_words,
    ),
}  # fmt: skip

# Fields that say nothing about what the adapter computes, whatever they hold.
SILENT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type", "fan_in_fan_out", "peft_type",
    "target_modules", "modules_to_save", "bias", "megatron_core", "qalora_group_size", "ensure_weight_tying", "loftq_config",
    "runtime_config", "layers_pattern",
}  # fmt: skip


def config_of(spec: Spec) -> Config:
    """The method's own part of adapter_config.json."""
    row = FORMATS[type(spec)]
    values = {key: getattr(spec, name) for key, name in row.fields.items()}
    values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    return row.write({"peft_type": row.peft_type, **row.marks, **row.fixed, **values})


def spec_of(config: Config) -> Spec:
    """The spec that a config describes. LorafoldError lists every field that asks for something not supported."""
    kind = config.get("peft_type")
    rows = [(cls, row) for cls, row in FORMATS.items() if row.peft_type == kind]
    if not rows:
        known = sorted({row.peft_type for row in FORMATS.values()})
        raise LorafoldError(f"adapter_config.json: peft_type {kind!r} is not supported; supported are {', '.join(known)}")
    fits = [(c, r) for c, r in rows if all(config.get(k, r.defaults.get(k, v)) == v for k, v in r.marks.items())]
    if not fits:
        raise LorafoldError(f"adapter_config.json: {kind} with {', '.join(f'{k}={config.get(k)!r}' for k in rows[0][1].marks)} is not supported")
    cls, row = fits[0]
    known_fields = {*row.fields, *row.marks, *SILENT}
    odd = {k: v for k, v in config.items() if k not in known_fields and v != row.fixed.get(k, v if not v else None)}
    if odd:
        raise LorafoldError("adapter_config.json: not supported: " + ", ".join(f"{k}={v!r}" for k, v in sorted(odd.items())))
    options = {name: config.get(key, row.defaults.get(key)) for key, name in row.fields.items()}
    return cls(**row.read({k: v for k, v in options.items() if v is not None}))


def entries_of(delta: Delta, layer: Base) -> list[Entry]:
    """The tensors of one delta in a file. LorafoldError for a delta that has no row."""
    if type(delta) not in PARTS:
        raise LorafoldError(f"{type(delta).__name__} has no file format")
    return PARTS[type(delta)](delta, layer)


def tensor_of(delta: Delta, name: str) -> Tensor:
    """A delta's parameter or buffer by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(delta.get_submodule(owner), leaf)
