"""A whole model as what a run leaves behind: what a method saves that trains the base's own
weights.

    config.json  model*.safetensors  ...     a plain Hugging Face model, with the weights as they
                                             are now
    lorafold.json  README.md                 the record of how it was made, and the model card

The tokenizer that belongs to the model is written with it where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, write_json
from lorafold.files.card import CARD, training_card
from lorafold.files.record import RECORD
from lorafold.methods.full import write_model


def write(
    path: str | Path,
    model: nn.Module,
    spec: Spec,
    tokenizer: Any,
    *,
    overwrite: bool,
    card: str | None,
    record: Mapping[str, Any],
) -> Path:
    """Write the directory, whole or not at all.

    LorafoldError if the path exists and overwrite is off, or it is no transformers model.
    """
    if not hasattr(model, "save_pretrained"):
        raise LorafoldError(
            f"{path} was not written: {type(model).__name__} is no transformers model, and"
            f" {type(spec).__name__} saves one"
        )
    base = getattr(model.config, "_name_or_path", "")
    own_card = training_card(
        base, {"recipe": {"method": type(spec).__name__, **vars(spec)}}, {}, whole=True
    )
    with atomic_directory(path, overwrite) as directory:
        write_model(model, directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        write_json(directory / RECORD, {**record, "lorafold": version("lorafold")})
        (directory / CARD).write_text(card or own_card, encoding="utf-8")
    return Path(path)
