"""Splits a command line into options with their values, and positional arguments.

    --rank 8 --json rows.jsonl      --rank with 8, --json, and rows.jsonl by position
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ALIASES = {"--method": ("--mode",)}
# old name of an option -> current names, of which the first one that the command has applies
OLD_NAMES = {
    "--base": ("--quantization", "--model"),
    "--seq": ("--max-length",),
    "--answers": ("--completions",),
    "--no-answers": ("--no-completions",),
}
Options = Mapping[str, Any]  # of a command, by name
OTHER_NAMES = ALIASES | OLD_NAMES


class Word(NamedTuple):
    """An option with its values, or a positional argument, which has an empty name and one value.

    name: The option's name as typed.
    option: The declared option, or None if the name is unknown.
    args: The arguments to pass to Typer, with the option's current name.
    """

    name: str
    option: Any | None
    values: tuple[str, ...]
    args: tuple[str, ...]


def split_words(args: Sequence[str], options: Options, interspersed: bool) -> Iterator[Word]:
    """Yields the options and positional arguments of a command line. `options` contains each
    option under all of its names.

    A declared option takes its value even if that begins with a dash. An unknown option takes the
    next argument as its value, unless that begins with two dashes. For an option with the values
    on|off|auto, `--x` means on and `--no-x` means off. If options are not `interspersed`, the first
    positional argument ends the iteration.
    """
    current_names = {
        other: name
        for other, names in OTHER_NAMES.items()
        for name in reversed(names)
        if name in options and other not in options
    }
    switches = {name for name, p in options.items() if str(p.metavar).startswith("on|off")}
    rest = deque(args)
    while rest:
        word = rest.popleft()
        name, equals, value = word.partition("=")
        current, values = current_names.get(name, name), (value,) * bool(equals)
        if not equals and f"--{name.removeprefix('--no-')}" in switches:
            current, values = f"--{name.removeprefix('--no-')}", ("off",)
        elif not equals and name in switches and (not rest or rest[0].startswith("-")):
            values = ("on",)
        option = options.get(current)
        if word == "--":
            for n, one in enumerate(rest):
                yield Word("", None, (one,), ("--", one)[n > 0 :])
            return
        if option is not None:
            count = 0 if getattr(option, "is_flag", False) else option.nargs
            for _ in range(min(max(count - len(values), 0), len(rest))):
                values = (*values, rest.popleft())
            typer_args = (f"{current}={value}", *values[1:]) if equals else (current, *values)
            yield Word(name, option, values, typer_args)
        elif name.startswith("-") and name.strip("-"):
            if not equals and rest and not rest[0].startswith("--"):
                values = (rest.popleft(),)
            yield Word(name, None, values, (word, *values[bool(equals) :]))
        else:
            yield Word("", None, (word,), (word, *(() if interspersed else rest)))
            if not interspersed:
                return
