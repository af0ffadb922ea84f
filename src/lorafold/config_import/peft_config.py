"""Converts PEFT's adapter_config.json. Keys are interpreted by the tables that also read adapters
(`lorafold.peft`). This module adds keys that matter only in training: initializations that change
the base, AdaLoRA's phases, and dropouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorafold.config_import.rules import (
    KEYS,
    OFF,
    REASONS,
    UNKNOWN_KEY,
    Outcome,
    TranslatedKey,
    TranslatedKeys,
    Values,
    mapped,
    pass_option,
    unmapped,
)
from lorafold.config_import.trainer import AUTO_TARGETS, kind_of_lora, target_parameters
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods import make_spec, name_of
from lorafold.peft.config import (
    BIAS,
    CONFIG,
    ORIGIN_FIELDS,
    PARAMETERS,
    SELECTION,
    is_neutral,
    method_of,
    read_config,
)
from lorafold.peft.table_types import Field, Method
from lorafold.recipe.fields import METHOD_FIELDS

INIT = "init_lora_weights"
TARGETS = "target_modules"
OBJECTIVES = {"CAUSAL_LM": "sft", "SEQ_CLS": "classify"}
ADVICE: Mapping[str, str] = KEYS["names"]["peft"]["advice"]


def read_keys(config: Values) -> TranslatedKeys:
    method = method_of(config)
    shared = [*SELECTION, BIAS] if method.preset is None else [*SELECTION[1:2], SELECTION[-1], BIAS]
    shared += [PARAMETERS] * method.parameters
    keys = {f.key for f in (*method.fields, *shared)} | ORIGIN_FIELDS | set(method.marks)
    readable = {k: v for k, v in config.items() if k in keys}
    if method.preset is None and not (config.get(TARGETS) or config.get(PARAMETERS.key)):
        readable[TARGETS] = "all-linear"  # because `read_config` requires targets
    start = config.get(INIT) if any(f.key == INIT for f in method.fields) else None
    if start is not None:
        readable[INIT] = True  # the initialization is read below
    spec, selection, bias = read_config(readable)
    inner = spec if method.outer is None else spec.over  # type: ignore[attr-defined]
    read = {**vars(selection), "bias": bias, **vars(inner)}
    outcomes = dict(_method_outcomes(method, inner, start))
    outcomes |= {f.key: _selection_outcome(f, config.get(f.key), read) for f in shared}
    outcomes |= {k: _metadata(k, config[k]) for k in ORIGIN_FIELDS & {*config} - {*outcomes}}
    known = method.known | set(method.marks)
    outcomes |= {
        k: _other_outcome(k, v, k in known or is_neutral(v), method)
        for k, v in config.items()
        if k not in outcomes
    }
    defaults = {f.key: f.default for f in (*method.fields, *shared)}
    return tuple(
        TranslatedKey(key, config.get(key, defaults.get(key)), config.get(key) is not None, outcome)
        for key, outcome in outcomes.items()
        if key in config or outcome.fields
    )


def _method_outcomes(method: Method, spec: Spec, start: Any) -> Iterator[tuple[str, Outcome]]:
    dora, name = method.outer is not None, name_of(spec)
    full_name = "dora" if dora else name
    if start is not None:
        kind = kind_of_lora(dora, name == "rslora", start)
        options = {k: v for k, v in kind.fields.items() if k == "options"}
        yield INIT, Outcome(kind.status, options, kind.remark or "part of the method")
        full_name = kind.fields["method"]
    over = {"options": {"over": name}} if dora and name != "lora" else {}
    yield "peft_type", mapped(method=full_name, **over)
    default = make_spec(name)
    for field in method.fields:
        value = getattr(spec, field.attribute)
        if field.key == INIT:
            continue
        if field.attribute in METHOD_FIELDS:
            yield field.key, mapped(**{field.attribute: value})
        elif value != getattr(default, field.attribute) and value not in ((), None):
            yield field.key, mapped(options={field.attribute: value})
        else:
            yield field.key, mapped(f"the default of method {full_name}")


def _selection_outcome(field: Field, value: Any, read: Values) -> Outcome:
    if field.key in ADVICE:
        return unmapped(ADVICE[field.key]) if value not in (None, [], {}, "") else OFF
    if field.key == PARAMETERS.key and value:
        return target_parameters(read[TARGETS], read[field.attribute])
    if value:
        name = "targets" if field.key == TARGETS else field.key
        return mapped(**{name: read[field.attribute]})
    return AUTO_TARGETS if field.key == TARGETS and not read[PARAMETERS.attribute] else OFF


def _metadata(key: str, value: Any) -> Outcome:
    options = {"base_model_name_or_path": "--model", "revision": "--revision"}
    if key in options and value:
        return pass_option(options[key], value)
    if key != "task_type" or value is None:
        return unmapped("records how the file was created") if value else OFF
    if str(value) not in OBJECTIVES:
        raise LorafoldError(
            f"{CONFIG}: task_type: found {value!r}, but lorafold supports only CAUSAL_LM (objective"
            " sft) and SEQ_CLS (objective classify)"
        )
    return mapped(objective=OBJECTIVES[value])


def _other_outcome(key: str, value: Any, harmless: bool, method: Method) -> Outcome:
    # options of training, on which a saved adapter does not depend
    if key in ("tinit", "tfinal") and key in method.known:
        return mapped(options={key: value})
    if not value:
        return OFF
    if key in method.marks:
        return mapped("part of the method")
    if key in ("init_weights", "init_ia3_weights", "fan_in_fan_out", "save_projection"):
        return mapped("determined by the base and the method")
    if key in method.known:
        return unmapped(REASONS["absent"])
    return OFF if harmless else unmapped(UNKNOWN_KEY)
