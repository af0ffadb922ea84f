"""Biases that layers gain, and where a plain model could hold them.

Architectures switch their biases on in the config (Llama: attention_bias, mlp_bias), for several
linears at a time. Those that come along with a bias that was wanted hold zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lorafold.core.layer import bare
from lorafold.errors import NotMergeable

# switch of the config -> path of each module that it gives a bias -> its shape
Switches = dict[str, dict[str, torch.Size]]


def gained_with(model: nn.Module, paths: Collection[str]) -> Switches:
    """The config's switches that give the modules at `paths` a bias, each with all modules that it
    gives one.

    A model without a config of transformers' has no switches and needs none. NotMergeable where no
    switch gives a module its bias.
    """
    config: Any = getattr(model, "config", None)
    if not paths or not hasattr(type(model), "_from_config"):
        return {}
    found: Switches = {}
    left = set(paths)
    for name, value in config.get_text_config().to_dict().items():
        if value is False and "bias" in name and left & (gained := _gained(model, name)).keys():
            found[name] = gained
            left -= gained.keys()
    if left:
        some = ", ".join(sorted(left)[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise NotMergeable(
            f"{some}: the adapter adds a bias, and a plain {type(model).__name__} has none there,"
            " whatever its config says"
        )
    return found


def _gained(model: Any, switch: str) -> dict[str, torch.Size]:
    config = copy.deepcopy(model.config)
    setattr(config.get_text_config(), switch, True)
    with torch.device("meta"):
        switched = type(model)._from_config(config)
    biases = {
        path: m._parameters["bias"].shape for path, m in switched.named_modules() if has_bias(m)
    }
    return {
        path: biases[path]
        for path, m in model.named_modules()
        if path in biases and not has_bias(m)
    }


def has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


@torch.no_grad()
def switch_on(model: Any, switches: Switches) -> None:
    """What `gained_with` found: a bias of zeros for every module, and the switches on in the
    model's config.
    """
    for switch, shapes in switches.items():
        setattr(model.config.get_text_config(), switch, True)
        for path, shape in shapes.items():
            module = model.get_submodule(path)
            weight: nn.Parameter = bare(module).weight  # type: ignore[assignment]
            module.bias = nn.Parameter(weight.new_zeros(shape), requires_grad=weight.requires_grad)
