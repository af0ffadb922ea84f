"""The translation of another tool's file: a recipe, a report on each key, and the recipe's YAML
with a comment on the origin of every line.

A file belongs to the tool with the fewest unknown keys among those that have one of their signs in
it. If two tools tie, or more than a third of the keys are unknown, the user has to name the tool.
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
from lorafold.config_import.rules import Outcome, Rule, ToolSettings, TranslatedKey, by_rules, left
from lorafold.errors import LorafoldError
from lorafold.files.atomic import read_object, write_text
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.algorithm_options import policy_options, preference_algorithm
from lorafold.peft.config import CONFIG
from lorafold.recipe.parsing import parse_yaml, read_text, yaml_type
from lorafold.recipe.recipe import RAW_ERRORS, Recipe
from lorafold.recipe.resolve_settings import ignored_fields, spec_of, trainable_storage

WIDTH = 100
HEADS = {
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
STRANGERS = {  # keys of other files, with a description of the file
    "compute_environment": "an accelerate configuration, which sets up processes and not training;"
    " to start two, run torchrun --nproc_per_node 2 -m lorafold train",
    "zero_optimization": "a DeepSpeed configuration, which sets up sharding and not training; to"
    " shard the weights, run lorafold train --strategy fsdp",
    "model_class": "a LLaMA-Factory v1 configuration, which lorafold can't read; expected the"
    " format with stage and finetuning_type",
    "architectures": "a model configuration, expected a training configuration",
}
SHOWN = 3  # fields named in a line, at most


@dataclass(frozen=True)
class Tool:
    """Another tool: its name, its signs (keys, or key=value, separated by spaces), the reader of
    its files, its known keys (None: all), and a note on settings that its files never contain.
    """

    name: str
    signs: str
    entries: Callable[[Mapping[str, Any]], tuple[TranslatedKey, ...]]
    known: frozenset[str] | None
    note: str = ""


def _by_rules(
    name: str,
    signs: str,
    rules: Sequence[Rule],
    flat: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    note: str = "",
) -> Tool:
    """A tool with a table of rules; `flat` moves the keys of blocks to the top level."""
    known = frozenset(rule.key for rule in rules)
    return Tool(name, signs, lambda config: by_rules(rules, flat(config)), known, note)


TOOLS: dict[str, Tool] = {
    "axolotl": _by_rules("axolotl", axolotl.SIGNS, axolotl.RULES, axolotl_objectives.flat),
    "llamafactory": _by_rules(
        "LLaMA-Factory", llamafactory.SIGNS, llamafactory.RULES, note=AFTER_TURNS
    ),
    **{
        kind: _by_rules(f"TRL's {name}", signs, trl.RULES[kind], note=NOTES.get(kind, ""))
        for kind, (name, signs, _) in trl.TRAINERS.items()
    },
    "mlx-lm": _by_rules("mlx-lm", mlx.SIGNS, mlx.RULES, mlx.flat, NOTES["mlx-lm"]),
    "unsloth": Tool(
        "Unsloth",
        unsloth.SIGNS,
        unsloth.entries,
        unsloth.KNOWN,
        "lorafold reads the script without executing it: if the script processes the rows before"
        " training, apply the same processing to your data",
    ),
    "peft": Tool(
        "PEFT",
        peft_config.SIGNS,
        peft_config.entries,
        None,
        "the file sets no data, learning rate, batch size or length: lorafold's defaults apply",
    ),
}
# Switches that are read with another key, and that key's value
SWITCHES = {
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "use_dora": ("use_peft", "true"),
    "use_rslora": ("use_peft", "true"),
}


@dataclass(frozen=True)
class Translation:
    """A recipe, and the outcome of each key of the file and of the tool's defaults that matter;
    `note` lists what such a file never contains.
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
        """The keys of a script with computed values that a recipe would contain."""
        return [e for e in self.left if isinstance(e.value, unsloth.Expression) and e.outcome.flag]

    def written(self) -> dict[str, Any]:
        """The recipe's fields that differ from its defaults, and `storage` if a key set it, because
        without it the model's files would decide.
        """
        fields = self.recipe.model_dump(mode="json", exclude_unset=True)
        defaults = Recipe().model_dump(mode="json")
        return {
            name: fields[name]
            for name in defaults
            if name in fields and (name == "storage" or fields[name] != defaults[name])
        }

    def to_yaml(self, path: str = "recipe.yaml") -> str:
        """The recipe's YAML, with a comment on the origin of every line. `path` is the file's, for
        the command in its header.
        """
        lines = [
            f"# {self.source.name} ({self.tool}), converted by lorafold {version('lorafold')}.",
            f"# {self.command(path)}",
            *(f"# NOT READ: {_named(e)}: {e.outcome.remark}" for e in self.unread),
        ]
        for name, value in self.written().items():
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
            line = f"{name}: {text.strip().removesuffix('...').strip()}"
            sources = [entry for entry in self.entries if name in entry.outcome.fields]
            changes = [e.outcome.remark for e in sources if e.outcome.how == "changed"]
            lines += [f"# {remark}:" for remark in changes]
            comment = ", ".join(map(_named, sources))
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
            **{how: [_as_json(e) for e in getattr(self, how)] for how in HEADS},
            "note": self.note,
        }

    def report(self, config: str = "recipe.yaml") -> str:
        lines = [f"{self.source} ({self.tool}), converted to a recipe"]
        silent = [entry for entry in self.taken if _is_silent(entry)]
        for how, head in HEADS.items():
            if entries := [entry for entry in getattr(self, how) if entry not in silent]:
                lines += [f"{head}:", *_table(entries)]
        if silent:
            lines.append(f"off or not set: {', '.join(entry.key for entry in silent)}")
        lines += [self.note] * bool(self.note)
        return "\n".join([*lines, f"train with: {self.command(config)}"])

    def __str__(self) -> str:
        return self.report()


def _is_silent(entry: TranslatedKey) -> bool:
    off = entry.outcome.remark in ("off", "not set")
    return off and entry.outcome.how == "taken" and not entry.outcome.fields


def _named(entry: TranslatedKey) -> str:
    return f"{entry.key}: {_shown(entry.value)}{'' if entry.given else ' (tool default)'}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table(entries: Sequence[TranslatedKey]) -> Iterator[str]:
    left = [*map(_named, entries)]
    wide = min(44, max(map(len, left)))
    for entry, theirs in zip(entries, left, strict=True):
        fields = ", ".join(f"{k}: {_shown(v)}" for k, v in entry.outcome.fields.items())
        remarks = "; ".join(filter(None, (fields, entry.outcome.remark)))
        line = f"  {theirs:<{wide}}  {'->' if fields else ' -'} {remarks}"
        yield textwrap.fill(
            line, WIDTH, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False
        )


def _as_json(entry: TranslatedKey) -> dict[str, Any]:
    values = vars(entry) | vars(entry.outcome)
    names = ("key", "value", "given", "fields", "remark", "flag")
    return {name: values[name] for name in names} | {"fields": dict(entry.outcome.fields)}


def translate(path: str | Path, kind: str | None = None) -> Translation:
    if kind is not None and kind not in TOOLS:
        raise LorafoldError(f"kind {kind!r}: expected {', '.join(TOOLS)}")
    source = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    config = _read(source, kind)
    tool = TOOLS[kind or tool_of(source, config)]
    try:
        entries = tool.entries(config)
        recipe = _recipe(entries)
        if spec_of(recipe).trains_base:
            trainable_storage(recipe)
    except LorafoldError as error:
        raise LorafoldError(f"{source}: {error}") from None
    absent = ignored_fields(recipe)
    entries = tuple(_without(entry, absent, recipe.method) for entry in entries)
    by_outcome = {how: tuple(e for e in entries if e.outcome.how == how) for how in HEADS}
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
            values[name] = _joined(values.get(name), value)

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


def _joined(before: Any, value: Any) -> Any:
    """The later value, but both values for trackers, tokens and options."""
    if isinstance(before, tuple) and isinstance(value, tuple) and before != value:
        return (*before, *(one for one in value if one not in before))
    return {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value


def _without(entry: TranslatedKey, names: Sequence[str], method: str) -> TranslatedKey:
    fields = entry.outcome.fields
    rest = {name: value for name, value in fields.items() if name not in names}
    if len(rest) == len(fields):
        return entry
    absent = ", ".join(name for name in fields if name not in rest)
    outcome = left(f"method {method} has no option {absent}")
    return replace(entry, outcome=replace(entry.outcome, fields=rest) if rest else outcome)


def tool_of(path: Path, config: Mapping[str, Any]) -> str:
    signs, unknown = {}, {}
    for kind, tool in TOOLS.items():
        signs[kind] = sum(_has(config, *sign.partition("=")) for sign in tool.signs.split())
        known = config.keys() if tool.known is None else tool.known
        unknown[kind] = [key for key in config if key not in known]
    rank = {kind: (not signs[kind], len(unknown[kind]), -signs[kind]) for kind in TOOLS}
    best, *others = [kind for kind in TOOLS if rank[kind] == min(rank.values())]
    if signs[best] and not others and 3 * len(unknown[best]) <= len(config):
        return best
    own = [key for key in config if key in Recipe.model_fields]
    if 2 * len(own) > len(config):
        raise LorafoldError(
            f"{path}: found a lorafold recipe ({_some(own)}), expected another tool's file; train"
            f" with: lorafold train --config {path}"
        )
    if stranger := next((what for key, what in STRANGERS.items() if key in config), None):
        raise LorafoldError(f"{path}: found {stranger}")
    # PEFT's file may contain any key, so it only counts with its own
    kinds: Collection[str] = [best, *(kind for kind in others if TOOLS[kind].known is not None)]
    names = _some([TOOLS[kind].name for kind in kinds])
    if len(kinds) > 1:
        why = f"{names} match equally well"
    elif signs[best]:
        why = f"{names} does not have {_some(unknown[best])}"
    else:
        why, kinds = "no supported tool has them", TOOLS
    raise LorafoldError(
        f"{path}: the keys do not identify the tool ({_some(list(config)) or 'none'}):"
        f" {why}; choose one with --kind: {', '.join(kinds)}"
    )


def _has(config: Mapping[str, Any], key: str, equals: str, value: str) -> bool:
    given = config.get(key)
    values = given if isinstance(given, list) else [given]
    return key in config and (not equals or value in values)


def _some(keys: Sequence[str]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def counterpart(key: str, given: Mapping[str, Any]) -> Outcome | None:
    """The outcome of an option of any of the tools, such as lora_r, given all such options in
    `given`; None if no tool has it.
    """
    name, value = SWITCHES.get(key, (key, given[key]))
    for rules in _tables():
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


def _tables() -> Iterator[Mapping[str, Rule]]:
    yield _by_name(trl.RULES["trl-sft"])
    # the arguments of PEFT's LoRA too, without the script's function name
    calls = (unsloth.LOADED, unsloth.ADAPTED)
    own = [rule for rule in unsloth.OWN if rule.key.startswith(calls)]
    yield {rule.key.partition(".")[2]: rule for rule in own}
    yield from map(_by_name, (*trl.RULES.values(), llamafactory.RULES, axolotl.RULES, mlx.RULES))


def _by_name(rules: Sequence[Rule]) -> Mapping[str, Rule]:
    return {rule.key: rule for rule in rules}
