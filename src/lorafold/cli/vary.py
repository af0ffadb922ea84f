"""The option that varies fields of the recipe."""

from typing import Annotated, Any

import typer

from lorafold.errors import LorafoldError
from lorafold.recipe.reading import parse_yaml

VaryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="FIELD=VALUE,VALUE",
        help="A field of the recipe and the values to try, as in rank=8,32 or"
        " options.init=kaiming,gaussian; values are YAML, as in"
        " targets=all-linear,[q_proj,v_proj].",
    ),
]


def varied(pairs: list[str] | None) -> dict[str, list[Any]]:
    """The values by their field. LorafoldError for what is no FIELD=VALUE,VALUE."""
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
