"""`lf.load_model`: a base by its name, in the storage and on the device that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.resolve import Base

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
    base = Base(model, storage, device, revision, trust_remote_code)
    return base.stored_as_trained().load()
