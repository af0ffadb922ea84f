"""Which base an adapter was trained on: shapes and a few values of its weights, taken before any quantization.

Up to 32 tensors and 16 values of each, at fixed places, rounded to bf16: the same base read in fp32 or bf16 gives the same
fingerprint, and fp16 one within its rounding. It costs about a millisecond and reads no tensor whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.presets import bare_modules

TENSORS, VALUES = 32, 16
Fingerprint = dict[str, dict[str, Any]]  # parameter name -> {"shape": [...], "values": [...]}
Values = Callable[[str], Tensor]  # a base parameter's values, by its name


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by name, tied ones once, without those of the deltas laid over it."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in bare_modules(model):
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), (f"{path}.{name}" if path else name, p))
    return dict(sorted(found.values()))


def values_of(model: nn.Module) -> Values:
    """The values as the model itself holds them."""
    return lambda name: model.get_parameter(name)


def sample(tensor: Tensor) -> list[float]:
    """VALUES values at evenly spaced places of the flat tensor, rounded to bf16."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    at = torch.linspace(0, flat.numel() - 1, min(VALUES, flat.numel()), dtype=torch.float64).long()
    return flat[at.to(flat.device)].to(torch.bfloat16).float().tolist()


def fingerprint(model: nn.Module, values: Values) -> Fingerprint:
    """Of evenly spaced parameters of the model, with `values` to read them: shapes come from the model, which may be a skeleton."""
    names = [n for n, p in parameter_names(model).items() if p.is_floating_point() and p.numel()]
    chosen = [names[round(i * (len(names) - 1) / (TENSORS - 1))] for i in range(TENSORS)] if len(names) > TENSORS else names
    shapes = parameter_names(model)
    return {name: {"shape": list(shapes[name].shape), "values": sample(values(name))} for name in chosen}


def differences(expected: Fingerprint, model: nn.Module, values: Values) -> list[str]:
    """What of a stored fingerprint the model does not show: one line a tensor."""
    shapes = {n: list(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    problems = []
    for name, stored in expected.items():
        if name not in shapes:
            problems.append(f"{name} is not there")
        elif shapes[name] != stored["shape"]:
            problems.append(f"{name} is {shapes[name]}, was {stored['shape']}")
        else:
            now, then = torch.tensor(sample(values(name))), torch.tensor(stored["values"])
            unit = torch.finfo(torch.bfloat16).eps  # a value may have been rounded once more on the way, to fp16
            if not ((now - then).abs() <= unit * then.abs() + 1e-7).all():
                problems.append(f"{name} holds other values")
    return problems
