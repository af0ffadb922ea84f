"""From which files the models of this process were read, for as long as each lives.

    remember(model, source, trust_remote_code)      known(model) -> (source, trust_remote_code)
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lorafold.models.sources import ModelSource

if TYPE_CHECKING:
    from torch import nn

_READ: WeakKeyDictionary[nn.Module, tuple[ModelSource, bool]] = WeakKeyDictionary()


def remember(model: nn.Module, source: ModelSource, trust_remote_code: bool) -> None:
    """Note the files of a model that was just read.

    Args:
        source: Its files.
        trust_remote_code: Its own Python files run.
    """
    _READ[model] = source, trust_remote_code


def known(model: nn.Module) -> tuple[ModelSource, bool] | None:
    """What was noted; None for a model that was made, changed or read by other means, and where the
    directory is no longer there.
    """
    found = _READ.get(model)
    return found if found and found[0].path.is_dir() else None


def forget(model: nn.Module) -> None:
    """The model's own weights are changed, so that they are no longer those of its files."""
    _READ.pop(model, None)
