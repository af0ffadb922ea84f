"""`lorafold serve new-key`: let a tenant in."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            help="The adapters and aliases that the key may use, as a glob such as 'acme-*'."
            " Repeat it for more. Without it all.",
        ),
    ] = None,
    keys: Annotated[
        Path, typer.Option(help="The file of keys, which is made if there is none.")
    ] = Path("keys.json"),
) -> None:
    """Make a key for a tenant.

    It is printed once, and the file keeps its hash. A running server reads the file again when it
    changes; delete an entry to revoke its key.
    """
    from lorafold.serving.keys import new_key as make

    typer.echo(make(keys, tenant, adapters or ["*"]))
    print(f"{tenant}: written to {keys}; the key itself is kept nowhere", file=sys.stderr)
