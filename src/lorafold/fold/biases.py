"""Biases that folding adds, and the config switches by which a plain model can store them.

Architectures switch their biases on in the config (Llama: attention_bias, mlp_bias), each switch
for several linears. The linears that get a bias only because of the switch get zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lorafold.bases import layer_of
from lorafold.errors import NotMergeable, listed

# switch in the config -> path of each module to which it gives a bias -> the shape of that bias
Switches = dict[str, dict[str, torch.Size]]


def gained_with(model: nn.Module, paths: Collection[str]) -> Switches:
    """The config's switches that give the modules at `paths` a bias, each with all the modules to
    which it gives one.

    A model that is not from transformers has no switches and needs none. Raises NotMergeable if no
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
        raise NotMergeable(
            f"{listed(sorted(left))}: the adapter adds a bias, and {type(model).__name__} has"
            " none there, whatever its config says; keep the adapter separate"
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
    """Whether the module has a bias."""
    return module._parameters.get("bias") is not None


@torch.no_grad()
def switch_on(model: Any, switches: Switches) -> None:
    """Turn on the switches that `gained_with` found in the model's config, and give the modules
    biases of zeros.
    """
    for switch, shapes in switches.items():
        setattr(model.config.get_text_config(), switch, True)
        for path, shape in shapes.items():
            module = model.get_submodule(path)
            like = next(module.parameters(recurse=False))
            dtype = layer_of(module).dense_like()[0].dtype
            zeros = torch.zeros(shape, dtype=dtype, device=like.device)
            module.bias = nn.Parameter(zeros, requires_grad=like.requires_grad)
