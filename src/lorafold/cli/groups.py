"""Groups of options that several commands share, each declared once as a frozen dataclass.

    @dataclass(frozen=True)
    class Output:                                   a field is an option
        out: Annotated[Path, typer.Option(help=...)]
        overwrite: Annotated[bool, typer.Option("--overwrite", help=...)] = False

    @grouped
    def command(output: Output, json: JsonOption = False) -> None: ...

`grouped` gives Typer a function with the fields instead of the group, and passes the group itself
to the command.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, signature
from typing import Any, get_type_hints


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
