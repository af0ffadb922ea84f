"""The columns of rows under lorafold's names, as they are typed."""

from lorafold.errors import LorafoldError


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
