"""Checkpoints of a `Trainer` without the base model.

`save_pretrained` leaves out the weights that a model names in `_keys_to_ignore_on_save`, and with
all of them named it writes none. Trainer looks for a `model.safetensors` when it resumes a run and
loads it, so that one without tensors takes its place: all keys are missing then, which is no news.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from lorafold.core.attach import base_state
from lorafold.models.weights import SINGLE


class BaseKeptOut:
    """While it is switched on, `save_pretrained` leaves the model's own weights out. Until it ends,
    a state without any tensor can be loaded into the model without a warning.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: Any = getattr(model, "_keys_to_ignore_on_save", None)
        self.handle = model.register_load_state_dict_post_hook(self._nothing_missing)

    def switch(self, on: bool) -> None:
        """Leave the model's weights out of what Trainer writes, or let them in again."""
        if hasattr(self.model, "_keys_to_ignore_on_save"):
            ignored: Any = set(self.model.state_dict()) if on else self.before
            self.model._keys_to_ignore_on_save = ignored

    def end(self) -> None:
        """Leave the model as it was found."""
        self.switch(False)
        self.handle.remove()

    @staticmethod
    def _nothing_missing(model: nn.Module, incompatible: Any) -> None:
        if set(incompatible.missing_keys) == set(base_state(model)):
            incompatible.missing_keys.clear()


def write_empty_weights(checkpoint: Path) -> None:
    """Write a `model.safetensors` without tensors, unless there is one."""
    path, partial = checkpoint / SINGLE, checkpoint / f".{SINGLE}.partial"
    if not path.exists():
        save_file({}, partial, metadata={"format": "pt"})
        partial.replace(path)
