"""Command-line parsing with old option names, ~ in paths, and one-line error messages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorafold.cli.command_line import OLD_NAMES, split_words
from lorafold.cli.help import PLACEHOLDERS, Panels
from lorafold.cli.suggestions import unknown_command
from lorafold.cli.usage_errors import TypedLine, parsing_error, repeated_options, unquoted_text
from lorafold.errors import renamed_warning


class CommandLine(Panels):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        params = self.get_params(ctx)
        options = {name: p for p in params for name in (*p.opts, *p.secondary_opts)}
        typed = [*split_words(args, options, ctx.allow_interspersed_args)]
        line = TypedLine(typed, options, ctx.command_path)
        if twice := repeated_options(line):
            raise twice
        for word in typed:
            if word.name in OLD_NAMES and word.option and word.name not in options:
                typer.echo(renamed_warning(word.name, word.args[0].partition("=")[0]), err=True)
        names, words = {word.name for word in typed}, [arg for word in typed for arg in word.args]
        if "--preview" in names and "--out" not in names:
            words = ["--out", ".", *words]  # required, but a preview writes no adapter
        try:
            rest = super().parse_args(ctx, words)  # type: ignore[misc]
        except typer.TyperException as error:
            raise parsing_error(error, line, params) or error from None
        if wrong := unquoted_text(line):
            raise wrong
        ctx.params.update({name: _expanded(value) for name, value in ctx.params.items()})
        return list(rest)


def _expanded(value: Any) -> Any:
    """Expands ~ in paths, because shells do not expand it in `--out=~/adapter`."""
    if isinstance(value, list):
        return [_expanded(path) for path in value]
    return value.expanduser() if isinstance(value, Path) else value


class Command(CommandLine, TyperCommand):
    """A command without subcommands."""


class CommandGroup(TyperGroup):
    """A group of subcommands that reports an unknown subcommand in one line. `names` maps commands
    to the words to type, if these differ.
    """

    names: Mapping[str, str] = {}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            option = next((p.opts[0] for p in self.params if p.metavar == PLACEHOLDERS[Path]), "")
            names = self.names or {name: name for name in self.commands}
            path = ctx.find_root().command_path if self.names else ctx.command_path
            raise unknown_command(args[0], names, path, args[1:], option)
        return super().resolve_command(ctx, args)


class CommandWithSubcommands(CommandLine, CommandGroup):
    """A command that also has subcommands, listed at the end of its help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
