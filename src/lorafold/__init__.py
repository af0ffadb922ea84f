"""lorafold: low-rank adapters of transformer models, trained, folded, composed and measured.

The public API on one screen. Everything is imported when it is first used, so that `lorafold --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, NotMergeable

if TYPE_CHECKING:
    from lorafold.adapter import Adapter, attach, load, only
    from lorafold.methods.lora import LoRA

_HOME = {
    "Adapter": "adapter", "attach": "adapter", "load": "adapter", "only": "adapter",
    "LoRA": "methods.lora",
}  # fmt: skip

__all__ = ["Adapter", "LoRA", "LorafoldError", "NotMergeable", "attach", "load", "only"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorafold' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorafold.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
