"""One-line errors for wrong or missing values, repeated options, and unexpected positional
arguments.

    --rank: found '8.5', expected an integer
    --rank: found 8 and 16, expected only one of them; see lorafold train --help
    found rows.jsonl without an option, expected --data rows.jsonl --out PATH; see ...
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from lorafold.cli.command_line import OTHER_NAMES, Options, Word
from lorafold.cli.suggestions import unknown_options
from lorafold.errors import LorafoldError, truncate_middle, two_names_message

SWITCH_VALUES = {"true", "false", "yes", "no", "on", "off", "1", "0"}
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # an editor may replace "--" by these
TEXT_OPTIONS = {"prompt", "system"}  # options whose values may have several words
WHOLE, FRACTION = "an integer", "a number"
BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    **dict.fromkeys(("int_parsing", "int_from_float", "int_type"), WHOLE),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), FRACTION),
}


class TypedLine(NamedTuple):
    """A command line as typed; `path` is the command, for example lorafold train."""

    words: Sequence[Word]
    options: Options
    path: str

    @property
    def see(self) -> str:
        return f"see {self.path} --help"

    @property
    def stray(self) -> list[str]:
        return [word.values[0] for word in self.words if not word.name]


def repeated_options(line: TypedLine) -> LorafoldError | None:
    """Returns the error for an option that is given with two values or under two names."""
    words_by_option: dict[str, list[Word]] = {}
    for word in line.words:
        if word.option is not None:
            words_by_option.setdefault(str(word.option.name), []).append(word)
    problems = []
    for same in words_by_option.values():
        old = [w.name for w in same if w.name in OTHER_NAMES and w.name not in line.options]
        if current := [w.name for w in same if w.name not in old] if old else []:
            return LorafoldError(two_names_message(old[0], current[0]))
        flag = getattr(same[0].option, "is_flag", False)
        values = {w.name if flag else " ".join(map(str, w.values)): w.name for w in same}
        if len(values) > 1 and not getattr(same[0].option, "multiple", False):
            name = next(iter(values.values()))
            problems.append(f"{name}: found {' and '.join(values)}, expected only one of them")
    return LorafoldError("; ".join([*problems, line.see])) if problems else None


def unquoted_text(line: TypedLine) -> LorafoldError | None:
    """Returns the error for a text without quotes, whose other words would be read as paths."""
    for number, (name, option, values, _) in enumerate(line.words, 1):
        following = [w.values[0] for w in takewhile(lambda w: not w.name, line.words[number:])]
        if option and option.name in TEXT_OPTIONS and following and not Path(following[0]).exists():
            text = quote(truncate_middle(" ".join([*values, *following]), 100))
            return LorafoldError(f"{name}: found several words without quotes; write {name} {text}")
    return None


def parsing_error(error: Any, line: TypedLine, params: Sequence[Any]) -> LorafoldError | None:
    """Returns a clearer error for an exception of Typer, or None if Typer's message is clear."""
    if hasattr(error, "possibilities"):  # an unknown option
        return unknown_options(line.words, line.options, line.path)
    if name := getattr(error, "option_name", None):
        option = line.options[name]
        found = "no value" if option.nargs == 1 else "too few values"
        return LorafoldError(f"{name}: found {found}, expected {name} {option.metavar}; {line.see}")
    if hasattr(error, "param_type"):
        return _missing(line, params)
    if getattr(error, "param", None) is not None:
        problems = [*_bad_values(error)]
        return LorafoldError("; ".join(problems)) if problems else None
    return _stray(line) if line.stray else None


def _missing(line: TypedLine, params: Sequence[Any]) -> LorafoldError:
    """Returns the error for missing required options. If the command has no positional arguments,
    the positional arguments on the line are suggested as the values of the missing options.
    """
    given_options = {word.option.name for word in line.words if word.option is not None}
    only_options = all(param.param_type_name == "option" for param in params)
    expected, stray = [], line.stray if only_options else []
    found = truncate_middle(" ".join(stray), 100)
    for param in params:
        if not param.required or param.name in given_options:
            continue
        if param.param_type_name == "option":
            expected.append(f"{param.opts[0]} {quote(stray.pop(0)) if stray else param.metavar}")
        elif not line.stray:
            expected.append(param.metavar or param.name.upper())
    problem = f"missing {' and '.join(expected)}"
    if found:
        problem = f"found {found} without an option, expected {' '.join(expected)}"
    return LorafoldError(f"{problem}; {line.see}")


def _stray(line: TypedLine) -> LorafoldError:
    index, word = next(n for n, w in enumerate(line.words) if not w.name), line.stray[0]
    name, option, values, _ = line.words[index - 1] if index else Word("", None, (), ())
    if getattr(option, "is_flag", False) and word.lower() in SWITCH_VALUES:
        names = " or ".join([*option.opts, *option.secondary_opts])  # type: ignore[union-attr]
        return LorafoldError(f"{name}: found {word}, expected {names} without a value")
    if getattr(option, "multiple", False):
        repeated = " ".join(f"{name} {quote(value)}" for value in (*values, word))
        return LorafoldError(f"{name}: found a second value without {name}; write {repeated}")
    near = get_close_matches(f"--{word.strip(DASHES)}", line.options, 1, 0.8)
    hint = f"did you mean {near[0]}?" if near else f"expected only options; {line.see}"
    stray = truncate_middle(" ".join(line.stray), 100)
    return LorafoldError(f"found {stray} without an option; {hint}")


def _bad_values(error: Any) -> Iterator[str]:
    param, cause = error.param, error.__cause__
    name = param.opts[0] if param.param_type_name == "option" else param.name.upper()
    for problem in cause.errors(include_url=False) if hasattr(cause, "errors") else ():
        found, kind = problem["input"], problem["type"]
        if param.type_descriptor.choices:
            expected = ", ".join(map(str, param.type_descriptor.choices))
        elif kind in BOUNDS:
            expected = BOUNDS[kind].format(**problem.get("ctx", {})).removesuffix(".0")
        else:
            expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        hint = _number_in(str(found)) if expected in (WHOLE, FRACTION) else ""
        if "," in str(found) and param.multiple:
            hint = "; repeat the option to pass several values"
        yield f"{name}: found {truncate_middle(repr(found), 80)}, expected {expected}{hint}"


def _number_in(text: str) -> str:
    """Returns a suggestion for a value such as 0,5 or 50%, or an empty string."""
    for number, factor in ((text.replace(",", ".", 1), 1.0), (text.removesuffix("%"), 0.01)):
        try:
            value = float(number) * factor
        except ValueError:
            continue
        if number != text or value == int(value):
            return f"; did you mean {value:g}?"
    return ""
