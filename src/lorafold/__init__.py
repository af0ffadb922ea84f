"""lorafold: low-rank adapters of transformer models, trained, folded, composed and measured.

The public API on one screen. Everything is imported when it is first used, so that `lorafold
--help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError as LorafoldError
from lorafold.errors import NotMergeable as NotMergeable

if TYPE_CHECKING:
    # `X as X`: type checkers take it for a name of this module
    from lorafold.adapter import Adapter as Adapter
    from lorafold.adapter import attach as attach
    from lorafold.adapter import load as load
    from lorafold.core.attach import only as only
    from lorafold.methods import *  # noqa: F403  (the spec classes)
    from lorafold.training.callback import AdapterCallback as AdapterCallback

# where each function and class lies; the spec classes are those of lorafold.methods
_HOME = {
    "Adapter": "adapter",
    "AdapterCallback": "training.callback",
    "attach": "adapter",
    "load": "adapter",
    "only": "adapter",
}


if not TYPE_CHECKING:  # a wrong name is an error to type checkers, which read the imports above

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(f"lorafold.{_HOME[name]}"), name)
        if name == "__all__":  # of `from lorafold import *`
            return __dir__()
        # asked for no other name, such as a submodule's, since it imports torch
        if name[:1].isupper() and name in (specs := _spec_classes()):
            return specs[name]
        raise AttributeError(f"module 'lorafold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["LorafoldError", "NotMergeable", *_HOME, *_spec_classes()])


def _spec_classes() -> dict[str, Any]:
    classes: dict[str, Any] = importlib.import_module("lorafold.methods").spec_classes()
    return classes
