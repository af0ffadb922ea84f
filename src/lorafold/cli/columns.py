"""The option that gives the columns of rows lorafold's names."""

from typing import Annotated

import typer

from lorafold.errors import LorafoldError

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NAME=COLUMN",
        help="The columns of your rows that lorafold shall read under its own names, as in"
        " prompt=question,completion=answer; NAME= drops a column.",
    ),
]


def columns_of(pairs: list[str] | None) -> dict[str, str]:
    """The user's names of columns by lorafold's. LorafoldError for what is no NAME=COLUMN."""
    found: dict[str, str] = {}
    for pair in (pair.strip() for text in pairs or () for pair in text.split(",")):
        name, given, column = pair.partition("=")
        if not name or not given or name in found:
            raise LorafoldError(
                f"--columns {pair}: expected NAME=COLUMN, each name once, as in prompt=question"
            )
        found[name] = column
    return found
