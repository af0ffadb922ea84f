"""A command out of a verb: its options, the call of the function, and how the result is printed.

A runner calls the verb and prints what it returns; it is `plain` unless a command does more. What
it takes by keyword are options of the command as well, declared as those of a verb (`api.options`).
Messages and progress go to stderr, the result to stdout: text for people, or with --json one JSON
object as the last line.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lorafold.api.options import DeclaredOption, Docs, Option, RecipeOptions, declared
from lorafold.cli.columns import columns_of
from lorafold.cli.help import HELP_ALL, HelpAll
from lorafold.cli.parameters import parameter_of
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from rich.console import Console

Typed = Mapping[str, Any]  # what is typed, by the names of the command's parameters
Json = Annotated[
    bool, Option("Print the result as one JSON object, the last line of stdout.", rare=True)
]
UNITS = {
    f"{unit}{i}": (2**10 if i else 10**3) ** n
    for n, unit in enumerate("KMGT", 1)
    for i in ("", "I")
}


class Taken(NamedTuple):
    """One argument of the verb, what is typed for it, and how it is read."""

    of: DeclaredOption
    shown: list[Parameter]
    read: Callable[[Typed], Any]


class BuiltCommand(NamedTuple):
    """A function that Typer makes a command of, examples of the command, and what ends its help."""

    function: Callable[..., None]
    examples: tuple[str, ...]
    notes: str


def plain(run: Callable[[], Any], *, json: Json = False) -> None:
    """Call the verb, and print its result."""
    result = run()
    emit(json, result.as_json(), str(result))


def emit(json: bool, result: Mapping[str, Any], text: str) -> None:
    """Print the result to stdout.

    Args:
        json: Print `result` as one line of JSON; numbers that are not finite become null.
        result: The result, by its keys in the JSON.
        text: The result for people, which is printed otherwise.
    """
    if json:
        from pydantic_core import to_json

        text = to_json(dict(result), inf_nan_mode="null").decode()
    typer.echo(text)


def messages() -> "Console":
    """The console for messages and progress: stderr, so that only the result goes to stdout."""
    from rich.console import Console

    return Console(stderr=True)


def built(verb: Any, runner: Any = plain, above: bool = False) -> BuiltCommand:
    """The command of a verb.

    Args:
        runner: Calls the verb, as a partial with all that is typed; its keywords are options too.
        above: Whether there are commands below it, of which one may be called instead.
    """
    own = [*declared(verb)]
    taken = [
        _taken(one) for one in sorted(own, key=lambda one: isinstance(one.option, RecipeOptions))
    ]
    printed = [_taken(one) for one in declared(runner) if one.default is not Parameter.empty]
    shown = [parameter for one in (*taken, *printed) for parameter in one.shown]
    flags = {
        p.name if number else one.of.name: _flag(p)
        for one in (*taken, *printed)
        for number, p in enumerate(one.shown)
    }

    def as_typed(text: str) -> str:
        text = re.sub(r"\s+In Python\b.*", "", text, flags=re.DOTALL)
        return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), text)

    for parameter in shown:
        _info(parameter).help = as_typed(_info(parameter).help)

    def command(**typed: Any) -> None:
        if above and typed.pop("context").invoked_subcommand is not None:
            return
        given: dict[Any, Any] = {}
        for one in taken:
            value = one.read(typed)
            if value not in (None, [], ()):
                within = given.setdefault(one.of.group, {}) if one.of.group else given
                within[one.of.name] = value
        for group in [key for key in given if isinstance(key, tuple)]:
            given[group[0]] = group[1](**given.pop(group))
        if any(one.name == "console" for one in own):
            given["console"] = messages()
        runner(partial(verb, **given), **{one.of.name: one.read(typed) for one in printed})

    docs = Docs.of(verb)
    command.__doc__ = as_typed(docs.about)
    help_all = Parameter(HELP_ALL, Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)
    shown.append(help_all)
    if above:
        context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
        shown.insert(0, context)
    command.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in shown}
    return BuiltCommand(command, docs.examples, as_typed(docs.notes))


def _info(parameter: Parameter) -> Any:
    return parameter.annotation.__metadata__[0]


def _flag(parameter: Parameter) -> str:
    names = _info(parameter).param_decls or [f"--{parameter.name.replace('_', '-')}"]
    return str(names[0]).split("/")[0]


def _taken(one: DeclaredOption) -> Taken:
    option, name = one.option, one.name
    if isinstance(option, RecipeOptions):
        from lorafold.cli.recipe_options import options_of, recipe_of

        return Taken(one, options_of(option), partial(recipe_of, option))
    if option.python_only:
        return Taken(one, [], lambda _: None)
    if option.saved:
        return Taken(one, _adapters(one), partial(_saved, option.saved))
    shown = [parameter_of(one)]
    read = READERS.get(name, lambda value: value)
    if option.second_flag:
        flag, text = option.second_flag
        more = Option(text, flag=flag, rare=True)
        shown.append(parameter_of(DeclaredOption(name, one.hint, (), more, text)))
    return Taken(one, shown, lambda typed: read(*(typed[p.name] for p in shown)))


def _adapters(one: DeclaredOption) -> list[Parameter]:
    metavar, text = "[ADAPTER]...", one.help
    argument = typer.Argument(metavar=metavar, show_default=False, help=text)
    by_name = typer.Option(..., "--adapter", help="The same by name.")
    kinds = {"adapter": by_name, "positional": argument}
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[list[Path] | None, info],
        )
        for name, info in kinds.items()
    ]


def _saved(wanted: str, typed: Typed) -> Any:
    """The saved adapters, by position or by name, in order; the only one where one is wanted."""
    positional, named = typed["positional"], typed["adapter"]
    if positional and named:
        raise LorafoldError(
            f"--adapter {named[0]}: found {positional[0]} by its position too, expected all"
            " adapters in one of the two ways"
        )
    found = positional or named or []
    if not found and wanted != "any":
        raise LorafoldError("ADAPTER: found none, expected the directory of a saved adapter")
    if wanted != "one":
        return found
    if len(found) > 1:
        raise LorafoldError(f"ADAPTER: found {', '.join(map(str, found))}, expected exactly one")
    return found[0]


def varied(pairs: Iterable[str] | None) -> dict[str, list[Any]]:
    """The values by their field. LorafoldError for what is no FIELD=VALUE,VALUE."""
    from lorafold.recipe.parsing import parse_yaml

    found: dict[str, list[Any]] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not name or not equals or name in found:
            raise LorafoldError(
                f"--vary {pair}: expected FIELD=VALUE,VALUE, each field once, as in rank=8,32"
            )
        found[name] = parse_yaml(f"[{text}]", f"--vary {pair}")
    return found


def size(text: str | None) -> int | None:
    """The bytes of a size such as 24GB, 24GiB or 500MB. Raises LorafoldError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in UNITS:
        bare = f"; did you mean {text}GB?" if re.fullmatch(r"[\d.]+", text) else ""
        expected = "expected a size as in 24GB or 24GiB"
        raise LorafoldError(f"--device-memory: found {text}, {expected}{bare}")
    return int(float(found[1]) * UNITS[found[2]])


def _tools(file: Path | None) -> Any:
    from lorafold.data.calls import read_tools

    return read_tools(file) if file else None


def _rewards(names: list[str] | None, adapters: Sequence[str] | None = ()) -> list[str]:
    from lorafold.rewards.judging import ADAPTER

    return [*(names or ()), *(f"{ADAPTER}{path}" for path in adapters or ())]


def _separate(texts: Iterable[str] | None) -> list[str]:
    return [name.strip() for text in texts or () for name in text.split(",")]


# how the text of an option becomes the argument of this name
READERS: dict[str, Callable[..., Any]] = {
    "columns": columns_of,
    "device_memory": size,
    "methods": _separate,
    "rewards": _rewards,
    "tools": _tools,
    "vary": varied,
}
