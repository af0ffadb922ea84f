"""What an option or a command that there is not is told, in one line: the name that it has here, by
the tables that translate other tools' files, or the nearest name.

    unknown option --lora-r: lorafold's is --rank 16
    unknown command trian: did you mean train?
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from shlex import quote, split
from typing import Any

from lorafold.errors import LorafoldError

SAMPLES = ("true", "1")  # values that stand in for one that is not given: of a switch, of a number


def no_command(name: str, commands: Collection[str], path: str) -> LorafoldError:
    """The error for a command that there is not.

    Args:
        path: The command above it, as it is typed.
    """
    from lorafold.objectives import OBJECTIVES

    if name in OBJECTIVES and "train" in commands:  # TRL has a command for each
        told = f"lorafold's is {path} train --objective {name}"
    else:
        told = _near(name, commands) or f"{path} --help lists all"
    return LorafoldError(f"unknown command {name}: {told}")


def no_options(args: Sequence[str], options: Mapping[str, Any], path: str) -> LorafoldError | None:
    """The error for the options of a command line that there are not, or None where all are there.

    Args:
        options: The command's options, by each of their names.
        path: The command, as it is typed.
    """
    found = dict(_unknown_in(args, options))
    given = {_plain(name): value for name, value in found.items()}
    told = [f"unknown option {name}: {_told(name, given, options, path)}" for name in found]
    return LorafoldError("; ".join(told)) if told else None


def _unknown_in(
    args: Sequence[str], options: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """The options that are not there, each with its value; a value may read like an option."""
    rest = deque(args)
    while rest and rest[0] != "--":
        name, equals, value = rest.popleft().partition("=")
        option = options.get(name)
        if option is not None:
            values = 0 if equals or getattr(option, "is_flag", False) else option.nargs
            for _ in range(min(values, len(rest))):
                rest.popleft()
        elif name.startswith("-") and name.strip("-"):
            has_value = not equals and rest and not rest[0].startswith("--")
            yield name, rest.popleft() if has_value else value or None


def _told(
    name: str, given: Mapping[str, str | None], options: Mapping[str, Any], path: str
) -> str:
    own = {_plain(option): option for option in options}
    if _plain(name) in own:
        return f"lorafold's is {own[_plain(name)]}"
    told = _of_theirs(_plain(name), given, options) or _near(name, options)
    return told or f"{path} {'--help-all' if '--help-all' in own.values() else '--help'} lists all"


def _of_theirs(key: str, given: Mapping[str, str | None], options: Mapping[str, Any]) -> str:
    """What lorafold has for an option of another tool; empty where there is no such option."""
    from lorafold.translating.options import counterpart

    known = {name: SAMPLES[0] if value is None else value for name, value in given.items()}
    problems = list[str]()
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
        if not words:
            return "" if found.how == "taken" else found.remark
        if value != known[key] or (value != given[key] and not found.fields):
            words = [word for word in words if word.startswith("--")]
        if not {word for word in words if word.startswith("--")} <= options.keys():
            return f"it is {_line(words)} of lorafold train"
        remark = f" ({found.remark})" if asked and found.remark else ""
        return f"lorafold's is {_line(words)}{remark}"
    return problems[0]


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


def _near(name: str, names: Collection[str]) -> str:
    """A question for the nearest name; empty where none is near."""
    plain = {_plain(one): one for one in names}
    near = get_close_matches(_plain(name), plain, n=1, cutoff=0.6)
    return f"did you mean {plain[near[0]]}?" if near else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
