"""`lf.load_model`: a base by its name, in the storage and on the device that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.machine.devices import choose_device
from lorafold.models import loading
from lorafold.models.sources import resolve_model
from lorafold.models.storage import choose_storage, default_storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    model: str | Path,
    storage: str = "auto",
    device: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a language model, in evaluation mode: a causal one, or one that also takes images or
    sounds and runs without them.

    Args:
        model: smollm2 (embedded), a directory, a .gguf file or a hub id.
        storage: How it stores its weights: fp32, bf16, nf4 (4 bits) or int8; auto takes that of its
            files if they are quantized, else bf16 or fp32, whichever the device is faster with.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.

    Raises LorafoldError for an unknown model, storage or device, for a model that transformers
    can't load, and for files that lack weights or were changed since lorafold wrote them.
    """
    source, where = resolve_model(model, revision), choose_device(device)
    chosen = choose_storage(default_storage(source) if storage == "auto" else storage, where)
    return loading.load_model(source, chosen, where, trust_remote_code=trust_remote_code)
