"""`lf.load_model`: a base by its name, in a storage, on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.machine.devices import choose_device
from lorafold.models import loading
from lorafold.models.sources import resolve_model
from lorafold.models.storage import choose_storage, held_as

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
    """A causal language model, frozen files read and checked, in evaluation mode.

    Args:
        model: smollm2 (embedded), a directory, a .gguf file or a hub id.
        storage: How its weights are stored: fp32, bf16, nf4 (4 bits) or int8; auto takes what its
            files hold if they are quantized, else 16 or 32 bits, whichever the device is fast with.
        device: cpu, cuda, cuda:N or mps; None takes the fastest kind that is there.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.

    Raises LorafoldError where there is no such model, storage or device, where transformers can't
    load it, where its files lack weights, and where lorafold wrote them and they are damaged.
    """
    source, where = resolve_model(model, revision), choose_device(device)
    held = choose_storage(held_as(source) if storage == "auto" else storage, where)
    return loading.load_model(source, held, where, trust_remote_code=trust_remote_code)
