"""lorafold: low-rank adapters of transformer models, trained, folded, composed and measured.

The public API on one screen. Everything is imported when it is first used, so that `lorafold
--help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, NotMergeable

if TYPE_CHECKING:
    from lorafold.adapter import Adapter, attach, load
    from lorafold.core.attach import only
    from lorafold.methods.adalora import AdaLoRA
    from lorafold.methods.bitfit import BitFit
    from lorafold.methods.bottleneck import Bottleneck
    from lorafold.methods.dora import DoRA
    from lorafold.methods.fastfood import Fastfood
    from lorafold.methods.full import Full
    from lorafold.methods.ia3 import IA3
    from lorafold.methods.inits import OLoRA, PiSSA
    from lorafold.methods.loha import LoHa
    from lorafold.methods.lokr import LoKr
    from lorafold.methods.lora import LoRA
    from lorafold.methods.prefix import Prefix
    from lorafold.methods.probe import LinearProbe
    from lorafold.methods.prompt import Prompt
    from lorafold.methods.sparse import LTSFT, FishMask
    from lorafold.methods.vera import VeRA
    from lorafold.training.callback import AdapterCallback

_HOME = {
    "Adapter": "adapter",
    "AdapterCallback": "training.callback",
    "attach": "adapter",
    "load": "adapter",
    "only": "adapter",
    "AdaLoRA": "methods.adalora",
    "BitFit": "methods.bitfit",
    "Bottleneck": "methods.bottleneck",
    "DoRA": "methods.dora",
    "Fastfood": "methods.fastfood",
    "FishMask": "methods.sparse",
    "Full": "methods.full",
    "IA3": "methods.ia3",
    "LTSFT": "methods.sparse",
    "LinearProbe": "methods.probe",
    "LoHa": "methods.loha",
    "LoKr": "methods.lokr",
    "LoRA": "methods.lora",
    "OLoRA": "methods.inits",
    "PiSSA": "methods.inits",
    "Prefix": "methods.prefix",
    "Prompt": "methods.prompt",
    "VeRA": "methods.vera",
}

__all__ = [
    "IA3",
    "LTSFT",
    "AdaLoRA",
    "Adapter",
    "AdapterCallback",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "Fastfood",
    "FishMask",
    "Full",
    "LinearProbe",
    "LoHa",
    "LoKr",
    "LoRA",
    "LorafoldError",
    "NotMergeable",
    "OLoRA",
    "PiSSA",
    "Prefix",
    "Prompt",
    "VeRA",
    "attach",
    "load",
    "only",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorafold' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorafold.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
