"""What a delta computes with besides its tensors, such as a scale, as one more tensor of its state:
bytes of JSON, so that states in files of tensors alone have it too.

    <module path>.deltas.<adapter>.settings         {"scale": 2.0}

A state is loaded only where it has the same. Dropout is none of it, since that acts in training
alone, and states of earlier versions, which have no settings, are loaded as they were.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from lorafold.core.delta import Delta
from lorafold.errors import LorafoldError, cut, listed

SETTINGS = "settings"
SHOWN = 200  # characters of a value in a message


def settings_of(delta: Delta) -> dict[str, Any]:
    """The settings of a delta and of what it is made of, by name, as JSON has them."""
    found = {
        f"{path}.{name}".removeprefix("."): getattr(module, name)
        for path, module in delta.named_modules()
        for name in getattr(module, "setting_names", ())
    }
    values: dict[str, Any] = json.loads(json.dumps(found))
    return values


def written(delta: Delta) -> Tensor | None:  # (bytes,)
    """The settings of a delta, uint8; None if it has none."""
    found = settings_of(delta)
    if not found:
        return None
    return torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)


def check_settings(delta: Delta, given: Tensor, what: str) -> None:
    """Raise LorafoldError if the settings in a state are not those of the delta.

    Args:
        given: what `written` gave, (bytes,).
        what: the module and the adapter, for the message.
    """
    own, there = settings_of(delta), json.loads(bytes(given.tolist()))
    if own != there:
        told = [
            f"found {name} {_shown(there.get(name))}, expected {_shown(own.get(name))}"
            for name in sorted(own.keys() | there.keys())
            if own.get(name) != there.get(name)
        ]
        raise LorafoldError(
            f"{what}: the state to load is of another adapter: {listed(told, '; ')}; attach one"
            " with the options of that one"
        )


def _shown(value: Any) -> str:
    return "none" if value is None else cut(json.dumps(value), SHOWN)
