"""What an adapter lies over: the adapters that were below it when it was trained.

    "over": [{"adapter": "out/sft", "sha256": "5d1c..."}, ...]      in lorafold.json, lowest first

An adapter that was trained over others is a change of what they make of the base, so it is loaded
over the same ones only. They are known by a digest of the two files that say what they compute:
neither a card, a record nor a tokenizer is part of it, and PEFT's directories have one too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafold.core.attach import Origin
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.files.card import OVER
from lorafold.files.contents import Contents, digest
from lorafold.peft.config import CONFIG, WEIGHTS

SHOWN = 12  # digits of a digest in messages


def digest_of(contents: Contents) -> str:
    """The digest of an adapter, from what was read of its directory."""
    return contents.digest_of((CONFIG, WEIGHTS))


def digest_written(path: str | Path) -> str:
    """The same digest of a directory that was just written, from its manifest."""
    files = json.loads((Path(path) / MANIFEST).read_bytes())["files"]
    named = ((name, files[name]) for name in (CONFIG, WEIGHTS))
    return digest((name, entry["size"], entry["sha256"]) for name, entry in named)


def recorded(over: Sequence[Origin]) -> dict[str, Any]:
    """What a record says of the adapters below, as far as their files are known; empty if there is
    nothing to say.
    """
    entries = [{"adapter": o.path, "sha256": o.sha256} for o in over if o.sha256]
    return {OVER: entries} if entries else {}


def parse(record: Mapping[str, Any]) -> tuple[Origin, ...]:
    """The adapters that a record says its adapter lies over, lowest first. Raises LorafoldError for
    a field of another form.
    """
    entries = record.get(OVER, [])
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and all(isinstance(e.get(k), str) for k in ("adapter", "sha256"))
        for e in entries
    ):
        raise LorafoldError(
            f"field {OVER}: found {entries!r}, expected a list of objects with adapter"
            " and sha256"
        )
    return tuple(Origin(path=e["adapter"], sha256=e["sha256"]) for e in entries)


def beside(origin: Origin, over: Path) -> Path:
    """Where an adapter has to be for an engine or a server to find it: beside the one that lies
    over it, under the last part of its path. A record comes with an adapter, and may not choose
    what is read.

    Args:
        origin: The adapter to find.
        over: The directory of the one that lies over it.
    """
    return over.resolve().parent / Path(origin.path).name


def not_found(origin: Origin, over: Path) -> str:
    """What is wrong where `beside` leads to nothing, or to another adapter; arguments as there."""
    return (
        f"{over}: it was trained over {listed([origin])}, which was not found in"
        f" {beside(origin, over)}; put it there, or merge both"
    )


def same(needed: Sequence[Origin], found: Sequence[Origin]) -> bool:
    """Whether an adapter that lies over those needed fits over those found, lowest first. One that
    lies over nothing fits over any.
    """
    return not needed or [o.sha256 for o in needed] == [o.sha256 for o in found]


def mismatch(needed: Sequence[Origin], found: Sequence[Origin]) -> str:
    """What is wrong where an adapter does not fit.

    Args:
        needed: What its record says, lowest first.
        found: The adapters that would be below it, lowest first.
    """
    return (
        f"it was trained over {listed(needed)}; found {listed(found) or 'nothing'}"
        " below it"
    )


def loading_advice(path: Path, needed: Sequence[Origin]) -> str:
    """How to load an adapter over those that it needs.

    Args:
        path: The adapter's directory.
        needed: What its record says, lowest first.
    """
    options = " ".join(f"--adapter {p}" for p in (*(o.path for o in needed), path))
    first = ", ".join(f'lf.load(model, "{o.path}", "{Path(o.path).name}")' for o in needed)
    return (
        f"give the adapters in this order: {options} ({first} first), or override this with"
        " --allow-other-base (allow_other_base=True)"
    )


def listed(origins: Sequence[Origin]) -> str:
    """The adapters in a line, lowest first: the directory and the first digits of each digest."""
    return ", then ".join(
        f"{o.path} ({o.sha256[:SHOWN]})" if o.sha256 else f"{o.name!r} (not saved)" for o in origins
    )
