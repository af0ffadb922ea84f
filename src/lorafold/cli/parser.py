"""How a command line is read: options under their old names too, the ~ of paths expanded, and one
line for what there is not.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorafold.cli.command_line import words
from lorafold.cli.help import PLACEHOLDERS, Panels
from lorafold.cli.suggestions import no_command
from lorafold.cli.usage_errors import Line, repeated, unquoted, unread
from lorafold.errors import LorafoldError, both_names, called_now

# names that options had, and what they are called now: the first of these that the command has
SILENT = {"--quantization": ("--storage",)}  # other names, which stay
OLD_NAMES = {
    **SILENT,
    "--base": ("--storage", "--model"),
    "--seq": ("--max-length",),
    "--answers": ("--completions",),
    "--no-answers": ("--no-completions",),
}


class CommandLine(Panels):
    """A command line that is read as the house has it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, options under their old names too, which stderr says; and expand the
        ~ of paths, which a shell does not do everywhere. LorafoldError for what can't be read, and
        for an option that is given twice.
        """
        now, params = _as_now(args, self.params), self.get_params(ctx)
        options = {name: p for p in params for name in (*p.opts, *p.secondary_opts)}
        typed = [*words(now, options, ctx.allow_interspersed_args)]
        line = Line(typed, options, ctx.command_path)
        try:
            rest = super().parse_args(ctx, [*now])  # type: ignore[misc]
        except typer.TyperException as error:
            raise unread(error, line, params) or error from None
        if wrong := repeated(line) or unquoted(line):
            raise wrong
        ctx.params.update({name: _expanded(value) for name, value in ctx.params.items()})
        return list(rest)


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return value.expanduser() if isinstance(value, Path) else value


def _as_now(args: Sequence[str], params: Sequence[Any]) -> list[str]:
    """The arguments with options under their names of now, and with `--x` and `--no-x` of an option
    on|off|auto as its values on and off. A value may read like an option's name.

    Raises LorafoldError for an option that is given under both of its names.
    """
    options = {name: p for p in params for name in (*p.opts, *p.secondary_opts)}
    switches = {name for name, p in options.items() if str(p.metavar).startswith("on|off")}
    off = {f"--no-{name[2:]}": name for name in switches}
    found, rest, old_of, new = list[str](), deque(args), dict[str, str](), dict[str, str]()
    while rest and rest[0] != "--":
        name, equals, value = rest.popleft().partition("=")
        if name in off and not equals:
            found += [off[name], "off"]
            continue
        if name in switches and not equals and (not rest or rest[0].startswith("-")):
            rest.appendleft("on")
        now = next((n for n in OLD_NAMES.get(name, ()) if n in options), name)
        option = options.get(name) or options.get(now)
        if option is None:
            found.append(name + equals + value)
            continue
        if name in options:
            new[option.name] = now = name
        else:
            if name not in SILENT:
                typer.echo(called_now(name, now), err=True)
            old_of[option.name] = name
        found.append(now + equals + value)
        values = 0 if equals or getattr(option, "is_flag", False) else option.nargs
        found += [rest.popleft() for _ in range(min(values, len(rest)))]
    if both := old_of.keys() & new.keys():
        raise LorafoldError("; ".join(both_names(old_of[name], new[name]) for name in both))
    return [*found, *rest]


class Command(CommandLine, TyperCommand):
    """A command."""


class CommandGroup(TyperGroup):
    """A command with commands below it, which tells one that there is not in one line."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The name of the command, the command itself, and its arguments."""
        if args[0] not in self.commands and not ctx.resilient_parsing:
            where = next((p.opts[0] for p in self.params if p.metavar == PLACEHOLDERS[Path]), "")
            raise no_command(args[0], self.commands, ctx.command_path, args[1:], where)
        return super().resolve_command(ctx, args)


class Above(CommandLine, CommandGroup):
    """A command that does something by itself, and whose help lists the commands below it last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, and then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
