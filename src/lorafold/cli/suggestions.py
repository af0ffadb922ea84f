"""Hints for unknown options and commands: lorafold's equivalent of another tool's option, from
`foreign_options` and `config_import`, or the most similar name.

    unknown option --lora-r: use --rank 16
    unknown command trian: did you mean train?
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from re import match
from shlex import join, quote, split
from typing import Any

from lorafold.cli.command_line import Options, Word
from lorafold.errors import LorafoldError, listed
from lorafold.foreign_options import FOREIGN_OPTIONS, SERVER_OPTION_NAMES, SIMILARITY, TABLES

SAMPLE_VALUES = ("true", "1")  # tried if a value is missing or invalid
MISSPELLING_CUTOFF = 0.9  # minimum similarity of a misspelling
MAX_HINTS_LENGTH = 270  # characters of all hints
# command of another tool -> lorafold's command
COMMANDS = {name: ours for ours, names in TABLES["commands"].items() for name in names.split()}
# option that a command has -> hints for other tools' options without an equivalent
HINTS = {
    option: {name: hint for names, hint in hints.items() for name in names.split()}
    for option, hints in TABLES["hints"].items()
}


def unknown_command(
    name: str, commands: Mapping[str, str], path: str, rest: Sequence[str], option: str
) -> LorafoldError:
    """Returns the error for an unknown subcommand `name` of the command `path`, whose subcommands
    are typed as in `commands`. `rest` contains the arguments after it. `option` is the option to
    suggest if `name` is an existing path.
    """
    from lorafold.objectives import OBJECTIVES

    if name in OBJECTIVES and "train" in commands:  # TRL has a command for each
        hint = f"use {path} train --objective {name}"
    elif (known := COMMANDS.get(name, name)) in commands:
        hint = f"use {path} {commands[known]}"
    elif name == "help":
        subcommand = [commands[word] for word in rest[:1] if word in commands]
        hint = f"use {' '.join([path, *subcommand])} --help"
    elif option and Path(name).exists():
        hint = f"expected {option} {quote(name)}"
    else:
        near = get_close_matches(_normalized(name), commands, 1, SIMILARITY)
        hint = f"{path} --help lists all commands"
        hint = f"did you mean {path} {commands[near[0]]}?" if near else hint
    return LorafoldError(f"unknown command {name}: {hint}")


def unknown_options(typed: Iterable[Word], options: Options, path: str) -> LorafoldError | None:
    """Returns the error for the unknown options of a command line, or None if there are none.
    `path` is the command as typed, for example lorafold train.
    """
    unknown = {w.name: w.values[0] if w.values else None for w in typed if w.name and not w.option}
    values = {_normalized(name): value for name, value in unknown.items()}
    hints = [f"unknown option {name}: {_hint(name, values, options, path)}" for name in unknown]
    return LorafoldError(listed(hints, "; ", MAX_HINTS_LENGTH)) if hints else None


def _hint(name: str, typed: Mapping[str, str | None], options: Options, path: str) -> str:
    names = {_normalized(option): option for option in options}
    plain, flags = _normalized(name), [option for option in options if option.startswith("-")]
    if names.get(plain) in flags:
        return f"use {names[plain]}"
    if plain in names:
        return f"pass the value without a name, as in {path} {typed[plain] or plain.upper()}"
    tables = [table for option, table in HINTS.items() if option in options]
    hint = (
        next((table[plain] for table in tables if plain in table), "")
        or _server_hint(plain, options)
        or _suggest_nearest(name, flags, MISSPELLING_CUTOFF)
        or _training_tool_hint(plain, typed, options)
        or _suggest_completion(name, flags)
        or _suggest_nearest(name, flags)
    )
    # otherwise, suggest options with the same last word
    last = f"_{plain.rpartition('_')[2]}"
    same_ending = [flag for flag in flags if "_" in plain and _normalized(flag).endswith(last)]
    if not hint and 0 < len(same_ending) < 4:
        hint = f"did you mean {' or '.join(same_ending)}?"
    rare = options.get("--help-all")
    return hint or f"{path} --help{'' if rare is None or rare.hidden else '-all'} lists all options"


def _server_hint(plain: str, options: Options) -> str:
    counterpart = FOREIGN_OPTIONS.get(plain) if plain in SERVER_OPTION_NAMES else None
    if counterpart is None or f"--{counterpart.fields[0]}" not in options:
        return ""
    remark = f", {counterpart.remark}" if counterpart.remark else ""
    return f"use --{counterpart.fields[0]} {counterpart.example}".rstrip() + remark


def _training_tool_hint(key: str, values: Mapping[str, str | None], options: Options) -> str:
    samples = {name: SAMPLE_VALUES[0] if value is None else value for name, value in values.items()}
    problems, trains = [], "--lr" in options
    for value in dict.fromkeys([samples[key], *SAMPLE_VALUES]):
        try:
            translated = counterpart(key, {**samples, key: value})
        except LorafoldError as error:
            problems.append(str(error))
            continue
        if translated is None:
            return ""
        fields = [w for field, v in translated.fields.items() for w in _flags(field, v, options)]
        words = fields or split(translated.flag)
        if not words:  # remarks are about training only
            return "" if translated.status == "taken" or not trains else translated.remark
        flags = [word for word in words if word.startswith("--")]
        if value != samples[key] or (value != values[key] and not translated.fields):
            words = flags
        if not {*flags} <= options.keys():
            longer = [option for option in options if key.startswith(f"{_normalized(option)}_")]
            only_train = f"only lorafold train supports it, as {join(words)}"
            return f"did you mean {longer[0]}?" if longer else only_train
        remark = f" ({translated.remark})" if fields and translated.remark else ""
        return f"use {join(words)}{remark}"
    return problems[0] if trains else ""


def counterpart(key: str, given: Mapping[str, Any]) -> Any:
    """The outcome of another tool's option, such as lora_r; `given` maps all such options to their
    values. None if no tool has the option.
    """
    from lorafold.config_import.rules import ToolSettings

    name, value = TABLES["read_with"].get(key, (key, given[key]))
    for rules in _rule_tables():
        if rule := rules.get(name):
            defaults = {one.key: one.default for one in rules.values()}
            # a key without effect among the others may have one by itself
            outcomes = (
                rule.reader(value, ToolSettings(others | {rule.key: value}, defaults))
                for others in ({rules[n].key: v for n, v in given.items() if n in rules}, {})
            )
            return next(filter(None, outcomes), None)
    return None


def _rule_tables() -> Iterator[Mapping[str, Any]]:
    from lorafold.config_import import axolotl, llamafactory, mlx, swift, trl, unsloth

    # the arguments of PEFT's LoRA too, without the script's function name
    own = [r for r in unsloth.MAIN_RULES if r.key.startswith((unsloth.LOAD, unsloth.ADAPT))]
    tables = (llamafactory.RULES, axolotl.RULES, mlx.RULES, swift.RULES[swift.SFT])
    yield {rule.key: rule for rule in trl.RULES["trl-sft"]}
    yield {rule.key.partition(".")[2]: rule for rule in own}
    yield from ({rule.key: rule for rule in one} for one in (*trl.RULES.values(), *tables))


def _flags(name: str, value: Any, options: Options) -> Iterator[str]:
    from lorafold.cli.parameters import as_typed

    option = options.get(f"--{name.replace('_', '-')}")
    dashed = option.opts[0].strip("-") if option else name.replace("_", "-")
    if isinstance(value, bool) and getattr(option, "is_flag", True):
        yield f"--{dashed}" if value else f"--no-{dashed}"
        return
    if isinstance(value, Mapping):
        value = tuple(f"{key}={entry}" for key, entry in value.items())
    for entry in value if isinstance(value, tuple) else [value]:
        yield from (f"--{dashed}", as_typed(entry))


def _suggest_completion(name: str, names: Collection[str]) -> str:
    longer = [flag for flag in names if flag.startswith(name) and len(name) > len("--x")]
    if len(longer) == 1:
        return f"did you mean {longer[0]}?"
    joined = match(r"(--[a-z][a-z-]*?)(-?[.\d].*)$", name)
    return f"did you mean {joined[1]} {joined[2]}?" if joined and joined[1] in names else ""


def _suggest_nearest(name: str, names: Iterable[str], cutoff: float = SIMILARITY) -> str:
    plain = {_normalized(known): known for known in names}
    near = get_close_matches(_normalized(name), plain, n=1, cutoff=cutoff)
    return f"did you mean {plain[near[0]]}?" if near else ""


def _normalized(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
