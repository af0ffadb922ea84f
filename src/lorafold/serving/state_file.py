"""What outlives the process: aliases, pins, quarantines and what was unloaded, in one JSON file.

The file is replaced in one step before a change is answered, so that what a caller was told holds
after a restart.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from lorafold.files.atomic import write_text
from lorafold.peft.provenance import OwnBase
from lorafold.serving.json_file import read

STATE = ".lorafold-serve.json"  # beside the adapters, unless the settings name another


class Target(BaseModel):
    """Where a part of an alias's requests goes: an adapter, and its version if that matters."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    adapter: str
    digest: str | None = Field(None, pattern=r"^[0-9a-f]{8,64}$")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)


class Alias(BaseModel):
    """What a name stands for, and what it stood for before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: tuple[Target, ...] = Field(min_length=1, max_length=16)
    previous: tuple[Target, ...] = ()


class ServerState(BaseModel):
    """The content of the file. `digests` has the files that each adapter had when last seen,
    `quarantined` the digest and the reason, `base` the one that the adapters named when the server
    first started without the name of one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    aliases: dict[str, Alias] = {}
    pinned: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    quarantined: dict[str, tuple[str, str]] = {}
    digests: dict[str, str] = {}
    base: OwnBase | None = None


def read_kept(file: Path) -> ServerState:
    """The content of the file, empty if there is none. Raises LorafoldError for any other file."""
    return read(file, ServerState, "move it away") if os.path.lexists(file) else ServerState()


def write_kept(file: Path, kept: ServerState) -> None:
    """Replace the file. Raises LorafoldError if it can't be written."""
    write_text(file, kept.model_dump_json(indent=2) + "\n")
