"""Reads a model's configuration by the model's name, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.errors import LorafoldError
from lorafold.files.atomic import check_intact
from lorafold.machine.hub import asked_once
from lorafold.models.gguf_files import one_file
from lorafold.models.load_errors import loading
from lorafold.models.sources import (
    ACCEPTED,
    EMBEDDED,
    check_revision,
    gguf_at,
    gguf_on_hub,
    not_there,
    resolve_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def configuration(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Read the configuration of a model.

    Raises LorafoldError if there is no such model.

    Args:
        name: smollm2, a directory, a GGUF file (its header is read) or a hub id (config.json is
            downloaded, or its only GGUF model).
        revision: A branch, tag or commit of a hub model.
        trust_remote_code: Run the code in the model's directory.
    """
    from transformers import AutoConfig

    check_revision(name, revision)
    path = Path(name).expanduser()
    with loading(f"model {name}"):
        if name == EMBEDDED:
            return AutoConfig.from_pretrained(resolve_model(name).intact("config.json"))
        if files := gguf_at(path):
            with one_file(files) as file:
                return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if path.exists() and not (path / "config.json").is_file():
            raise LorafoldError(f"model {name}: found no config.json in it; {ACCEPTED}")
        check_intact(path, ["config.json"])
        trusted = {"trust_remote_code": trust_remote_code}
        if path.exists():
            return AutoConfig.from_pretrained(path, revision=revision, **trusted)
        with asked_once() as away:
            try:
                return AutoConfig.from_pretrained(name, revision=revision, **trusted)
            except OSError as error:
                if files := gguf_on_hub(name, revision):
                    with one_file(files) as file:
                        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
                raise not_there(name, away, error) from error
