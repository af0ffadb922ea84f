"""`lf.serve`: a base and its adapters behind an OpenAI-compatible API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.api.arguments import as_path, or_quiet
from lorafold.api.opened import opened
from lorafold.errors import LorafoldError, listed
from lorafold.opening import Base, base_for
from lorafold.peft.own_base import OwnBase

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
    base = base_for(
        model,
        [] if model else own_bases(folder),
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    if base.storage == "auto":
        base = _as_trained(base, folder, console)
    run.serve(base, partial(opened, console=console), folder, found, console, open_page)


def _as_trained(base: Base, folder: Path, console: Console) -> Base:
    """The base in the storage that most of its adapters were trained on; a line names others."""
    own = list[OwnBase]()
    with suppress(LorafoldError):
        own = own_bases(folder)
    storages = {one.adapter.name: one.trained_on.storage for one in own if one.trained_on}
    if not storages:
        return base.stored_as_trained()
    most = Counter(storages.values()).most_common(1)[0][0]
    if others := [f"{name} on {held}" for name, held in storages.items() if held != most]:
        told = f"served over {most}, as most adapters were trained; others were not: "
        told += f"{listed(others)} (--storage chooses)"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    return base.stored_as_trained([o for o in own if o.trained_on and o.trained_on.storage == most])


def own_bases(adapters: Path) -> list[OwnBase]:
    """The bases of all adapters in a directory; those that can't be read are refused later, when
    they are verified. Raises LorafoldError without a directory, or if none of its adapters can be
    read.

    Args:
        adapters: A directory whose entries are saved adapters, or one adapter.
    """
    from lorafold.serving.directory import Directory

    directory, found = Directory(adapters), list[OwnBase]()
    for name in sorted(directory.names()):
        with suppress(LorafoldError):
            found.append(OwnBase.read(directory.locate(name)))
    if directory.names() and not found:
        raise LorafoldError(
            f"--adapters {adapters}: found no adapter in it whose base could be served; expected"
            " --model PATH (model)"
        )
    return found
