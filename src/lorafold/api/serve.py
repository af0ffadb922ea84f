"""`lf.serve`: a base and its adapters behind an OpenAI-compatible API."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.api.arguments import as_path, or_quiet
from lorafold.api.opened import opened
from lorafold.errors import LorafoldError
from lorafold.opening import base_for
from lorafold.peft.provenance import OwnBase

if TYPE_CHECKING:
    from rich.console import Console

NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


def serve(
    adapters: str | Path,
    *,
    model: str | Path | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    open_page: bool = False,
    console: Console | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C: running requests end, new ones are refused.

    Args:
        adapters: A directory whose entries are saved adapters, or one adapter.
        model: The base, as `lf.load_model` takes it; None takes the one that the adapters say they
            were trained on, and of an empty directory smollm2.
        config: A YAML file with settings and limits.
        settings: Settings by name, such as {"port": 8000, "keys": "keys.json"}; those that are not
            None win over the file.
        storage: How the base stores its weights: auto, fp32, bf16, nf4 or int8. auto is what the
            adapters in the directory were trained on.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Serve adapters that were trained on another base too.
        open_page: Open the page in a browser once the server listens.
        console: A rich console for what the user has to know; None is quiet.

    Raises LorafoldError for packages that are missing, for every wrong setting, for a model that
    can't be loaded, an address that is taken, and one that others can reach without keys.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise LorafoldError(f"found no {', '.join(missing)}, expected it; install lorafold[serve]")
    from lorafold.serving import run
    from lorafold.serving.settings import read_settings

    found = read_settings(None if config is None else as_path(config, "config"), settings or {})
    console = or_quiet(console)
    folder = as_path(adapters, "adapters")
    own = list[OwnBase]()
    with suppress(*[LorafoldError] * (model is not None)):
        own = own_bases(folder, found.state, or_quiet(None) if model else console)
    base = base_for(
        model,
        [] if model else own,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    if storage == "auto":
        with suppress(LorafoldError):  # as many were trained on one as on another
            base = base.stored_as_trained(own)
    kept = own[0] if own and model is None else None
    run.serve(base, partial(opened, console=console), folder, found, console, open_page, kept)


def own_bases(
    adapters: Path, state: Path | None = None, console: Console | None = None
) -> list[OwnBase]:
    """The base of the adapters in a directory, as it was stored in training: the one that a start
    without `model` took before, or else that of most of them, so that an adapter that comes later
    decides nothing. Adapters of another base are refused when they are verified. Several, if as
    many adapters have the one as the other; none without adapters. Raises LorafoldError without a
    directory, or if none of its adapters can be read.

    Args:
        adapters: A directory whose entries are saved adapters, or one adapter.
        state: The server's state file, None for the one beside the adapters.
        console: Is told of a base that was taken before.
    """
    from lorafold.serving.directory import Directory
    from lorafold.serving.registry import STATE, ServerState
    from lorafold.serving.settings import kept as kept_in

    directory, found = Directory(adapters), list[OwnBase]()
    file = state or directory.beside / STATE
    if (kept := kept_in(file, ServerState).base) is not None:
        told = f"no --model: the base is that of the start before ({file})"
        or_quiet(console).print(told, highlight=False, markup=False, soft_wrap=True)
        return [replace(kept, adapter=directory.beside / kept.adapter.name)]
    for name in sorted(directory.names()):
        with suppress(LorafoldError):
            found.append(OwnBase.read(directory.locate(name)))
    if directory.names() and not found:
        raise LorafoldError(
            f"--adapters {adapters}: found no adapter in it whose base could be served; expected"
            " --model PATH (model)"
        )
    groups = list[list[OwnBase]]()
    for own in sorted((one for one in found if one.known), key=lambda one: not one.fingerprint):
        same = [group for group in groups if group[0].same_as(own)]
        same[0].append(own) if same else groups.append([own])
    sizes = sorted(map(len, groups))
    if sizes[-1:] == sizes[-2:-1]:
        return found
    most: list[OwnBase] = max(groups, key=len)
    names = [(own.name, own.trained_on) for own in most]  # that of one alone may lead nowhere
    return [most[names.index(max(names, key=names.count))]]
