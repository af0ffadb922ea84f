"""The layout of a command's help: description, examples, options by panel.

If a command has many options, `--help` omits the rare ones, which are declared with `hidden=True`;
`--help-all` shows them. Placeholders are words such as PATH and NUMBER instead of Python types.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

OTHER_OPTIONS = "Options"
MAX_OPTIONS = 20  # if a command has more, including --help, rare options are omitted
DEMO_DIRECTORY = "demo"  # the directory for rows and adapters in examples
PLACEHOLDERS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


class Panels:
    """Help that shows arguments first, then options without a panel, then the options by panel."""

    examples: tuple[str, ...] = ()
    get_params: Callable[[Any], list[Any]]
    get_help: Callable[[Any], str]
    params: list[Any]

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        rare = {p.name for p in self.params if p.hidden}
        many = sum(p.param_type_name == "option" for p in self.params) > MAX_OPTIONS
        self.rare = rare if many else set[str]()
        for parameter in self.params:
            parameter.hidden = parameter.name == HELP_ALL and not self.rare
            option = parameter.param_type_name == "option"
            if option and parameter.metavar is None and not parameter.is_flag:
                parameter.metavar = placeholder(parameter.type_descriptor)
            if getattr(parameter, "multiple", False):
                parameter.help = f"{parameter.help}  [repeatable]"

    def help_all(self, ctx: Any) -> str:
        rare, self.rare = self.rare, set()
        try:
            return self.get_help(ctx)
        finally:
            self.rare = rare

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_examples(formatter, self.examples)
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], OTHER_OPTIONS: []}
        for parameter in self.get_params(ctx):
            if parameter.name not in self.rare and (entry := help_entry(parameter, ctx)):
                panels.setdefault(entry[0], []).append(entry[1])
        write_lists(formatter, panels)
        if self.rare:
            formatter.write_paragraph()
            formatter.write_text(
                f"{ctx.command_path} --help-all lists {len(self.rare)} more options."
            )


def help_entry(parameter: Any, ctx: Any) -> tuple[str, tuple[str, str]] | None:
    if (record := parameter.get_help_record(ctx)) is None:
        return None
    if parameter.param_type_name == "argument":  # without Typer's type after the name
        return "Arguments", (parameter.metavar or parameter.name.upper(), record[1])
    return getattr(parameter, "rich_help_panel", None) or OTHER_OPTIONS, record


def placeholder(kind: Any) -> str:
    if kind.choices:
        return "|".join(str(getattr(choice, "value", choice)) for choice in kind.choices)
    if get_origin(kind.annotation) is tuple:
        return " ".join(PLACEHOLDERS[entry] for entry in get_args(kind.annotation))
    [entry] = get_args(kind.annotation) or [kind.annotation]  # the items of a list
    return PLACEHOLDERS[entry]


def write_examples(formatter: Any, examples: Sequence[str], title: str = "") -> None:
    needs_demo = any(DEMO_DIRECTORY in example for example in examples)
    note = f" (after lorafold quickstart --out {DEMO_DIRECTORY})" if needs_demo else ""
    with formatter.section(title or f"Examples{note}"):
        for example in examples:
            for line in example.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def write_lists(formatter: Any, lists: dict[str, list[tuple[str, str]]]) -> None:
    for title, records in lists.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def _show_all(ctx: typer.Context, show: bool) -> None:
    if show and not ctx.resilient_parsing:
        typer.echo(ctx.command.help_all(ctx))  # type: ignore[attr-defined]
        raise typer.Exit


HELP_ALL = "help_all"
HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        is_eager=True,
        expose_value=False,
        callback=_show_all,
        help="Show all options, including rare ones, and exit.",
    ),
]
