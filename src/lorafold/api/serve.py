"""`lf.serve`: serve a base model and its adapters over an OpenAI-compatible API."""

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.peft.provenance import RecordedBase

NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


@opt.verb
def serve(
    adapters: str | Path | None = None,
    *,
    model: opt.Model = None,
    host: str | None = None,
    port: Annotated[int | None, opt.Option(min=0, max=65535)] = None,
    keys: str | Path | None = None,
    admin_key_file: str | Path | None = None,
    metrics_key_file: str | Path | None = None,
    config: str | Path | None = None,
    settings: Annotated[Mapping[str, Any] | None, opt.Option(python_only=True)] = None,
    allow_control_tokens: opt.ControlTokens = False,
    json_logs: bool = False,
    open_page: Annotated[bool, opt.Option(flag="--open")] = False,
    console: opt.Progress = None,
    **base_options: Unpack[opt.DirectoryBaseOptions],
) -> None:
    """Serve a base model and its adapters over an OpenAI-compatible API, with a page to try them.

    The model of a request is the base model, an adapter of the directory (by the name of its
    entry), NAME@DIGEST for one version of it, or an alias. Adapters that fail verification are
    listed with the reason, and the others are served. Without `keys`, everybody on this machine has
    access; with keys, each tenant may use the adapters that its keys name. SIGTERM lets running
    requests finish; a second SIGTERM stops at once.

    Args:
        adapters: A directory whose entries are saved adapters, or one adapter.
        host: The address to listen on [127.0.0.1]. One that other machines can reach requires keys.
        port: The port [8000]; 0 takes a free one.
        keys: A file of tenants' keys, written by lorafold serve new-key.
        admin_key_file: A file with the key for administration. Without it, admin routes are off.
        metrics_key_file: A file with a key that can only read /metrics.
        config: A YAML file with settings and limits. Options take precedence over it.
        settings: Settings and limits under their names in the file; they take precedence over it.
        json_logs: Write the log with one JSON object per line.
        open_page: Open the page in a browser once the server listens.

    Raises LorafoldError for missing packages, wrong settings, a model that can't be loaded, and an
    address that is in use or that others can reach without keys.

    Examples:
        lorafold serve --adapters demo --open
        lorafold serve --adapters demo --port 0 --json-logs
        lorafold serve --adapters demo --host 0.0.0.0 --keys keys.json
    """
    if adapters is None:
        raise LorafoldError("--adapters: missing; pass --adapters DIR")
    if not_installed := [name for name in NEEDED if find_spec(name) is None]:
        raise LorafoldError(f"not installed: {', '.join(not_installed)}; install lorafold[serve]")
    from functools import partial

    from lorafold.api.arguments import as_path, console_or_quiet
    from lorafold.api.model_arguments import load_with_adapters
    from lorafold.resolve import base_for
    from lorafold.serving import run
    from lorafold.serving.settings import read_settings

    options = {
        "host": host,
        "port": port,
        "keys": keys,
        "admin_key": admin_key_file,
        "metrics_key": metrics_key_file,
        "json_logs": json_logs or None,
        "allow_control_tokens": allow_control_tokens or None,
    }
    known = {**(settings or {}), **{n: value for n, value in options.items() if value is not None}}
    file = None if config is None else as_path(config, "config")
    server_settings = read_settings(file, known)
    console, folder, bases = console_or_quiet(console), as_path(adapters, "adapters"), []
    with suppress(*[LorafoldError] * (model is not None)):
        bases = recorded_bases(folder, server_settings.state, None if model else console)
    base = base_for(model, [] if model else bases, console, **base_options)
    if base_options.get("storage", "auto") == "auto":
        with suppress(LorafoldError):  # the adapters' quantizations differ
            base = base.stored_as_trained(bases)
    first = bases[0] if bases and model is None else None
    load = partial(load_with_adapters, console=console)
    run.serve(base, load, folder, server_settings, console, open_page, first)


def recorded_bases(
    adapters: Path, state: Path | None = None, console: "Console | None" = None
) -> list["RecordedBase"]:
    """Returns the base model of the server's last start without `model`, so that adapters added
    later do not change it. At the first start, returns the base model that most adapters in the
    directory were trained on, or all base models if there is a tie.
    """
    from dataclasses import replace

    from lorafold.files.terminal import print_lines
    from lorafold.peft.provenance import RecordedBase
    from lorafold.serving.directory import Directory
    from lorafold.serving.registry import STATE_FILE, ServerState
    from lorafold.serving.settings import read_if_exists

    directory, bases = Directory(adapters), []
    file = state or directory.pages_directory / STATE_FILE
    if (last_base := read_if_exists(file, ServerState).base) is not None:
        print_lines(console, f"no --model: using the base model of the last start ({file})")
        return [replace(last_base, adapter=directory.pages_directory / last_base.adapter.name)]
    for name in sorted(directory.names()):
        with suppress(LorafoldError):
            bases.append(RecordedBase.read(directory.locate(name)))
    if directory.names() and not bases:
        raise LorafoldError(
            f"--adapters {adapters}: the base model is unknown, because no adapter_config.json in"
            " this directory can be read; pass --model"
        )
    groups = list[list[RecordedBase]]()
    for base in sorted((one for one in bases if one.known), key=lambda one: not one.fingerprint):
        matching = [group for group in groups if group[0].same_as(base)]
        matching[0].append(base) if matching else groups.append([base])
    sizes = sorted(map(len, groups))
    if sizes[-1:] == sizes[-2:-1]:
        return bases
    largest_group = max(groups, key=len)
    names = [(base.name, base.trained_on) for base in largest_group]  # some may not name their base
    return [largest_group[names.index(max(names, key=names.count))]]
