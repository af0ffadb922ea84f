"""adapter_config.json, both ways: the method's fields by its row of the table, and those that all
methods share.

A field that is not understood must be neutral (null, false, empty): anything else would change what
the adapter computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError, as_one, listed, shortened
from lorafold.files.paths import nearest_name
from lorafold.methods.parts.extras import Bias
from lorafold.methods.parts.trainable_tokens import TokenRows
from lorafold.models.sources import called
from lorafold.peft.derived import PREFIX
from lorafold.peft.form import WrittenForm, renamed_patterns
from lorafold.peft.selection import Patterns, PeftSelection, saved_leaves, task_of
from lorafold.peft.table import METHODS, more_methods
from lorafold.peft.table_types import Field, Method, Regex, TargetModule
from lorafold.peft.tokens import INDICES, Ids, describe

CONFIG = "adapter_config.json"
ANYTHING = TypeAdapter(Any)
WEIGHTS = "adapter_model.safetensors"


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A list as a tuple; any other value alone in one."""
    return tuple(value) if isinstance(value, list) else (value,)


def as_patterns(value: str | list[str]) -> Patterns:
    """Names as a tuple, or a regular expression as it is; the preset all-linear may have any case.
    """
    if not isinstance(value, str):
        return tuple(value)
    return value.lower() if value.lower() == "all-linear" else value


def as_ids(value: list[int] | dict[str, list[int]]) -> Ids:
    """Token ids as a tuple, or a tuple for each named module."""
    return (
        {name: tuple(ids) for name, ids in value.items()}
        if isinstance(value, dict)
        else tuple(value)
    )


SELECTION = (
    Field("target_modules", "target_modules", Regex | list[str], None, from_file=as_patterns),
    *(
        Field(key, attribute, kind | None, None, from_file=convert, empty=())
        for key, attribute, kind, convert in (
            ("modules_to_save", "modules_to_save", list[Regex], as_tuple),
            ("exclude_modules", "exclude_modules", Regex | list[str], as_patterns),
            ("layers_to_transform", "layers_to_transform", int | list[int], as_tuple),
            ("layers_pattern", "layers_pattern", Regex | list[Regex], as_tuple),
            (INDICES, "tokens", list[int] | dict[str, list[int]], as_ids),
        )
    ),
)
PARAMETERS = Field(
    "target_parameters", "target_parameters", list[str] | None, None, from_file=as_tuple, empty=()
)
BIAS = Field("bias", "bias", Bias, "none")
# what says where an adapter came from, not what it computes
ABOUT = frozenset(
    {
        "peft_type",
        "task_type",
        "inference_mode",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "runtime_config",
    }
)
# what no method's own option is called
SHARED = ABOUT | {BIAS.key, PARAMETERS.key} | {field.key for field in SELECTION}


def no_adapter(path: Path) -> LorafoldError:
    """The error for a path without an adapter's configuration: what is there instead, and what to
    give.
    """
    if path.is_file():
        own = (path.parent / CONFIG).is_file()
        told = f"; it is a file, and its directory is {path.parent}" if own else "; it is a file"
    elif not path.exists():
        told = "; there is none on this machine" + nearest_name(path)
    elif inside := sorted(str(p.parent) for p in path.glob(f"*/{CONFIG}")):
        told = f"; there is one in {listed(inside)}"
    elif (path / "config.json").is_file():
        told = f"; it is a model, which is given as --model {path}"
    else:
        told = ""
    return LorafoldError(f"{path}: found no {CONFIG}, expected the directory of an adapter{told}")


def write_config(
    model: nn.Module, spec: Spec, sites: Sequence[TargetModule], selection: PeftSelection,
    bias: Bias, form: WrittenForm,
) -> dict[str, Any]:  # fmt: skip
    """The config of an adapter on `model`, ready for JSON.

    Args:
        model: The adapted model, whose class decides on PEFT's task type.
        spec: The method with its options.
        sites: The deltas with their module paths.
        selection: Targets, modules trained whole, and token rows.
        bias: Which biases are trained.
        form: The form of the files.

    LorafoldError for a method that has an option with the name of a key that all methods share.
    """
    method = form.method
    if taken := sorted({f.key for f in method.fields} & SHARED):
        raise LorafoldError(
            f"{method.spec.__name__}: {', '.join(taken)}: every config has a key of that name;"
            " rename the option"
        )
    task, heads = task_of(model)
    names = selection.modules_to_save
    # without heads that the adapter does not hold, for which PEFT would look
    if heads and {*saved_leaves(model, (*names, *heads))} != {*saved_leaves(model, names)}:
        task = None
    config = method.config(spec, sites) | {
        "base_model_name_or_path": called(model) or None,
        "inference_mode": True,
        "modules_to_save": list(names) or None,
        "revision": None,
        "task_type": task,
    }
    if method.preset is None:
        targets = selection.target_modules
        config["target_modules"] = targets if isinstance(targets, str) else list(targets)
    if form.parameters:
        config[PARAMETERS.key] = list(selection.target_parameters)
        for key in ("rank_pattern", "alpha_pattern"):
            if values := config.get(key):
                config[key] = renamed_patterns(values, form.parameters.items())
    if method.biases or bias != BIAS.default:
        config[BIAS.key] = bias
    rows = [(s.path, s.delta) for s in sites if isinstance(s.delta, TokenRows)]
    if own := {path: list(delta.ids) for path, delta in rows if delta.twin is None}:
        config |= describe(model, own)
    if form.dropout:
        config["lora_dropout"] = 0.0
    return dict(sorted(config.items()))


def read_config(config: Mapping[str, Any]) -> tuple[Spec, PeftSelection, Bias]:
    """LorafoldError lists every field that has a wrong value or is not supported."""
    method = method_of(config)
    spec, problems = method.read(config)
    shared: dict[str, Any] = {"experts": not method.of_peft}
    if method.preset is not None:
        shared |= {"target_modules": (), "preset": method.preset}
    if method.parameters and config.get(PARAMETERS.key) and config.get("target_modules") is None:
        config = {**config, "target_modules": []}
    fields = (
        *(f for f in SELECTION if method.preset is None or f.key in ("modules_to_save", INDICES)),
        *[PARAMETERS] * method.parameters,
        BIAS,
    )
    for field in fields:
        try:
            shared[field.attribute] = field.read(config)
        except LorafoldError as e:
            problems.append(str(e))
    marked = {key for key, mark in method.marks.items() if config.get(key) == mark}
    known = ABOUT | {f.key for f in fields} | method.known | marked
    unknown = {
        k: v for k, v in sorted(config.items()) if k not in known and not is_neutral(v)
    }
    texts = {k: ANYTHING.dump_json(v).decode() for k, v in unknown.items()}
    problems += [f"{k}={shortened(text, 80)} is not supported" for k, text in texts.items()]
    if problems or spec is None:
        raise LorafoldError(f"{CONFIG}: {as_one(problems)}")
    bias: Bias = shared.pop("bias")
    return spec, PeftSelection(**shared), bias


def method_of(config: Mapping[str, Any]) -> Method:
    """The row of the table that a config is read by. LorafoldError where there is none."""
    kind = config.get("peft_type")
    of_kind = [m for m in METHODS if m.peft_type == kind]
    of_kind = of_kind or [m for m in more_methods() if m.peft_type == kind]
    if not of_kind:
        expected = ", ".join(sorted({m.peft_type for m in (*METHODS, *more_methods())}))
        own = str(kind).removeprefix("DORA_").startswith(PREFIX)
        hint = "; the code that registers this method must be imported first" * own
        raise LorafoldError(
            f"{CONFIG}: peft_type {kind!r} is not supported; expected one of {expected}{hint}"
        )
    return next(
        (m for m in of_kind if all(config.get(k, False) == mark for k, mark in m.marks.items())),
        of_kind[0],
    )


def is_neutral(value: Any) -> bool:
    """Does this value of a key that is not understood leave unchanged what the adapter computes?"""
    return value is None or value is False or value in ("", [], {})
