"""Writes a whole model as the result of a run, for methods that train the base's own weights.

    config.json  model*.safetensors  ...     a plain Hugging Face model with the trained weights
    lorafold.json  README.md                 the record of how it was made, and the model card
    tokenizer.json  ...                      the tokenizer, if there is one
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from torch import nn

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, write_json
from lorafold.files.card import CARD, Beside, training_card
from lorafold.files.record import RECORD
from lorafold.methods.full import write_model
from lorafold.models.architecture import opened_by_name
from lorafold.models.sources import called


def write(
    path: str | Path,
    model: nn.Module,
    spec: Spec,
    beside: Beside,
) -> Path:
    """Write the directory, completely or not at all.

    Raises LorafoldError if the path exists and may not be replaced, or if the model is not one of
    transformers.

    Args:
        path: The directory to write.
        model: The trained model.
        spec: The method.
    """
    if not hasattr(model, "save_pretrained"):
        raise LorafoldError(
            f"{path} was not written: found a {type(model).__name__}, but {type(spec).__name__}"
            " saves whole models and expects one of transformers (with save_pretrained)"
        )
    own_card = training_card(
        called(model),
        {"recipe": {"method": type(spec).__name__, **vars(spec)}},
        {},
        whole=True,
        opened_by=opened_by_name(model),
    )
    with atomic_directory(path, beside.overwrite) as directory:
        write_model(model, directory)
        if beside.tokenizer is not None:
            beside.tokenizer.save_pretrained(directory)
        write_json(directory / RECORD, {**beside.record, "lorafold": version("lorafold")})
        (directory / CARD).write_text(beside.card or own_card, encoding="utf-8")
    return Path(path)
