"""Hints for unknown options and commands: lorafold's name for another tool's option, from the
tables of `config_import`, or the nearest name.

    unknown option --lora-r: use --rank 16
    unknown command trian: did you mean train?
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from re import match
from shlex import join, quote, split
from typing import Any

from lorafold.cli.command_line import Word
from lorafold.errors import LorafoldError, listed
from lorafold.foreign_options import FOREIGN_OPTIONS, SERVER_OPTION_NAMES, SIMILARITY

SAMPLES = ("true", "1")  # for a missing value of a switch or a number
SPELT = 0.9  # similarity of a misspelling
ROOM = 270  # characters of all hints
# commands of other tools
COMMANDS = {
    **dict.fromkeys(("finetune", "fine-tune", "fine_tune", "lora", "qlora"), "train"),
    **dict.fromkeys(("infer", "inference", "predict", "run"), "generate"),
    **dict.fromkeys(("fuse", "merge-lora", "merge_and_unload"), "merge"),
    "test": "eval",
}
# hints for names without an equivalent option, by an option of the command
HINTS = {
    "--adapters": {
        **dict.fromkeys(
            ("max_model_len", "context_length", "ctx_size"),
            "use length (max_model_len) in the file of --config",
        )
    },
    "--into": dict.fromkeys(("dtype", "torch_dtype"), "merged weights keep the dtype of the files"),
}


def no_command(
    name: str, commands: Collection[str], path: str, after: Sequence[str] = (), where: str = ""
) -> LorafoldError:
    """The error for an unknown command below `path`. `after` are the following words; if `path`
    takes a path, `where` is its option.
    """
    from lorafold.objectives import OBJECTIVES

    if name in OBJECTIVES and "train" in commands:  # TRL has a command for each
        hint = f"use {path} train --objective {name}"
    elif COMMANDS.get(name) in commands:
        hint = f"use {path} {COMMANDS[name]}"
    elif name == "help":
        below = [word for word in after[:1] if word in commands]
        hint = f"use {' '.join([path, *below])} --help"
    elif where and Path(name).exists():
        hint = f"expected {where} {quote(name)}"
    else:
        hint = _near(name, commands) or f"{path} --help lists all commands"
    return LorafoldError(f"unknown command {name}: {hint}")


def no_options(
    typed: Iterable[Word], options: Mapping[str, Any], path: str
) -> LorafoldError | None:
    """The error for the unknown options of a command line, or None. `options` are the command's, by
    each of their names; `path` is the command as typed.
    """
    unknown = {w.name: w.values[0] if w.values else None for w in typed if w.name and not w.option}
    given = {_plain(name): value for name, value in unknown.items()}
    hints = [f"unknown option {name}: {_hint(name, given, options, path)}" for name in unknown]
    return LorafoldError(listed(hints, "; ", ROOM)) if hints else None


def _hint(name: str, given: Mapping[str, str | None], options: Mapping[str, Any], path: str) -> str:
    names = {_plain(option): option for option in options}
    plain, flags = _plain(name), [option for option in options if option.startswith("-")]
    if names.get(plain) in flags:
        return f"use {names[plain]}"
    if plain in names:
        return f"pass the value without a name, as in {path} {given[plain] or plain.upper()}"
    tables = [table for option, table in HINTS.items() if option in options]
    hint = (
        next((table[plain] for table in tables if plain in table), "")
        or _of_servers(plain, options)
        or _near(name, flags, SPELT)
        or _of_training_tools(plain, given, options)
        or _begun(name, flags)
        or _near(name, flags)
    )
    # or options with the same last word
    last = f"_{plain.rpartition('_')[2]}"
    ending = [flag for flag in flags if "_" in plain and _plain(flag).endswith(last)]
    if not hint and 0 < len(ending) < 4:
        hint = f"did you mean {' or '.join(ending)}?"
    more = options.get("--help-all")
    return hint or f"{path} --help{'' if more is None or more.hidden else '-all'} lists all options"


def _of_servers(plain: str, options: Mapping[str, Any]) -> str:
    known = FOREIGN_OPTIONS.get(plain)
    if known is None or plain not in SERVER_OPTION_NAMES or f"--{known.fields[0]}" not in options:
        return ""
    remark = f", {known.remark}" if known.remark else ""
    return f"use --{known.fields[0]} {known.example}".rstrip() + remark


def _of_training_tools(
    key: str, given: Mapping[str, str | None], options: Mapping[str, Any]
) -> str:
    from lorafold.config_import.translate import counterpart

    known = {name: SAMPLES[0] if value is None else value for name, value in given.items()}
    problems, trains = [], "--lr" in options
    for value in dict.fromkeys([known[key], *SAMPLES]):
        try:
            found = counterpart(key, {**known, key: value})
        except LorafoldError as error:
            problems.append(str(error))
            continue
        if found is None:
            return ""
        fields = [w for field, v in found.fields.items() for w in _typed(field, v, options)]
        words = fields or split(found.flag)
        if not words:  # remarks are about training only
            return "" if found.status == "taken" or not trains else found.remark
        flags = [word for word in words if word.startswith("--")]
        if value != known[key] or (value != given[key] and not found.fields):
            words = flags
        if not {*flags} <= options.keys():
            longer = [option for option in options if key.startswith(f"{_plain(option)}_")]
            elsewhere = f"only lorafold train supports it, as {join(words)}"
            return f"did you mean {longer[0]}?" if longer else elsewhere
        remark = f" ({found.remark})" if fields and found.remark else ""
        return f"use {join(words)}{remark}"
    return problems[0] if trains else ""


def _typed(name: str, value: Any, options: Mapping[str, Any]) -> Iterator[str]:
    from lorafold.cli.parameters import as_typed

    dashed = name.replace("_", "-")
    if isinstance(value, bool) and getattr(options.get(f"--{dashed}"), "is_flag", True):
        yield f"--{dashed}" if value else f"--no-{dashed}"
        return
    if isinstance(value, Mapping):
        value = tuple(f"{key}={entry}" for key, entry in value.items())
    for entry in value if isinstance(value, tuple) else [value]:
        yield from (f"--{dashed}", as_typed(entry))


def _begun(name: str, names: Collection[str]) -> str:
    longer = [flag for flag in names if flag.startswith(name) and len(name) > len("--x")]
    if len(longer) == 1:
        return f"did you mean {longer[0]}?"
    glued = match(r"(--[a-z][a-z-]*?)(-?[.\d].*)$", name)
    return f"did you mean {glued[1]} {glued[2]}?" if glued and glued[1] in names else ""


def _near(name: str, names: Iterable[str], cutoff: float = SIMILARITY) -> str:
    plain = {_plain(known): known for known in names}
    near = get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    return f"did you mean {plain[near[0]]}?" if near else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
