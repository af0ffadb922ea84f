"""`lorafold serve new-key`: let a tenant in."""

import sys
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "lorafold serve new-key acme",
    'lorafold serve new-key acme --adapters "acme-*" --expires 30d',
    "lorafold serve new-key trial --no-base --tokens-per-day 100000",
)


def command(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            help="The adapters and aliases that the key may use, as a glob such as 'acme-*'."
            " Without it all.",
        ),
    ] = None,
    keys: Annotated[
        Path, typer.Option(help="The file of keys, which is made if there is none.")
    ] = Path("keys.json"),
    expires: Annotated[
        str | None,
        typer.Option(help="How long it holds: 30d, 12h, or the last day by UTC as 2026-12-31."),
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="The key may not use the base itself.")
    ] = False,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(help="The most tokens of the tenant in a minute, of prompts too.", min=1),
    ] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(help="The most tokens of the tenant on a day, by UTC.", min=1)
    ] = None,
) -> None:
    """Make a key for a tenant.

    It is printed once, and the file keeps its hash. A running server reads the file again when it
    changes; delete an entry to revoke its key.
    """
    from lorafold.serving.keys import new_key as make
    from lorafold.serving.keys import until

    given = {"tokens_per_minute": tokens_per_minute, "tokens_per_day": tokens_per_day}
    limits = {name: most for name, most in given.items() if most is not None}
    more: dict[str, object] = {"limits": limits} if limits else {}
    more |= {"base": False} if no_base else {}
    more |= {"expires": until(expires)} if expires is not None else {}
    typer.echo(make(keys, tenant, adapters or ["*"], **more))
    print(f"{tenant}: written to {keys}; the key itself is kept nowhere", file=sys.stderr)
