"""`lf.load_model`: load a base model; `lf.load`: load a saved adapter on a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lorafold.adapter import Adapter
from lorafold.adapter import load as load_on
from lorafold.api.arguments import missing_argument
from lorafold.api.options import validated
from lorafold.models.weights import Weights
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.resolve import Base, base_for
from lorafold.resolve.base import check_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@validated
def load_model(
    model: str | Path,
    storage: str = "auto",
    device: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a language model in evaluation mode. A model that also takes images or audio runs
    without them.

    Args:
        model: smollm2 (embedded), a directory, a .gguf file or a Hub ID.
        storage: The quantization or dtype of its weights: fp32, bf16, nf4 (4 bits) or int8. auto
            keeps the quantization of the files, or else uses bf16 or fp32, whichever is faster on
            the device. `quantization` is another name for this argument.
        device: cpu, cuda, cuda:N or mps. None uses the fastest device available.
        revision: The branch, tag or commit of a Hub model.
        trust_remote_code: Run Python code that comes with the model.

    Raises LorafoldError for an unknown model, storage or device, for a model that transformers
    can't load, and for files that lack weights or were modified since lorafold wrote them.
    """
    return Base(model, storage, device, revision, trust_remote_code).stored_as_trained().load()


def load(
    model: nn.Module | str | Path | None = None,
    path: str | Path | SavedAdapter | None = None,
    name: str = "default",
    *,
    allow_other_base: bool = False,
    trainable: bool = False,
    base: Weights | None = None,
) -> Adapter:
    """Attach a saved adapter to a model.

    An adapter that was trained on top of other adapters requires exactly these adapters to be
    active, in the same order. If the adapter can't be attached, LorafoldError lists every problem
    (unknown or missing keys, wrong shapes, values that are not finite, unsupported options, a base
    model with another fingerprint), and the model is unchanged.

    Args:
        model: The model to attach to. A name or path, or None for the adapter's own base model, is
            loaded first, with the quantization or dtype used in training, and is then available
            as `adapter.model`.
        path: The adapter's directory.
        name: The adapter's name on this model.
        allow_other_base: Accept a base model with another fingerprint, and other base adapters, and
            log a warning.
        trainable: Make the adapter's parameters trainable. If the adapter has no base adapters, the
            adapters that are active on the model become its base adapters.
        base: The base model's original weights, for a model that does not have them because it is
            quantized or on the meta device.
    """
    if path is None:
        raise missing_argument("path")
    if not isinstance(model, nn.Module):
        if not isinstance(path, SavedAdapter):
            path = SavedAdapter.open(Path(path).expanduser())
        resolved = base_for(model, [path], allow_other_base=allow_other_base)
        check_language_model(resolved, [path])
        resolved = resolved.stored_as_trained([path])
        model, base = resolved.load(), base or resolved.weights()
    return load_on(
        model, path, name, allow_other_base=allow_other_base, trainable=trainable, base=base
    )
