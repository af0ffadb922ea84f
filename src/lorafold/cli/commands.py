"""Builds a command from a public function.

A runner, by default `print_result`, calls the function and prints its result. The runner's keyword
arguments become options of the command too, declared as in `api.options`. Messages and progress go
to stderr. The result goes to stdout, as text or with --json as one JSON object on the last line.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from lorafold.api.options import DeclaredOption, Docs, Option, RecipeOptions, declared_options
from lorafold.cli.help import HELP_ALL, HelpAll
from lorafold.cli.parameters import parameter_of
from lorafold.errors import LorafoldError
from lorafold.files.record import current_names

Typed = Mapping[str, Any]  # parameter of the command -> value
Json = Annotated[
    bool, Option("Print the result as one JSON object, the last line of stdout.", rare=True)
]


class Argument(NamedTuple):
    declaration: DeclaredOption
    options: list[Parameter]
    read: Callable[[Typed], Any]


class BuiltCommand(NamedTuple):
    function: Callable[..., None]
    examples: tuple[str, ...]
    notes: str


def print_result(run: Callable[[], Any], *, json: Json = False) -> None:
    result = run()
    emit(json, result.as_json(), str(result))


def emit(json: bool, result: Mapping[str, Any], text: str) -> None:
    """Prints `text`, or with `json` the result as one line, with null for NaN and infinity."""
    if json:
        from pydantic_core import to_json

        text = to_json(dict(result), inf_nan_mode="null").decode()
    typer.echo(text)


def build_command(verb: Any, runner: Any, is_group: bool = False) -> BuiltCommand:
    """Builds the command of a public function, which `runner` gets as a partial with all arguments.
    A command with subcommands (`is_group`) does nothing if one of them is called.
    """
    declared = [*declared_options(verb)]
    recipe_last = sorted(declared, key=lambda d: isinstance(d.option, RecipeOptions))
    arguments = [_argument(d) for d in recipe_last]
    of_runner = [_argument(d) for d in declared_options(runner) if d.default is not Parameter.empty]
    flags, options = {}, []
    for argument in (*arguments, *of_runner):
        for number, p in enumerate(argument.options):
            names = p.annotation.__metadata__[0].param_decls or [f"--{p.name.replace('_', '-')}"]
            flags[p.name if number else argument.declaration.name] = names[0].split("/")[0]
        options += argument.options

    def with_flags(text: str) -> str:
        text = re.sub(r"\s+In Python\b.*", "", text, flags=re.DOTALL)
        return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), text)

    for option in options:
        info = option.annotation.__metadata__[0]
        info.help = with_flags(info.help)
    options.append(Parameter(HELP_ALL, Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll))
    if is_group:
        options.insert(0, Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context))

    def command(**typed: Any) -> None:
        if is_group and typed["context"].invoked_subcommand is not None:
            return
        keywords: dict[Any, Any] = {}
        for argument in arguments:
            value, group = argument.read(typed), argument.declaration.group
            if value not in (None, [], ()):
                target = keywords.setdefault(group, {}) if group else keywords
                target[argument.declaration.name] = value
        for group in [key for key in keywords if isinstance(key, tuple)]:
            keywords[group[0]] = group[1](**keywords.pop(group))
        if any(d.name == "console" for d in declared):
            from rich.console import Console

            keywords["console"] = Console(stderr=True)  # so that only the result goes to stdout
        runner(partial(verb, **keywords), **{a.declaration.name: a.read(typed) for a in of_runner})

    docs = Docs.of(verb)
    command.__doc__ = with_flags(docs.about)
    command.__signature__ = Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in options}
    return BuiltCommand(command, docs.examples, with_flags(docs.notes))


def _argument(declaration: DeclaredOption) -> Argument:
    option, name = declaration.option, declaration.name
    if isinstance(option, RecipeOptions):
        from lorafold.cli.recipe_options import options_of, recipe_of

        return Argument(declaration, options_of(option), partial(recipe_of, option))
    if option.python_only:
        return Argument(declaration, [], lambda _: None)
    if option.saved:
        by_name = Option("A saved adapter; the same as ADAPTER.", kind=list[Path], flag="--adapter")
        by_position = Option(
            declaration.help, kind=list[Path], flag="positional", metavar="[ADAPTER]..."
        )
        options = [
            parameter_of(DeclaredOption(name, None, None, way, way.help))
            for way in (by_name, by_position)
        ]
        return Argument(declaration, options, partial(_read_adapters, option.saved))
    options = [parameter_of(declaration)]
    if option.second_flag:
        flag, text = option.second_flag
        second = Option(text, flag=flag, rare=True)
        options.append(parameter_of(DeclaredOption(name, declaration.hint, (), second, text)))
    read = READERS.get(name, lambda value: value)
    return Argument(declaration, options, lambda typed: read(*(typed[p.name] for p in options)))


def _read_adapters(count: str, typed: Typed) -> Any:
    """Returns the adapters given by position or with --adapter; one path if `count` is "one"."""
    positional, by_option = typed["positional"], typed["adapter"]
    if positional and by_option:
        raise LorafoldError(
            f"--adapter {by_option[0]}: found {positional[0]} without --adapter; pass all adapters"
            " either by position or with --adapter"
        )
    adapters = positional or by_option or []
    if not adapters and count != "any":
        raise LorafoldError("ADAPTER: found none, expected the directory of a saved adapter")
    if count != "one":
        return adapters
    if len(adapters) > 1:
        raise LorafoldError(f"ADAPTER: found {', '.join(map(str, adapters))}, expected exactly one")
    return adapters[0]


def parse_columns(pairs: list[str] | None) -> dict[str, str]:
    columns = {}
    for pair in (pair.strip() for text in pairs or () for pair in text.split(",")):
        name, equals, column = pair.partition("=")
        if not name or not equals or name in columns:
            raise LorafoldError(
                f"--columns {pair}: expected NAME=COLUMN, each name once, as in prompt=question"
            )
        columns[name] = column
    return columns


def parse_vary(pairs: Iterable[str] | None) -> dict[str, list[Any]]:
    from lorafold.recipe.parsing import parse_yaml

    fields = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not name or not equals or name in fields:
            raise LorafoldError(
                f"--vary {pair}: expected FIELD=VALUE,VALUE, each field once, as in rank=8,32"
            )
        fields[name] = parse_yaml(f"[{text}]", f"--vary {pair}")
    return current_names(fields)


def _tools(file: Path | None) -> Any:
    from lorafold.data.tool_calls import read_tools

    return read_tools(file) if file else None


def _rewards(names: list[str] | None, adapters: Sequence[str] | None = ()) -> list[str]:
    from lorafold.rewards.reward import ADAPTER

    return [*(names or ()), *(f"{ADAPTER}{path}" for path in adapters or ())]


def _environment(name: str | None, tools: Path | None = None) -> str | None:
    if name and tools:
        raise LorafoldError("--environment: found --tools, too, expected one of them")
    return f"tools:{tools}" if tools else name


# argument of a function -> conversion from the values of its options
READERS: dict[str, Callable[..., Any]] = {
    "columns": parse_columns,
    "environment": _environment,
    "methods": lambda texts: [name.strip() for text in texts or () for name in text.split(",")],
    "rewards": _rewards,
    "tools": _tools,
    "vary": parse_vary,
}
