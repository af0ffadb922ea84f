"""Converts Unsloth's scripts as of August 2026: the keyword arguments of its model functions and of
TRL's trainers, with Unsloth's defaults in place of TRL's.

    FastLanguageModel.get_peft_model(model, r=16, ...)         get_peft_model.r
    SFTTrainer(..., args=SFTConfig(learning_rate=2e-4, ...))   learning_rate

A script is parsed and never executed. A value is a literal, or a name to which the script assigns
one literal; any other value is an `Expression`. Only the first call of each function counts, and of
all trainers' configurations. Processing of rows before training is ignored.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafold.config_import import trainer, trl
from lorafold.config_import.rules import (
    KEYS,
    PLACEHOLDER,
    Expression,
    Outcome,
    Rule,
    Table,
    ToolSettings,
    TranslatedKeys,
    Values,
    apply_rules,
    changed,
    data_outcome,
    dataset,
    expected_rows,
    mapped,
    static_rows,
    table,
    unmapped,
)
from lorafold.errors import LorafoldError
from lorafold.foreign_options import boolean, integer, modules
from lorafold.models.quantizations import bnb_storage

LOAD, ADAPT, DATASET = "from_pretrained.", "get_peft_model.", "load_dataset."
NAMES = KEYS["names"]["unsloth"]
LINEARS: Sequence[str] = NAMES["linears"]
MODELS: Sequence[str] = NAMES["models"]
WHOLE = ("embed_tokens", "lm_head")
# the translation's kind, by trainer; the configuration of XTrainer is called XConfig
TRAINERS: Mapping[str, str] = NAMES["trainers"]
CONFIGS = NAMES["configs"]
FUNCTIONS: Mapping[str, Sequence[str]] = NAMES["functions"]


def is_lora(settings: ToolSettings) -> bool:
    return not settings.is_on(f"{LOAD}full_finetuning")


def _method(value: Any, settings: ToolSettings) -> Outcome:
    if boolean(value):
        return mapped(method="full")
    start = settings[f"{ADAPT}init_lora_weights"]
    loftq = settings[f"{ADAPT}loftq_config"]
    rslora = settings.is_on(f"{ADAPT}use_rslora")
    return trainer.kind_of_lora(False, rslora, "loftq" if loftq else start)


def storage(value: Any, settings: ToolSettings) -> Outcome:
    if not is_lora(settings):
        return changed("lorafold uses bf16, Unsloth only if the GPU supports it", storage="bf16")
    if settings.is_on(f"{LOAD}load_in_8bit"):
        return mapped(storage=bnb_storage(8))
    if settings[f"{LOAD}load_in_fp8"]:
        return changed("lorafold quantizes to nf4 or int8; int8 is used", storage="int8")
    if not boolean(value) or settings.is_on(f"{LOAD}load_in_16bit"):
        return mapped(storage="auto")
    return mapped(storage=bnb_storage(4))


def _length(value: Any, settings: ToolSettings) -> Outcome:
    own = [settings[key] for key in ("max_length", "max_seq_length")]
    return mapped(max_length=min(integer(one) for one in (value, *own) if one is not None))


def _targets(value: Any, settings: ToolSettings) -> Outcome:
    """Embeddings among the targets are trained as a whole."""
    given = modules(value)
    whole = tuple(name for name in WHOLE if not isinstance(given, str) and name in given)
    if not whole:
        return mapped(targets=given)
    return mapped(
        "Unsloth trains embeddings as a whole, without LoRA",
        targets=tuple(name for name in given if name not in whole),
        modules_to_save=whole,
    )


def objective_of(settings: ToolSettings) -> str | None:
    return trl.OBJECTIVES.get(TRAINERS.get(str(settings["trainer"]), ""))


def _loaded_rows(value: Any, settings: ToolSettings) -> Outcome:
    name, split, files = (settings[f"{DATASET}{key}"] for key in ("name", "split", "data_files"))
    return data_outcome([dataset(value, name, split, files)], objective_of(settings))


def _prefixed(prefix: str, rows: Table) -> Table:
    return {" ".join(f"{prefix}{k}" for k in keys.split()): row for keys, row in rows.items()}


LOADING_KEYS: Table = {
    "full_finetuning": (_method, False),
    "load_in_4bit": (storage, True),
    "max_seq_length": (_length, 2048),
    **static_rows("unsloth_loading"),
}
ADAPTER_KEYS: Table = {
    "use_gradient_checkpointing": (
        lambda value, settings: (
            changed("lorafold recomputes activations only if memory is short; no offloading")
            if value == "unsloth"
            else mapped(gradient_checkpointing=boolean(value))
        ),
        "unsloth",
    ),
    **static_rows("unsloth_adapter"),
}
LORA_KEYS: Table = {
    "target_modules": (_targets, LINEARS),
    "target_parameters": trainer.parameters_besides(f"{ADAPT}target_modules"),
    **static_rows("unsloth_lora"),
}
MAIN_RULES = (
    *table(
        {
            **_prefixed(LOAD, LOADING_KEYS),
            **_prefixed(ADAPT, ADAPTER_KEYS),
            "learning_rate": (trainer.rate(is_lora), 5e-5),
            f"{DATASET}path": _loaded_rows,
            "train_dataset": lambda value, settings: (
                mapped("loaded by load_dataset")
                if settings[f"{DATASET}path"]
                else unmapped(expected_rows(objective_of(settings)), PLACEHOLDER)
            ),
            **static_rows("unsloth"),
        }
    ),
    *table(_prefixed(ADAPT, LORA_KEYS), is_lora),
)


def _rules(kind: str) -> tuple[Rule, ...]:
    defaults = {**NAMES["defaults"], **NAMES["loss_defaults"].get(kind, {})}
    dropout = table({f"{ADAPT}lora_dropout": (trl.DROPOUTS[kind], 0.0)}, is_lora)
    return trl.rules_over(trl.RULES[kind], (*MAIN_RULES, *dropout), defaults)


RULES = {kind: _rules(kind) for kind in dict.fromkeys(TRAINERS.values())}
KNOWN = frozenset(rule.key for rules in RULES.values() for rule in rules)


def read_keys(config: Values) -> TranslatedKeys:
    rules = RULES[TRAINERS.get(config.get("trainer", ""), "trl-sft")]
    own = NAMES["objects"].split()
    objects = {"bf16", "fp16", *(r.key for r in MAIN_RULES if r.key.split(".")[-1] in own)}
    return apply_rules(rules, config, objects)


def arguments_of(text: str, source: str) -> Values:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f"line {n}: " if (n := getattr(error, "lineno", None)) else ""
        raise LorafoldError(f"{source}: {line}not valid Python") from None
    literals, seen = _literals(tree), set[str]()
    arguments: dict[str, Any] = {}
    for call in _calls(tree):
        name, owner = _name_of(call.func)
        what = "trainer" if name in TRAINERS else "config" if name in CONFIGS else name
        if what == name and name not in FUNCTIONS:
            continue
        if what == "trainer" and what in seen:
            more = *arguments.get("another_training", ()), f"{name} (line {call.lineno})"
            arguments["another_training"] = more
        if what in seen or (name in ("from_pretrained", "get_peft_model") and owner not in MODELS):
            continue
        seen.add(what)
        if what == "trainer":
            arguments[what] = name
        prefix = f"{name}." if name in FUNCTIONS else ""
        for key, node in _arguments(call, FUNCTIONS.get(name, ())):
            if not (isinstance(node, ast.Call) and _name_of(node.func)[0] in CONFIGS):
                arguments[f"{prefix}{key}"] = _value(node, literals)
    if not any(key.startswith(LOAD) for key in arguments):
        raise LorafoldError(
            f"{source}: found no from_pretrained call of {' or '.join(MODELS[:2])}, expected an"
            " Unsloth script"
        )
    return arguments


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Yields the calls in order, except calls under `if False`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            node = ast.Module(node.orelse, [])
        yield from _calls(node)


def _name_of(function: ast.expr) -> tuple[str, str]:
    if isinstance(function, ast.Attribute):
        return function.attr, getattr(function.value, "id", "")
    return getattr(function, "id", ""), ""


def _arguments(call: ast.Call, names: Sequence[str]) -> Iterator[tuple[str, ast.expr]]:
    for index, node in enumerate(call.args):
        yield names[index] if index < len(names) else f"argument {index + 1}", node
    for keyword in call.keywords:
        yield keyword.arg or f"**{ast.unparse(keyword.value)}", keyword.value


def _literals(tree: ast.Module) -> Values:
    """The names to which the script assigns exactly once, with a literal, and these values."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]:
        for target in node.targets:
            value = node.value if isinstance(target, ast.Name) else target
            for one in ast.walk(target):
                if isinstance(one, ast.Name):
                    assigned.setdefault(one.id, []).append(value)
    values = {name: _value(nodes[0], {}) for name, nodes in assigned.items() if len(nodes) == 1}
    return {name: value for name, value in values.items() if not isinstance(value, Expression)}


def _value(node: ast.expr, literals: Values) -> Any:
    if isinstance(node, ast.Name) and node.id in literals:
        return literals[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Expression(ast.unparse(node))
    return list(value) if isinstance(value, tuple | set) else value
