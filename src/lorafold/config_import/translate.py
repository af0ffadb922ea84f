"""Converts another tool's file to a recipe, with a report on each key. The recipe's YAML has a
comment on the origin of every line.

A tool is a candidate if the file has one of its markers; the candidate with the fewest unknown keys
is chosen. If two tools tie, or more than a third of the keys are unknown, the user has to name the
tool.
"""

from __future__ import annotations

import json
import os
import shlex
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorafold.config_import import (
    axolotl,
    axolotl_objectives,
    llamafactory,
    mlx,
    peft_config,
    trl,
    unsloth,
)
from lorafold.config_import.rules import Outcome, Rule, ToolSettings, TranslatedKey, apply_rules
from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import read_object, write_text
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.algorithm_options import policy_options, preference_algorithm
from lorafold.peft.config import CONFIG
from lorafold.recipe.parsing import parse_yaml, read_text, yaml_type
from lorafold.recipe.recipe import RAW_ERRORS, Recipe
from lorafold.recipe.resolve_settings import ignored_fields, spec_of, trainable_storage

WIDTH = 100
SECTIONS = {
    "taken": "converted",
    "changed": "converted with a difference",
    "left": "not part of the recipe",
}


AFTER_TURNS = (
    "lorafold's loss excludes text that the chat template adds after the end of a turn, often a"
    " newline; the other tool includes it"
)
NOTES = {
    "trl-sft": f"{AFTER_TURNS}; TRL concatenates a prompt and completion of plain text without a"
    " template: for such rows pass --chat-template none",
    "mlx-lm": f"{AFTER_TURNS}, and one token of padding after each row",
}
UNSUPPORTED_FILES = {  # keys of other files, with a description of the file
    "compute_environment": "an accelerate configuration, which sets up processes and not training;"
    " to start two, run torchrun --nproc_per_node 2 -m lorafold train",
    "zero_optimization": "a DeepSpeed configuration, which sets up sharding and not training; to"
    " shard the weights, run lorafold train --strategy fsdp",
    "model_class": "a LLaMA-Factory v1 configuration, which lorafold can't read; expected the"
    " format with stage and finetuning_type",
    "architectures": "a model configuration, expected a training configuration",
}


@dataclass(frozen=True)
class Tool:
    """Another tool. `markers` are keys, or key=value, separated by spaces; `known` are the keys
    that it supports (None: all); `note` is about settings that its files never contain.
    """

    name: str
    markers: str
    read_keys: Callable[[Mapping[str, Any]], tuple[TranslatedKey, ...]]
    known: frozenset[str] | None
    note: str = ""


def _from_rules(
    name: str,
    markers: str,
    rules: Sequence[Rule],
    flatten: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    note: str = "",
) -> Tool:
    """A tool with a table of rules; `flatten` moves keys in blocks to the top level."""
    known = frozenset(rule.key for rule in rules)
    return Tool(name, markers, lambda config: apply_rules(rules, flatten(config)), known, note)


TOOLS: dict[str, Tool] = {
    "axolotl": _from_rules("axolotl", axolotl.MARKERS, axolotl.RULES, axolotl_objectives.flatten),
    "llamafactory": _from_rules(
        "LLaMA-Factory", llamafactory.MARKERS, llamafactory.RULES, note=AFTER_TURNS
    ),
    **{
        kind: _from_rules(f"TRL's {name}", markers, trl.RULES[kind], note=NOTES.get(kind, ""))
        for kind, (name, markers, _) in trl.TRAINERS.items()
    },
    "mlx-lm": _from_rules("mlx-lm", mlx.MARKERS, mlx.RULES, mlx.flatten_lora, NOTES["mlx-lm"]),
    "unsloth": Tool(
        "Unsloth",
        unsloth.MARKERS,
        unsloth.read_keys,
        unsloth.KNOWN,
        "lorafold reads the script without executing it: if the script processes the rows before"
        " training, apply the same processing to your data",
    ),
    "peft": Tool(
        "PEFT",
        peft_config.MARKERS,
        peft_config.read_keys,
        None,
        "the file sets no data, learning rate, batch size or length: lorafold's defaults apply",
    ),
}
# Switches that are read with another key, and that key's value
SWITCH_SETTINGS = {
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "use_dora": ("use_peft", "true"),
    "use_rslora": ("use_peft", "true"),
}


@dataclass(frozen=True)
class Translation:
    """A recipe, and the outcome of each key of the file and of the tool's defaults that matter.
    `note` is about settings that such a file never contains.
    """

    source: Path
    tool: str
    recipe: Recipe
    taken: tuple[TranslatedKey, ...]
    changed: tuple[TranslatedKey, ...]
    left: tuple[TranslatedKey, ...]
    note: str = ""

    @property
    def entries(self) -> tuple[TranslatedKey, ...]:
        return (*self.taken, *self.changed, *self.left)

    @property
    def unread(self) -> list[TranslatedKey]:
        """Keys that a recipe would contain, but whose values the script computes."""
        return [e for e in self.left if isinstance(e.value, unsloth.Expression) and e.outcome.flag]

    def written(self) -> dict[str, Any]:
        """The recipe's fields that differ from its defaults, and `storage` if a key set it, because
        it would otherwise be taken from the model's files.
        """
        fields = self.recipe.model_dump(mode="json", exclude_unset=True)
        defaults = Recipe().model_dump(mode="json")
        return {
            name: fields[name]
            for name in defaults
            if name in fields and (name == "storage" or fields[name] != defaults[name])
        }

    def to_yaml(self, path: str = "recipe.yaml") -> str:
        """The recipe's YAML, with a comment on the origin of every line. `path` is the recipe's
        path in the command of the header.
        """
        lines = [
            f"# {self.source.name} ({self.tool}), converted by lorafold {version('lorafold')}.",
            f"# {self.command(path)}",
            *(f"# NOT READ: {_key_text(e)}: {e.outcome.remark}" for e in self.unread),
        ]
        for name, value in self.written().items():
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
            line = f"{name}: {text.strip().removesuffix('...').strip()}"
            sources = [entry for entry in self.entries if name in entry.outcome.fields]
            changes = [e.outcome.remark for e in sources if e.outcome.status == "changed"]
            lines += [f"# {remark}:" for remark in changes]
            comment = ", ".join(map(_key_text, sources))
            fits = len(line) + len(comment) + 4 <= WIDTH
            lines += [f"{line}  # {comment}"] if fits else [f"# {comment}", line]
        return "\n".join(lines) + "\n"

    def command(self, config: str = "recipe.yaml") -> str:
        flags = {"--model": "", "--data": "--data DATA", "--eval-data": "", "--out": "--out OUT"}
        given = [entry.outcome.flag for entry in self.entries]
        flags |= {flag.partition(" ")[0]: flag for flag in given}
        parts = ["lorafold train --config", shlex.quote(config), *flags.values()]
        return " ".join(filter(None, parts))

    def as_json(self) -> dict[str, Any]:
        return {
            "source": str(self.source),
            "tool": self.tool,
            "recipe": self.written(),
            "yaml": self.to_yaml(),
            "command": self.command(),
            **{status: [_as_json(e) for e in getattr(self, status)] for status in SECTIONS},
            "note": self.note,
        }

    def report(self, config: str = "recipe.yaml") -> str:
        lines = [f"{self.source} ({self.tool}), converted to a recipe"]
        off = [entry for entry in self.taken if _is_off(entry)]
        for status, head in SECTIONS.items():
            if entries := [entry for entry in getattr(self, status) if entry not in off]:
                lines += [f"{head}:", *_table(entries)]
        if off:
            lines.append(f"off or not set: {', '.join(entry.key for entry in off)}")
        lines += [self.note] * bool(self.note)
        return "\n".join([*lines, f"train with: {self.command(config)}"])

    def __str__(self) -> str:
        return self.report()


def _is_off(entry: TranslatedKey) -> bool:
    off = entry.outcome.remark in ("off", "not set")
    return off and entry.outcome.status == "taken" and not entry.outcome.fields


def _key_text(entry: TranslatedKey) -> str:
    return f"{entry.key}: {_value_text(entry.value)}{'' if entry.given else ' (tool default)'}"


def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table(entries: Sequence[TranslatedKey]) -> Iterator[str]:
    key_texts = [*map(_key_text, entries)]
    wide = min(44, max(map(len, key_texts)))
    for entry, key_text in zip(entries, key_texts, strict=True):
        fields = ", ".join(f"{k}: {_value_text(v)}" for k, v in entry.outcome.fields.items())
        remarks = "; ".join(filter(None, (fields, entry.outcome.remark)))
        line = f"  {key_text:<{wide}}  {'->' if fields else ' -'} {remarks}"
        yield textwrap.fill(
            line, WIDTH, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False
        )


def _as_json(entry: TranslatedKey) -> dict[str, Any]:
    values = vars(entry) | vars(entry.outcome) | {"fields": dict(entry.outcome.fields)}
    return {name: values[name] for name in ("key", "value", "given", "fields", "remark", "flag")}


def translate(path: str | Path, kind: str | None = None) -> Translation:
    if kind is not None and kind not in TOOLS:
        raise LorafoldError(f"kind {kind!r}: expected {', '.join(TOOLS)}")
    source = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    config = _read(source, kind)
    tool = TOOLS[kind or detect_tool(source, config)]
    try:
        entries = tool.read_keys(config)
        recipe = _recipe(entries)
        if spec_of(recipe).trains_base:
            trainable_storage(recipe)
    except LorafoldError as error:
        raise LorafoldError(f"{source}: {error}") from None
    absent = ignored_fields(recipe)
    entries = tuple(_without_fields(entry, absent, recipe.method) for entry in entries)
    by_outcome = {s: tuple(e for e in entries if e.outcome.status == s) for s in SECTIONS}
    return Translation(source, tool.name, _recipe(entries), **by_outcome, note=tool.note)


def write(translation: Translation, out: str | Path, overwrite: bool = False) -> None:
    check_free(out, overwrite)
    write_text(out, translation.to_yaml(str(out)))


def check_free(out: str | Path, overwrite: bool) -> None:
    if Path(out).is_dir():
        raise LorafoldError(f"{out}: found a directory, expected a file for the recipe")
    if os.path.lexists(out) and not overwrite:
        raise LorafoldError(f"{out} exists; pass --overwrite to replace it")


def _read(path: Path, kind: str | None) -> Mapping[str, Any]:
    text = read_text(path, "a training configuration")
    if not text.strip():
        raise LorafoldError(f"{path}: found an empty file, expected a training configuration")
    if path.suffix == ".py" or kind == "unsloth":
        return unsloth.arguments_of(text, str(path))
    if path.suffix == ".json":
        return read_object(path)
    config = parse_yaml(text, str(path))
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise LorafoldError(
            f"{path}: found {yaml_type(config)}, expected `name: value` lines of a training"
            " configuration"
        )
    return config


def _recipe(entries: Sequence[TranslatedKey]) -> Recipe:
    values: dict[str, Any] = {}
    for entry in entries:
        for name, value in entry.outcome.fields.items():
            values[name] = _merge_values(values.get(name), value)

    def keys(*names: str) -> str:
        return ", ".join(e.key for e in entries if {*names} & e.outcome.fields.keys())

    try:
        recipe = Recipe.model_validate(values, context=RAW_ERRORS)
    except ValidationError as error:
        problems = {}
        for problem in error.errors(include_url=False):
            name = str(problem["loc"][0]) if problem["loc"] else ""
            problems[name] = (
                f"{keys(name)}: found {values.get(name)!r} as recipe field {name};"
                f" {problem['msg'].removeprefix('Value error, ').lower()}"
            )
        raise LorafoldError("; ".join(problems.values())) from None
    declared = OBJECTIVES[recipe.objective]
    if declared.law:
        check = policy_options if declared.draws else preference_algorithm
        try:
            check(recipe.objective, recipe.beta, recipe.objective_options)
        except LorafoldError as error:
            raise LorafoldError(f"{keys('beta', 'objective_options')}: {error}") from None
    return recipe


def _merge_values(before: Any, value: Any) -> Any:
    """Combines values of trackers, tokens and options; otherwise, the later value is used."""
    if isinstance(before, tuple) and isinstance(value, tuple) and before != value:
        return (*before, *(one for one in value if one not in before))
    return {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value


def _without_fields(entry: TranslatedKey, names: Sequence[str], method: str) -> TranslatedKey:
    fields = entry.outcome.fields
    rest = {name: value for name, value in fields.items() if name not in names}
    if len(rest) == len(fields):
        return entry
    absent = ", ".join(name for name in fields if name not in rest)
    outcome = Outcome("left", {}, f"method {method} has no option {absent}")
    return replace(entry, outcome=replace(entry.outcome, fields=rest) if rest else outcome)


def detect_tool(path: Path, config: Mapping[str, Any]) -> str:
    markers, unknown = {}, {}
    for kind, tool in TOOLS.items():
        markers[kind] = sum(_has(config, *marker.partition("=")) for marker in tool.markers.split())
        known = config.keys() if tool.known is None else tool.known
        unknown[kind] = [key for key in config if key not in known]
    rank = {kind: (not markers[kind], len(unknown[kind]), -markers[kind]) for kind in TOOLS}
    best, *others = [kind for kind in TOOLS if rank[kind] == min(rank.values())]
    if markers[best] and not others and 3 * len(unknown[best]) <= len(config):
        return best
    keys = [key for key in config if key in Recipe.model_fields]
    if 2 * len(keys) > len(config):
        raise LorafoldError(
            f"{path}: found a lorafold recipe ({listed(keys)}), expected another tool's file; train"
            f" with: lorafold train --config {path}"
        )
    if file_kind := next((what for key, what in UNSUPPORTED_FILES.items() if key in config), None):
        raise LorafoldError(f"{path}: found {file_kind}")
    # PEFT's file may contain any key, so every file would tie with it
    kinds: Collection[str] = [best, *(kind for kind in others if TOOLS[kind].known is not None)]
    names = listed(TOOLS[kind].name for kind in kinds)
    if len(kinds) > 1:
        why = f"{names} match equally well"
    elif markers[best]:
        why = f"{names} does not have {listed(unknown[best])}"
    else:
        why, kinds = "no supported tool has them", TOOLS
    raise LorafoldError(
        f"{path}: the keys do not identify the tool ({listed(config) or 'none'}):"
        f" {why}; choose one with --kind: {', '.join(kinds)}"
    )


def _has(config: Mapping[str, Any], key: str, equals: str, value: str) -> bool:
    given = config.get(key)
    values = given if isinstance(given, list) else [given]
    return key in config and (not equals or value in values)


def counterpart(key: str, given: Mapping[str, Any]) -> Outcome | None:
    """The outcome of another tool's option, such as lora_r; `given` maps all such options to their
    values. None if no tool has the option.
    """
    name, value = SWITCH_SETTINGS.get(key, (key, given[key]))
    for rules in _rule_tables():
        if rule := rules.get(name):
            defaults = {one.key: one.default for one in rules.values()}
            known = {rules[n].key: v for n, v in given.items() if n in rules}
            # a key without effect among the others may have one by itself
            outcomes = (
                rule.reader(value, ToolSettings(others | {rule.key: value}, defaults))
                for others in (known, {})
            )
            return next(filter(None, outcomes), None)
    return None


def _rule_tables() -> Iterator[Mapping[str, Rule]]:
    yield _by_name(trl.RULES["trl-sft"])
    # the arguments of PEFT's LoRA too, without the script's function name
    prefixes = (unsloth.LOAD, unsloth.ADAPT)
    own = [rule for rule in unsloth.MAIN_RULES if rule.key.startswith(prefixes)]
    yield {rule.key.partition(".")[2]: rule for rule in own}
    yield from map(_by_name, (*trl.RULES.values(), llamafactory.RULES, axolotl.RULES, mlx.RULES))


def _by_name(rules: Sequence[Rule]) -> Mapping[str, Rule]:
    return {rule.key: rule for rule in rules}
