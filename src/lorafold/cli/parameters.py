"""Conversion of declared options to Typer's parameters."""

from collections.abc import Iterator, Sequence
from inspect import Parameter
from keyword import iskeyword
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from lorafold.api.options import DeclaredOption
from lorafold.files.record import ALIASES


def parameter_of(declaration: DeclaredOption) -> Parameter:
    option, default, text = declaration.option, declaration.default, declaration.help
    kind = option.kind or typed_kind(declaration.hint)
    required = default is Parameter.empty or option.required
    flag = option.flag or f"--{declaration.name.replace('_', '-')}"
    if kind is bool and default is not False and "/" not in flag:
        flag = f"{flag}/--no-{flag[2:]}"
    if get_origin(kind) is list and default and not required:
        defaults = [default] if isinstance(default, str) else default
        text, default = f"{text}  [default: {' '.join(map(str, defaults))}]", None
    settings = {
        "help": text,
        "hidden": option.rare,
        "metavar": option.metavar,
        "min": option.min,
        "max": option.max,
        "rich_help_panel": option.panel,
        "autocompletion": (lambda: [*option.choices]) if option.choices else None,
    }
    is_option = flag.startswith("-")
    names = [f"--{name}" for name, of in ALIASES.items() if of == declaration.name]
    info = typer.Option(..., *names, flag, **settings) if is_option else typer.Argument(**settings)
    typed = flag.split("/")[0].lstrip("-").replace("-", "_").lower()
    optional = default in (None, ()) and not required
    return Parameter(
        declaration.name if iskeyword(typed) else typed,
        Parameter.KEYWORD_ONLY,
        default=Parameter.empty if required else None if optional else default,
        annotation=Annotated[kind | None if optional else kind, info],
    )


def typed_kind(hint: Any) -> Any:
    kinds = [*alternatives(hint)]
    if lists := [kind for kind in kinds if get_origin(kind) in (list, tuple, Sequence)]:
        return list[typed_kind(get_args(lists[0])[0])]  # type: ignore[misc]
    choices = [kind for kind in kinds if get_origin(kind) is Literal]
    return next((kind for kind in (*choices, bool, int, float, Path) if kind in kinds), str)


def alternatives(annotation: Any) -> Iterator[Any]:
    """Yields the types in a union, without None and without the metadata of `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from alternatives(part)
    elif annotation is not type(None):
        yield annotation


def as_typed(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(as_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
