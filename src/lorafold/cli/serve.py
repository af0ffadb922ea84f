"""`lorafold serve`: a base and its adapters behind an OpenAI-compatible API."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import BASE, AllowOtherOption, Computing, ControlTokensOption, messages
from lorafold.cli.groups import grouped
from lorafold.errors import LorafoldError
from lorafold.models.storages import LISTED

EXAMPLES = (
    "lorafold serve --adapters demo --open",
    "lorafold serve --adapters demo --port 0 --json-logs",
    "lorafold serve --adapters demo --host 0.0.0.0 --keys keys.json",
)


@grouped
def command(
    context: typer.Context,
    computing: Computing,
    adapters: Annotated[
        Path | None,
        typer.Option(help="A directory whose entries are saved adapters, or one adapter."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where to listen [127.0.0.1]; any other address needs keys.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="The port [8000]; 0 takes a free one.", min=0, max=65535)
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="The tenants' keys, as lorafold serve new-key writes them.")
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the key for administration; without it those routes are closed."
        ),
    ] = None,
    metrics_key_file: Annotated[
        Path | None,
        typer.Option(help="A file with a key that reads /metrics and nothing else."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A YAML file with settings and limits; options win over it."),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            rich_help_panel=BASE,
            help=f"How the base stores its weights: {LISTED} or auto, which takes what most of the"
            " adapters in the directory were trained on.",
        ),
    ] = "auto",
    allow_other_base: AllowOtherOption = False,
    allow_control_tokens: ControlTokensOption = False,
    json_logs: Annotated[
        bool, typer.Option("--json-logs", help="Write the log as one JSON object a line.")
    ] = False,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in a browser once the server listens.")
    ] = False,
) -> None:
    """Serve a base and its adapters over an OpenAI-compatible API, with a page to try them.

    A request's model is the base, an adapter of the directory (its entry's name), NAME@DIGEST for
    one version of it, or an alias. Adapters that are wrong are listed with the reason, and the rest
    is served. Without --keys everybody on this machine may call; with keys, each tenant may use the
    adapters that its keys name. SIGTERM lets running requests end; a second one ends at once.
    """
    if context.invoked_subcommand is not None:
        return
    from lorafold.api.serve import serve

    if adapters is None:
        raise LorafoldError("--adapters: expected it, as in --adapters DIR")
    settings = {
        "host": host, "port": port, "keys": keys, "admin_key": admin_key_file,
        "metrics_key": metrics_key_file, "json_logs": json_logs or None,
        "allow_control_tokens": allow_control_tokens or None,
    }  # fmt: skip
    serve(
        adapters,
        model=computing.model,
        config=config,
        settings=settings,
        storage=storage,
        allow_other_base=allow_other_base,
        open_page=open_page,
        console=messages(),
        **computing.how,
    )


BELOW = {"new-key": "serve_new_key"}  # commands of this one, each in a module
