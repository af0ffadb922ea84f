"""A model that is asked for an answer, and notices nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def asking(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; each module's own mode comes back when the `with`
    ends.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
