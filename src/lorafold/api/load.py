"""`lf.load`: a saved adapter on a model that is loaded, or with its base."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lorafold.adapter import Adapter
from lorafold.adapter import load as load_on
from lorafold.api.arguments import missing
from lorafold.models.weights import Weights
from lorafold.peft.saved import Saved
from lorafold.resolve import base_for
from lorafold.resolve.base import check_language_model


def load(
    model: nn.Module | str | Path | None = None,
    path: str | Path | Saved | None = None,
    name: str = "default",
    *,
    allow_other_base: bool = False,
    trainable: bool = False,
    base: Weights | None = None,
) -> Adapter:
    """Attach a saved adapter to a model. Every key must be used and every shape right.

    Otherwise LorafoldError is raised and the model is left as it is. The error lists everything
    that is wrong: unknown or missing keys, shapes, values that are not finite, options that are not
    supported, a base with another fingerprint. An adapter that was trained over others is loaded
    over exactly these, which must be the active ones, in their order.

    Args:
        model: A model. A name or path, or None for the base that the adapter says it was trained
            on, is loaded first, in the storage that it was trained on: `adapter.model`.
        path: The adapter's directory, or what was read of it already.
        name: The adapter's name on this model.
        allow_other_base: Accept a base with another fingerprint, and other adapters below; the log
            says so.
        trainable: Make the adapter's parameters trainable; one that lay over nothing lies over the
            active adapters from then on.
        base: The base's own weights, if a model does not have them, because it is quantized or on
            the meta device.
    """
    if path is None:
        raise missing("path")
    if not isinstance(model, nn.Module):
        path = path if isinstance(path, Saved) else Saved.open(Path(path).expanduser())
        found = base_for(model, [path], allow_other_base=allow_other_base)
        check_language_model(found, [path])
        found = found.stored_as_trained([path])
        model, base = found.load(), base or found.weights()
    return load_on(
        model, path, name, allow_other_base=allow_other_base, trainable=trainable, base=base
    )
