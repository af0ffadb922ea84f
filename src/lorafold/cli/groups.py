"""Groups of options that several commands share, each declared once as a frozen dataclass.

    @dataclass(frozen=True)
    class Output:                                   a field is an option
        out: Annotated[Path, typer.Option(help=...)]
        overwrite: Annotated[bool, typer.Option("--overwrite", help=...)] = False

    @grouped
    def command(output: Output, json: JsonOption = False) -> None: ...

`grouped` gives Typer a function with the fields instead of the group, and passes the group itself
to the command. `Command` lists the options in `--help` under the names of their panels.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from lorafold.errors import LorafoldError, both_names, called_now

OTHERS = "Options"
# names that options had, and what they are called now: the first of these that the command has
OLD_NAMES = {
    "--base": ("--storage", "--model"),
    "--seq": ("--max-length",),
    "--answers": ("--completions",),
    "--no-answers": ("--no-completions",),
}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command for Typer, with the fields of each group as parameters instead of the group."""
    hints = get_type_hints(command, include_extras=True)
    own = signature(command).parameters
    groups = {name: hints[name] for name in own if is_dataclass(hints[name])}
    expanded: dict[str, Parameter] = {}
    for name, parameter in own.items():
        for option in _options(groups[name]) if name in groups else [parameter]:
            assert option.name not in expanded, f"{command.__module__}: {option.name} twice"
            annotation = option.annotation if name in groups else hints[name]
            expanded[option.name] = option.replace(
                kind=Parameter.KEYWORD_ONLY, annotation=annotation
            )

    shown = signature(command).replace(parameters=list(expanded.values()))

    def expanded_command(**given: Any) -> None:
        bound = shown.bind(**given)
        bound.apply_defaults()
        values = bound.arguments
        found = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **found)

    expanded_command.__doc__ = command.__doc__
    expanded_command.__signature__ = shown  # type: ignore[attr-defined]
    expanded_command.__annotations__ = {n: p.annotation for n, p in expanded.items()}
    return expanded_command


def _options(group: type) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


class Panels:
    """Help that lists the options by panel, those without a panel first."""

    get_params: Callable[[Any], Any]
    params: list[Any]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, options under their old names too, which stderr says; and expand the
        ~ of paths, which a shell does not do everywhere.
        """
        rest = super().parse_args(ctx, _as_now(args, self.params))  # type: ignore[misc]
        ctx.params.update({name: _expanded(value) for name, value in ctx.params.items()})
        return list(rest)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options of each panel."""
        panels: dict[str, list[tuple[str, str]]] = {OTHERS: []}
        arguments = []
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append(record)
            else:
                panel = getattr(parameter, "rich_help_panel", None) or OTHERS
                panels.setdefault(panel, []).append(record)
        for title, records in {"Arguments": arguments, **panels}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return value.expanduser() if isinstance(value, Path) else value


def _as_now(args: Sequence[str], params: Sequence[Any]) -> list[str]:
    """The arguments with options under their names of now. A value may read like an option's name.

    Raises LorafoldError for an option that is given under both of its names.
    """
    options = {name: p for p in params for name in (*p.opts, *p.secondary_opts)}
    found, rest, old_of, new = list[str](), deque(args), dict[str, str](), dict[str, str]()
    while rest and rest[0] != "--":
        name, equals, value = rest.popleft().partition("=")
        now = next((n for n in OLD_NAMES.get(name, ()) if n in options), name)
        option = options.get(name) or options.get(now)
        if option is None:
            found.append(name + equals + value)
            continue
        if name in options:
            new[option.name] = now = name
        else:
            typer.echo(called_now(name, now), err=True)
            old_of[option.name] = name
        found.append(now + equals + value)
        values = 0 if equals or getattr(option, "is_flag", False) else option.nargs
        found += [rest.popleft() for _ in range(min(values, len(rest)))]
    if both := old_of.keys() & new.keys():
        raise LorafoldError("; ".join(both_names(old_of[name], new[name]) for name in both))
    return [*found, *rest]


class Command(Panels, TyperCommand):
    """A command."""


class Above(Panels, TyperGroup):
    """A command that has commands below it, which its help lists last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, and then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
