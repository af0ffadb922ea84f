"""`lf.load_model`: a base model by its name, quantized and on a device of your choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.options import takes_quantization
from lorafold.resolve import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@takes_quantization
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
    base = Base(model, storage, device, revision, trust_remote_code)
    return base.stored_as_trained().load()
