"""A context in which a model that trains drops nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undropped(model: nn.Module) -> Iterator[float]:
    """Take every dropout of the model and its adapters as 0 until the `with` block ends: its layers
    of dropout, and the probabilities that other modules keep by that name. Yields the largest.
    """
    found = [
        (module, name, p)
        for module in model.modules()
        for name, p in vars(module).items()
        if isinstance(p, float) and p > 0 and _drops(module, name)
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield max((p for _, _, p in found), default=0.0)
    finally:
        for module, name, p in found:
            setattr(module, name, p)


def _drops(module: nn.Module, name: str) -> bool:
    layer = name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
    return layer or "dropout" in name or name.endswith("pdrop")
