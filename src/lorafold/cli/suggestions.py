"""What an option or a command that there is not is told, in one line: the name that it has here, by
the tables that translate other tools' files, or the nearest names.

    unknown option --lora-r: lorafold's is --rank 16
    unknown command trian: did you mean train?
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from re import match
from shlex import quote, split
from typing import Any

from lorafold.advice import ALIKE, ELSEWHERE, OF_SERVERS
from lorafold.cli.command_line import Word
from lorafold.errors import LorafoldError, listed

SAMPLES = ("true", "1")  # values that stand in for one that is not given: of a switch, of a number
SPELT = 0.9  # how alike two names are of which one is a misspelling
TRAIN = "lorafold train"
ROOM = 270  # characters of what is told of several
# what commands are called elsewhere
COMMANDS = {
    **dict.fromkeys(("finetune", "fine-tune", "fine_tune", "lora", "qlora"), "train"),
    **dict.fromkeys(("infer", "inference", "predict", "run"), "generate"),
    **dict.fromkeys(("fuse", "merge-lora", "merge_and_unload"), "merge"),
    "test": "eval",
}
# what is said where a name has no option in its place, by an option that the command has
SAID = {
    "--adapters": {
        **dict.fromkeys(
            ("max_model_len", "context_length", "ctx_size"),
            "lorafold's is length, in the file of --config",
        )
    },
    "--into": dict.fromkeys(("dtype", "torch_dtype"), "merged weights keep the dtype of the files"),
}


def no_command(
    name: str, commands: Collection[str], path: str, after: Sequence[str] = (), where: str = ""
) -> LorafoldError:
    """The error for a command that there is not.

    Args:
        path: The command above it, as it is typed.
        after: The words that follow it.
        where: The option of the command above that takes a path; empty for none.
    """
    from lorafold.objectives import OBJECTIVES

    if name in OBJECTIVES and "train" in commands:  # TRL has a command for each
        told = f"lorafold's is {path} train --objective {name}"
    elif COMMANDS.get(name) in commands:
        told = f"lorafold's is {path} {COMMANDS[name]}"
    elif name == "help":
        below = [word for word in after[:1] if word in commands]
        told = f"lorafold's is {' '.join([path, *below])} --help"
    elif where and Path(name).exists():
        told = f"expected {where} {quote(name)}"
    else:
        told = _near(name, commands) or f"{path} --help lists all"
    return LorafoldError(f"unknown command {name}: {told}")


def no_options(
    typed: Iterable[Word], options: Mapping[str, Any], path: str
) -> LorafoldError | None:
    """The error for the options of a command line that there are not, or None where all are there.

    Args:
        typed: The words of the command line.
        options: The command's options, by each of their names.
        path: The command, as it is typed.
    """
    found = {
        word.name: word.values[0] if word.values else None
        for word in typed
        if word.name and word.option is None
    }
    given = {_plain(name): value for name, value in found.items()}
    told = [f"unknown option {name}: {_told(name, given, options, path)}" for name in found]
    return LorafoldError(listed(told, "; ", ROOM)) if told else None


def _told(name: str, given: Mapping[str, str | None], options: Mapping[str, Any], path: str) -> str:
    own = {_plain(option): option for option in options if option.startswith("-")}
    plain, words = _plain(name), [option for option in options if not option.startswith("-")]
    if plain in own:
        return f"lorafold's is {own[plain]}"
    if plain in words:
        return f"it is given without a name, as in {path} {given[plain] or plain.upper()}"
    tables = [table for option, table in SAID.items() if option in options]
    told = (
        next((table[plain] for table in tables if plain in table), "")
        or _of_servers(plain, options)
        or _near(name, own.values(), SPELT)
        or _of_theirs(plain, given, options)
        or _begun(name, own.values())
        or _near(name, own.values())
        or _sharing(plain, own.values())
    )
    more = options.get("--help-all")
    return told or f"{path} {'--help' if more is None or more.hidden else '--help-all'} lists all"


def _of_servers(plain: str, options: Mapping[str, Any]) -> str:
    """The option of a server, of a converter or of a merger that is not one of training too."""
    named = ELSEWHERE.get(plain)
    if named is None or plain not in OF_SERVERS or f"--{named.names[0]}" not in options:
        return ""
    remark = f", {named.remark}" if named.remark else ""
    return f"lorafold's is --{named.names[0]} {named.like}".rstrip() + remark


def _of_theirs(key: str, given: Mapping[str, str | None], options: Mapping[str, Any]) -> str:
    """What lorafold has for an option of another tool; empty where there is no such option."""
    from lorafold.config_import.run import counterpart

    known = {name: SAMPLES[0] if value is None else value for name, value in given.items()}
    problems, trains = list[str](), "--lr" in options
    for value in dict.fromkeys([known[key], *SAMPLES]):
        try:
            found = counterpart(key, {**known, key: value})
        except LorafoldError as error:
            problems.append(str(error))
            continue
        if found is None:
            return ""
        asked = [word for name, one in found.fields.items() for word in _asked(name, one, options)]
        words = asked or split(found.flag)
        if not words:  # what is said of training is not true elsewhere
            return "" if found.how == "taken" or not trains else found.remark
        if value != known[key] or (value != given[key] and not found.fields):
            words = [word for word in words if word.startswith("--")]
        if not {word for word in words if word.startswith("--")} <= options.keys():
            longer = [option for option in options if key.startswith(f"{_plain(option)}_")]
            return f"did you mean {longer[0]}?" if longer else f"it is {_line(words)} of {TRAIN}"
        remark = f" ({found.remark})" if asked and found.remark else ""
        return f"lorafold's is {_line(words)}{remark}"
    return problems[0] if trains else ""


def _asked(name: str, value: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """The words of a command line that give a field of the recipe this value."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool) and getattr(options.get(option), "is_flag", True):
        yield option if value else f"--no-{name.replace('_', '-')}"
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from (option, f"{key}={one}")
    else:
        for one in value if isinstance(value, tuple) else [value]:
            yield from (option, _text(one))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(words: Iterable[str]) -> str:
    return " ".join(map(quote, words))


def _begun(name: str, names: Iterable[str]) -> str:
    """A question for the one option that a name begins, or that begins a name which goes on with
    its value; empty where there is none.
    """
    longer = [one for one in names if one.startswith(name) and len(name) > len("--x")]
    if len(longer) == 1:
        return f"did you mean {longer[0]}?"
    glued = match(r"(--[a-z][a-z-]*?)(-?[.\d].*)$", name)
    return f"did you mean {glued[1]} {glued[2]}?" if glued and glued[1] in [*names] else ""


def _sharing(plain: str, names: Iterable[str]) -> str:
    """A question for the options whose last word a name has; empty where there are none or many."""
    last = f"_{plain.rpartition('_')[2]}"
    found = [name for name in names if "_" in plain and _plain(name).endswith(last)]
    return f"did you mean {' or '.join(found)}?" if 0 < len(found) < 4 else ""


def _near(name: str, names: Iterable[str], cutoff: float = ALIKE) -> str:
    """A question for the nearest name; empty where none is near."""
    plain = {_plain(one): one for one in names}
    near = get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    return f"did you mean {plain[near[0]]}?" if near else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
