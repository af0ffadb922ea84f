"""lorafold: low-rank adapters of transformer models, trained, folded, composed and measured.

The public API on one screen. Everything is imported when it is first used, so that `lorafold
--help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, NotMergeable

if TYPE_CHECKING:
    from lorafold.adapter import Adapter, attach, load
    from lorafold.api.compare import compare
    from lorafold.api.compose import compose
    from lorafold.api.estimate import estimate
    from lorafold.api.evaluate import evaluate
    from lorafold.api.generate import generate
    from lorafold.api.inspect import inspect
    from lorafold.api.load_model import load_model
    from lorafold.api.train import train
    from lorafold.core.attach import only
    from lorafold.merging.run import merge
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
    from lorafold.models.loading import load_tokenizer
    from lorafold.step.recipe import Recipe

_HOME = {
    "Adapter": "adapter",
    "attach": "adapter",
    "load": "adapter",
    "only": "adapter",
    "compare": "api.compare",
    "compose": "api.compose",
    "estimate": "api.estimate",
    "evaluate": "api.evaluate",
    "generate": "api.generate",
    "inspect": "api.inspect",
    "load_model": "api.load_model",
    "train": "api.train",
    "merge": "merging.run",
    "load_tokenizer": "models.loading",
    "Recipe": "step.recipe",
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
    "Recipe",
    "VeRA",
    "attach",
    "compare",
    "compose",
    "estimate",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "load_model",
    "load_tokenizer",
    "merge",
    "only",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorafold' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorafold.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
