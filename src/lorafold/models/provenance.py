"""From which files the models of this process were read, for as long as each lives.

    remember(model, source)      known(model) -> source
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lorafold.models.sources import ModelSource

if TYPE_CHECKING:
    from torch import nn

_READ: WeakKeyDictionary[nn.Module, ModelSource] = WeakKeyDictionary()


def remember(model: nn.Module, source: ModelSource) -> None:
    """Note the files of a model that was just read."""
    _READ[model] = source


def known(model: nn.Module) -> ModelSource | None:
    """What was noted; None for a model that was made, changed or read by other means, and where the
    directory is no longer there.
    """
    found = _READ.get(model)
    return found if found and found.path.is_dir() else None


def forget(model: nn.Module) -> None:
    """The model's own weights are changed, so that they are no longer those of its files."""
    _READ.pop(model, None)
