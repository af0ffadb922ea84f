"""The keyword arguments of an Unsloth script, read from its text: nothing of it is executed.

    FastLanguageModel.from_pretrained(model_name="m", ...)     from_pretrained.model_name
    FastLanguageModel.get_peft_model(model, r=16, ...)         get_peft_model.r
    SFTTrainer(..., args=SFTConfig(learning_rate=2e-4, ...))   learning_rate
    load_dataset("acme/chats", split="train")                  load_dataset.path

A value is a literal, or a name that the script gives one literal; every other one is an
`Expression`, its text. Of several calls of one function the first counts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from lorafold.errors import LorafoldError

MODELS = ("FastLanguageModel", "FastModel", "FastVisionModel", "FastTextModel", "FastMllamaModel")
# The trainers, by their kind among TRL's; each has a configuration called XConfig
TRAINERS = {
    "SFTTrainer": "trl-sft",
    "UnslothTrainer": "trl-sft",
    "DPOTrainer": "trl-dpo",
    "KTOTrainer": "trl-kto",
    "ORPOTrainer": "trl-orpo",
    "CPOTrainer": "trl-cpo",
    "RewardTrainer": "trl-reward",
    "GRPOTrainer": "trl-grpo",
    "RLOOTrainer": "trl-rloo",
}
CONFIGS = {name.replace("Trainer", "Config") for name in TRAINERS} | {
    "TrainingArguments",
    "UnslothTrainingArguments",
}
# Functions whose arguments are keys after their name, and the names of those without one
FUNCTIONS = {
    "from_pretrained": ("model_name",),
    "get_peft_model": ("model",),
    "load_dataset": ("path", "name"),
    "get_chat_template": ("tokenizer", "chat_template"),
    "train_on_responses_only": ("trainer",),
}


class Expression(str):
    """The text of a value that is no literal."""


def arguments_of(text: str, where: str) -> Mapping[str, Any]:
    """The arguments of a script, by their keys, and its trainer under `trainer`.

    Args:
        where: The file, for errors.

    Raises:
        LorafoldError: it is no Python, or calls no model of Unsloth's.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise LorafoldError(f"{where}: not Python{f' at line {line}' if line else ''}") from None
    named = _literals(tree)
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for call in _calls(tree):
        name, owner = _name_of(call.func)
        if name in TRAINERS and "trainer" not in found:
            found["trainer"] = name
        elif name not in CONFIGS and name not in FUNCTIONS:
            continue
        if name in seen or (name in ("from_pretrained", "get_peft_model") and owner not in MODELS):
            continue
        seen.add(name)
        prefix = f"{name}." if name in FUNCTIONS else ""
        for key, node in _arguments(call, FUNCTIONS.get(name, ())):
            if not (isinstance(node, ast.Call) and _name_of(node.func)[0] in CONFIGS):
                found[f"{prefix}{key}"] = _value(node, named)
    if not any(key.startswith("from_pretrained.") for key in found):
        raise LorafoldError(
            f"{where}: found no call of {', '.join(MODELS[:2])}.from_pretrained, expected a script"
            " of Unsloth"
        )
    return found


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls in their order, without what stands under `if False`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            for other in node.orelse:
                yield from _calls(other)
            continue
        if isinstance(node, ast.Call):
            yield node
        yield from _calls(node)


def _name_of(function: ast.expr) -> tuple[str, str]:
    """The name of a function, and what it is an attribute of; empty where that is no name."""
    if isinstance(function, ast.Attribute):
        return function.attr, getattr(function.value, "id", "")
    return getattr(function, "id", ""), ""


def _arguments(call: ast.Call, names: tuple[str, ...]) -> Iterator[tuple[str, ast.expr]]:
    for index, node in enumerate(call.args):
        yield names[index] if index < len(names) else f"argument {index + 1}", node
    for keyword in call.keywords:
        yield keyword.arg or f"**{ast.unparse(keyword.value)}", keyword.value


def _literals(tree: ast.Module) -> Mapping[str, Any]:
    """The names to which the script assigns once, and a literal."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            for one in ast.walk(target):
                if isinstance(one, ast.Name):
                    value = getattr(node, "value", target)
                    found = value if isinstance(target, ast.Name) else target
                    assigned.setdefault(one.id, []).append(found)
    once = {name: nodes[0] for name, nodes in assigned.items() if len(nodes) == 1}
    values = {name: _value(node, {}) for name, node in once.items()}
    return {name: value for name, value in values.items() if not isinstance(value, Expression)}


def _value(node: ast.expr, named: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in named:
        return named[node.id]
    try:
        found = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Expression(ast.unparse(node))
    return list(found) if isinstance(found, tuple | set) else found
