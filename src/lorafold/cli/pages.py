"""The options for all figures of a table: on a page, which is written once all work is done, and
checked before, and on the terminal.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

WideOption = Annotated[
    bool,
    typer.Option(
        "--wide", hidden=True, help="Print all figures, in Markdown, however wide the table is."
    ),
]


def page_option(text: str, rare: bool = False, name: str = "--html") -> Any:
    """The option for a page, which refuses a file that can't be written.

    Args:
        text: What is written, for `--help`.
        rare: Leave it to `--help-all` where a command has many options.
        name: The option's own.
    """
    return typer.Option(name, callback=_checked, hidden=rare, help=text)


def _checked(path: Path | None) -> Path | None:
    if path is not None:
        from lorafold.files.atomic import check_file

        check_file(path)
    return path
