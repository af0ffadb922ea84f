"""The module paths in an adapter's files, where the model is a part of the one that other programs
load: those of the whole (`models.architecture`). Files that have the part's own paths are read too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lorafold.core.anatomy import Anatomy
from lorafold.models.architecture import whole_of
from lorafold.peft.format import ROOT
from lorafold.peft.saved import Saved
from lorafold.peft.tokens import Completed

START = f"{ROOT}."


def renamed(key: str, path: Callable[[str], str]) -> str:
    """The key of a tensor in a file, with the module path in it as `path` gives it."""
    return START + path(key.removeprefix(START)) if key.startswith(START) else key


def within(saved: Saved, model: nn.Module) -> Saved:
    """The adapter with the module paths that this model has."""
    modules = {path for path, _ in Anatomy.of(model).modules}
    own = [name.removeprefix(START) for name in saved.weights.names if name.startswith(START)]
    roots = {".".join(path.split(".")[:2]) for path in own}
    whole = None if roots <= modules else whole_of(model)
    if whole is None:
        return saved
    names = {old: renamed(old, whole.inward) for old in saved.weights.names}
    moved = {new: saved.weights.get(old) for old, new in names.items() if new != old}
    hidden = {old for old, new in names.items() if new != old}
    weights = Completed(saved.weights, hidden, moved)
    return replace(saved, selection=saved.selection.under(whole.paths), weights=weights)
