"""The methods of the table on whole tiny models: with which options, attached, moved."""

from __future__ import annotations

import torch
from torch import nn

import lorafold as lf
from lorafold.core.spec import Spec
from lorafold.methods import METHODS

OPTIONS = {
    "lt-sft": {"density": 0.05},
    "fish": {"density": 0.05},
    "houlsby": {"size": 6},
    "pfeiffer": {"size": 6},
    "prompt": {"tokens": 4},
    "prefix": {"tokens": 4},
    "lokr": {"rank": 2},
    "vera": {"rank": 8},
}
NO_IDENTITY = {"prompt", "prefix"}
IDS = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(4))


def spec_of(method: str) -> Spec:
    options = OPTIONS.get(
        method,
        (
            {"rank": 3}
            if method in ("lora", "rslora", "pissa", "olora", "dora", "adalora", "loha")
            else {}
        ),
    )
    spec = (
        METHODS[method](**options)
        if method != "dora"
        else METHODS[method](lf.LoRA(rank=3, dropout=0.0))
    )
    return METHODS[method](**options, dropout=0.0) if hasattr(spec, "dropout") else spec


def attached(model: nn.Module, method: str) -> lf.Adapter:
    torch.manual_seed(0)
    return lf.attach(model, spec_of(method))


def moved(adapter: lf.Adapter, size: float = 0.05) -> lf.Adapter:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return adapter
