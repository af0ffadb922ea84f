"""Models whose files are quantized by another tool, whichever of these it was: the same four
questions to `models.compressed` (fp8, int8, int4) and `models.mxfp4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorafold.errors import LorafoldError, as_one
from lorafold.models.compressed import (
    check_values,
    compress,
    scales_as_in_files,
    storage_of,
    stored_compressed,
)
from lorafold.models.compressed import misfits as compressed_misfits
from lorafold.models.container import Entry
from lorafold.models.mxfp4 import check_scales, make_mxfp4, misfits, stored_mxfp4
from lorafold.models.storages import of_method


def readable(settings: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is one that lorafold itself reads."""
    return stored_compressed(settings) or stored_mxfp4(settings)


def storage_in_files(settings: Mapping[str, Any], what: str) -> str:
    """Return the storage of a readable `quantization_config`.

    Raises LorafoldError, in messages that begin with `what`, as `compressed.storage_of` does.
    """
    if stored_mxfp4(settings):
        return str(of_method(settings["quant_method"]))
    return storage_of(settings, what)


def make_quantized(model: Any, settings: Mapping[str, Any], what: str) -> None:
    """Make what the files have quantized so in a model without values.

    Raises LorafoldError if the configuration does not fit the model.

    Args:
        model: The model as its architecture has it.
        settings: The `quantization_config` of its files.
        what: What messages begin with.
    """
    if stored_mxfp4(settings):
        make_mxfp4(model, settings, what)
    else:
        compress(model, settings, what, torch.bfloat16)


def as_in_files(model: nn.Module, entries: Mapping[str, Entry], what: str) -> None:
    """Give the scales of a model on the meta device the dtypes of the files.

    Raises LorafoldError with every tensor that a quantized weight lacks or that does not fit it.

    Args:
        model: After `make_quantized`.
        entries: The tensors of the files by the model's names.
        what: What messages begin with.
    """
    problems = [*compressed_misfits(model, entries), *misfits(model, entries)]
    if problems:
        raise LorafoldError(f"{what}: {as_one(problems)}")
    scales_as_in_files(model, entries)


def check_quantized(model: nn.Module, what: str) -> None:
    """Raise LorafoldError for codes and scales that no weight can have, by name.

    Args:
        model: The model with its values.
        what: What messages begin with.
    """
    check_values(model, what)
    check_scales(model, what)
