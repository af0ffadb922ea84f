"""What a command line that can't be read is told, in one line: which values are wrong or missing,
which options stand twice, and which words belong to no option.

    --rank: found '8.5', expected a whole number
    --rank: found 8 and 16, expected it once; see lorafold train --help
    found rows.jsonl without an option, expected --data rows.jsonl --out PATH; see ...
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from lorafold.cli.command_line import Word
from lorafold.cli.suggestions import no_options
from lorafold.errors import LorafoldError, shortened

SWITCHED = {"true", "false", "yes", "no", "on", "off", "1", "0"}
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # which an editor puts for two of them
SPOKEN = {"prompt", "system"}  # options whose values are texts that people speak
WHOLE, FRACTION = "a whole number", "a number"
BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    **dict.fromkeys(("int_parsing", "int_from_float", "int_type"), WHOLE),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), FRACTION),
}


class Line(NamedTuple):
    """A command line as it is typed.

    options: The command's options, by each of their names.
    path: The command, as it is typed.
    """

    words: Sequence[Word]
    options: Mapping[str, Any]
    path: str

    @property
    def see(self) -> str:
        """Where to look."""
        return f"see {self.path} --help"

    @property
    def stray(self) -> list[str]:
        """The words that belong to no option."""
        return [word.values[0] for word in self.words if not word.name]


def repeated(line: Line) -> LorafoldError | None:
    """The error for options that are given more than once, with values of which one alone would be
    taken, or None.
    """
    given: dict[str, dict[str, str]] = {}
    for name, option, values in line.words:
        if option is not None and not getattr(option, "multiple", False):
            value = name if getattr(option, "is_flag", False) else " ".join(map(str, values))
            given.setdefault(str(option.name), {})[value] = name
    told = [
        f"{next(iter(found.values()))}: found {' and '.join(found)}, expected it once"
        for found in given.values()
        if len(found) > 1
    ]
    return LorafoldError("; ".join([*told, line.see])) if told else None


def unquoted(line: Line) -> LorafoldError | None:
    """The error for a text of several words that stands without quotes, so that all but the first
    are taken for paths, or None.
    """
    for at, (name, option, values) in enumerate(line.words):
        loose = [one.values[0] for one in takewhile(lambda one: not one.name, line.words[at + 1 :])]
        spoken = option is not None and option.name in SPOKEN
        if spoken and loose and not Path(loose[0]).exists():
            text = quote(shortened(" ".join([*values, *loose]), 100))
            return LorafoldError(f"{name}: found several words, expected quotes: {name} {text}")
    return None


def unread(error: Any, line: Line, params: Sequence[Any]) -> LorafoldError | None:
    """The error for a command line that Typer can't read, or None where Typer's says all.

    Args:
        error: What Typer raised.
        params: What the command declares.
    """
    if hasattr(error, "possibilities"):  # a name that is not there has these
        return no_options(line.words, line.options, line.path)
    if name := getattr(error, "option_name", None):
        option = line.options[name]
        found = "no value" if option.nargs == 1 else "too few values"
        return LorafoldError(f"{name}: found {found}, expected {name} {option.metavar}; {line.see}")
    if hasattr(error, "param_type"):
        return _missing(line, params)
    if getattr(error, "param", None) is not None:
        wrong = [*_bad(error)]
        return LorafoldError("; ".join(wrong)) if wrong else None
    return _stray(line) if line.stray else None


def _missing(line: Line, params: Sequence[Any]) -> LorafoldError:
    """What is required and not given. Of a command that takes options alone, words without one are
    taken to be the values.
    """
    given = {option.name for _, option, _ in line.words if option is not None}
    alone = all(one.param_type_name == "option" for one in params)
    wanted, left = list[str](), line.stray if alone else []
    found = shortened(" ".join(left), 100)
    for one in params:
        if not one.required or one.name in given:
            continue
        if one.param_type_name == "option":
            wanted.append(f"{one.opts[0]} {quote(left.pop(0)) if left else one.metavar}")
        elif not line.stray:
            wanted.append(one.metavar or one.name.upper())
    if found:
        what = f"found {found} without an option, expected {' '.join(wanted)}"
    else:
        what = f"missing {' and '.join(wanted)}"
    return LorafoldError(f"{what}; {line.see}")


def _stray(line: Line) -> LorafoldError:
    """What words are told that belong to no option, of a command that takes none."""
    at, word = next(n for n, one in enumerate(line.words) if not one.name), line.stray[0]
    name, option, values = line.words[at - 1] if at else Word("", None)
    if option is not None and getattr(option, "is_flag", False) and word.lower() in SWITCHED:
        names = " or ".join([*option.opts, *option.secondary_opts])
        return LorafoldError(f"{name}: found {word}, expected {names} without a value")
    if option is not None and getattr(option, "multiple", False):
        each = " ".join(f"{name} {quote(one)}" for one in (*values, word))
        return LorafoldError(f"{name}: found {word} as well, expected its name before each: {each}")
    near = get_close_matches(f"--{word.strip(DASHES)}", line.options, 1, 0.8)
    told = f"did you mean {near[0]}?" if near else f"expected options alone; {line.see}"
    return LorafoldError(f"found {shortened(' '.join(line.stray), 100)} without an option; {told}")


def _bad(error: Any) -> Iterator[str]:
    """What is wrong with the values of one option, each with what was found."""
    param, cause = error.param, error.__cause__
    name = param.opts[0] if param.param_type_name == "option" else param.name.upper()
    for one in cause.errors(include_url=False) if hasattr(cause, "errors") else ():
        found, kind = one["input"], one["type"]
        choices = param.type_descriptor.choices
        if choices:
            expected = ", ".join(map(str, choices))
        elif kind in BOUNDS:
            expected = BOUNDS[kind].format(**one.get("ctx", {})).removesuffix(".0")
        else:
            expected = one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        meant = _meant(str(found)) if expected in (WHOLE, FRACTION) else ""
        meant = "; repeat the option for several" if "," in str(found) and param.multiple else meant
        yield f"{name}: found {shortened(repr(found), 80)}, expected {expected}{meant}"


def _meant(text: str) -> str:
    """A question for the number that a text may stand for; empty where none is plain."""
    for number, factor in ((text.replace(",", ".", 1), 1.0), (text.removesuffix("%"), 0.01)):
        try:
            value = float(number) * factor
        except ValueError:
            continue
        if number != text or value == int(value):
            return f"; did you mean {value:g}?"
    return ""
