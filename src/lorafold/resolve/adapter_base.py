"""The base of saved adapters, where none was named: the one that they say they were trained on.

    base = base_for(None, adapters, console, storage="nf4")     a name or path instead of None wins

It is looked for by the name that the adapter has of it: a path, as it is, relative to the adapter
and beside it, or a model of the hub. If that leads to no model, or to one with other weights, the
model directories beside the adapter, in the place that the name says, and in the hub's cache are
compared with the adapter's fingerprint. Nothing is asked of the network for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, shortened
from lorafold.files.model_card import EMBEDDED
from lorafold.models import fingerprint
from lorafold.models.sources import HUB_ID, ModelSource, gguf_at
from lorafold.models.weights import FileWeights, model_files
from lorafold.peft.provenance import ALLOWED, OwnBase
from lorafold.peft.saved import Saved
from lorafold.resolve.base import Base
from lorafold.runtime.hub_access import cache

if TYPE_CHECKING:
    from rich.console import Console

HUB = "models--"  # how the directory of a model in the hub's cache begins
SHORT = 44  # characters of a name or path, so that a message has less than 300


def base_for(
    model: str | Path | ModelSource | None,
    adapters: Sequence[Saved | OwnBase],
    console: Console | None = None,
    **how: Any,
) -> Base:
    """The base that is named, or else that of the adapters, or without adapters the embedded model.
    """
    if model is not None:
        return Base(model, **how)
    own = [one.own_base if isinstance(one, Saved) else one for one in adapters]
    if not own:
        return Base(**how)
    base, told = _opened(_agreed(own), how)
    if console is not None:
        console.print(f"base: {told}", highlight=False, markup=False, soft_wrap=True)
    return base


def _agreed(own: Sequence[OwnBase]) -> OwnBase:
    """The base of all adapters, as that one says it which says most. Those that say nothing of it
    fit any.
    """
    known = sorted((one for one in own if one.known), key=lambda one: not one.fingerprint)
    if not known:
        raise LorafoldError(
            f"{shortened(str(own[0].adapter), SHORT)}: says nothing of the base that it was"
            " trained on; expected --model PATH (model)"
        )
    first = known[0]
    if other := next((one for one in known if not first.same_as(one)), None):
        one, another = (
            f"{shortened(str(each.adapter), SHORT)} on {shortened(_called(each), SHORT)}"
            for each in (first, other)
        )
        raise LorafoldError(
            f"adapters of different bases: {one}, and {another}; expected those of one base, or"
            f" it as --model (model) with {ALLOWED}"
        )
    return first


def _called(own: OwnBase) -> str:
    return own.name or "a base without a name"


def _opened(own: OwnBase, how: dict[str, Any]) -> tuple[Base, str]:
    """The base, and the line that says which it is."""
    said = f", as {own.said_by} says"
    if own.name == EMBEDDED:
        return Base(**how), f"{EMBEDDED}{said}"
    named = [*_named(own)]
    for path in named:
        if gguf_at(path) or not own.fingerprint or fits(path, own):
            return Base(str(path), **how), _told(str(path), own)
    by_hub = bool(HUB_ID.fullmatch(own.name)) and not Path(own.name).exists()
    asked = how.get("revision") or (own.revision if by_hub else None)
    here = {**how, "revision": asked}
    snapshot = _in_cache(own.name, asked) if by_hub else None
    if snapshot and (asked or not own.fingerprint or fits(snapshot, own)):
        return Base(own.name, **here), f"{own.name}{said}"
    if own.fingerprint and not how.get("revision"):
        for path, name in _elsewhere(own):
            if fits(path, own):
                trusted = bool(how.get("trust_remote_code"))
                source = ModelSource(path, name, trust_remote_code=trusted)
                return Base(source, **how), _told(name, own, "its fingerprint")
    if named:  # with other weights: loading says by how much they differ
        return Base(str(named[0]), **how), _told(str(named[0]), own)
    if not by_hub:
        raise LorafoldError(_not_found(own))
    base = Base(own.name, **here)
    try:
        return replace(base, model=base.source), f"{own.name}{said}"
    except LorafoldError as error:
        reason = str(error).rpartition(" the hub: ")[2].partition(";")[0]
        told = f"and it can't be had from the hub: {shortened(reason, 60)}"
        raise LorafoldError(f"{_not_found(own)}; {told}") from error


def _told(found: str, own: OwnBase, by: str = "") -> str:
    if found == own.name:
        return f"{found}, as {own.said_by} says"
    found_by = f", found by {by}" * bool(by)
    return f"{found}{found_by}; {own.said_by} says {_called(own)}"


def _not_found(own: OwnBase) -> str:
    beside = shortened(str(own.adapter.absolute().parent), SHORT)
    return (
        f"{shortened(str(own.adapter), SHORT)}: its base {shortened(_called(own), SHORT)} is"
        f" neither there, nor beside it in {beside}, nor in {shortened(cache(), SHORT)};"
        " expected --model PATH (model)"
    )


def fits(path: Path, own: OwnBase) -> bool:
    """Whether a directory has a model whose weights have the fingerprint."""
    try:
        return fingerprint.fits(own.fingerprint, FileWeights(model_files(path)))
    except (LorafoldError, OSError):
        return False


def _is_model(path: Path) -> bool:
    try:
        return (path / "config.json").is_file() or bool(gguf_at(path))
    except (LorafoldError, OSError):
        return False


def _named(own: OwnBase) -> Iterator[Path]:
    """The models at the places that the name may mean, nearest to its words first."""
    if not own.name:
        return
    at, adapter = Path(own.name).expanduser(), own.adapter.absolute()
    above = (adapter.parent, adapter)
    places = [at, *(place / at for place in above), *(place / at.name for place in above)]
    yield from (place for place in dict.fromkeys(places) if _is_model(place))


def _elsewhere(own: OwnBase) -> Iterator[tuple[Path, str]]:
    """All models beside the adapter, in the directory of the name, and in the hub's cache, each
    with its name.
    """
    adapter = own.adapter.absolute()
    at = Path(own.name).expanduser()
    parents = [adapter, adapter.parent, *([at.parent] if own.name else [])]
    if not at.is_absolute():
        parents.append(adapter.parent / at.parent)
    for parent in dict.fromkeys(parents):
        for path in _inside(parent):
            if (path / "config.json").is_file():
                yield path, str(path)
    for repo in _inside(Path(cache())):
        if repo.name.startswith(HUB):
            name = repo.name.removeprefix(HUB).replace("--", "/")
            yield from ((path, name) for path in _inside(repo / "snapshots"))


def _inside(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir())
    except OSError:
        return []


def _in_cache(repo: str, revision: str | None) -> Path | None:
    """The directory of a model in the hub's cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
