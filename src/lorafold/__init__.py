"""lorafold: low-rank adapters of transformer models, trained, merged, composed and measured.

The public API on one screen. Everything is imported on first use, so `lorafold --help` needs no
torch.
"""

import signal
import sys

if sys.platform != "win32" and (
    sys.orig_argv[1:3] == ["-m", "lorafold"] or "".join(sys.orig_argv[1:2]).endswith("/lorafold")
):  # the command: until `cli.main` can handle it, Ctrl-C has to wait
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

import importlib
from typing import TYPE_CHECKING, Any

from lorafold.errors import WINDOWS as _WINDOWS
from lorafold.errors import LorafoldError as LorafoldError
from lorafold.errors import NotMergeable as NotMergeable
from lorafold.methods import METHODS as _METHODS

if TYPE_CHECKING:
    # `X as X`: type checkers take it for a name of this module
    from lorafold.adapter import Adapter as Adapter
    from lorafold.adapter import attach as attach
    from lorafold.adapter import reference as reference
    from lorafold.api.chat import chat as chat
    from lorafold.api.compare import compare as compare
    from lorafold.api.compose import Learning as Learning
    from lorafold.api.compose import compose as compose
    from lorafold.api.estimate import estimate as estimate
    from lorafold.api.evaluate import evaluate as evaluate
    from lorafold.api.export import export as export
    from lorafold.api.extract import extract as extract
    from lorafold.api.fragility import Defending as Defending
    from lorafold.api.fragility import Probes as Probes
    from lorafold.api.fragility import Tuning as Tuning
    from lorafold.api.fragility import fragility as fragility
    from lorafold.api.generate import generate as generate
    from lorafold.api.history import history as history
    from lorafold.api.inspect import inspect as inspect
    from lorafold.api.intrinsic import intrinsic as intrinsic
    from lorafold.api.load import load as load
    from lorafold.api.load import load_model as load_model
    from lorafold.api.merge import merge as merge
    from lorafold.api.resize import resize as resize
    from lorafold.api.score import score as score
    from lorafold.api.serve import serve as serve
    from lorafold.api.train import preview as preview
    from lorafold.api.train import train as train
    from lorafold.core.attach import only as only
    from lorafold.data.tool_calls import parse_calls as parse_calls
    from lorafold.methods import *  # noqa: F403  (the spec classes)
    from lorafold.models.tokenizer import load_tokenizer as load_tokenizer
    from lorafold.recipe.recipe import Recipe as Recipe
    from lorafold.training.trainer_callback import AdapterCallback as AdapterCallback

    __version__: str

# where each function and class is; the spec classes are those of lorafold.methods
_NAMES = {
    "adapter": "Adapter attach only reference",
    "api.compose": "compose Learning",
    "api.fragility": "fragility Probes Tuning Defending",
    "api.load": "load load_model",
    "api.train": "train preview",
    "data.tool_calls": "parse_calls",
    "models.tokenizer": "load_tokenizer",
    "recipe.recipe": "Recipe",
    "training.trainer_callback": "AdapterCallback",
    **{
        f"api.{name}": name
        for name in (
            "chat", "compare", "estimate", "evaluate", "export", "extract", "generate", "history",
            "inspect", "intrinsic", "merge", "resize", "score", "serve",
        )
    },
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


if not TYPE_CHECKING:  # a wrong name is an error to type checkers, which read the imports above

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            if sys.platform == "win32":
                raise LorafoldError(_WINDOWS)
            return getattr(importlib.import_module(f"lorafold.{_HOME[name]}"), name)
        if name == "__all__":  # of `from lorafold import *`
            return __dir__()
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("lorafold")
        if name in (classes := _METHODS.classes):
            return classes[name]()
        raise AttributeError(f"module 'lorafold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["LorafoldError", "NotMergeable", *_HOME, *_METHODS.classes])
