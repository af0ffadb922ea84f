"""Contexts in which a model is in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, without gradients, until the `with` block ends.

    Afterwards each of its modules is in the mode that it was in before.
    """
    with evaluation_mode(model), torch.no_grad():
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The same, where whoever runs the model sees to gradients: torch's switch for them belongs to
    the thread, so a generator can't hold it between two of its values.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
