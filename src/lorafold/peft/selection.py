"""Which modules a PEFT config selects, and how to say in a config which were selected.

    target_modules     a list: paths, or ends of paths; a string: a regex over whole paths, or
                       "all-linear" (all but the output layer)
    exclude_modules    the same, taken out again; modules to save are taken out too
    layers_to_transform, layers_pattern    only in the blocks of these numbers
    modules_to_save    names that paths end with, in mid-word too
    trainable_token_indices    ids whose rows are trained, by module (`tokens.py`)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lorafold.bases import is_linear
from lorafold.core.anatomy import bare_modules
from lorafold.core.targets import Matches, match
from lorafold.errors import LorafoldError
from lorafold.peft.tokens import Ids

Patterns = str | tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """What a config says about modules, in PEFT's terms; `target_modules` and `modules_to_save` are
    resolved on a model.
    """

    target_modules: Patterns
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: Patterns = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    tokens: Ids = ()
    preset: str | None = None  # the method's own place, whatever the others say

    def targets(self, model: nn.Module) -> Matches:
        """By pattern; patterns that match nothing are left out. LorafoldError if all do."""
        if self.preset is not None:
            return match(model, self.preset, is_linear)
        modules = {p: m for p, m in bare_modules(model) if p and not self._excluded(p)}
        if self.target_modules == "all-linear":
            head = getattr(model, "get_output_embeddings", lambda: None)()
            found = {
                "all-linear": tuple(p for p, m in modules.items() if is_linear(m) and m is not head)
            }
        elif isinstance(self.target_modules, str):
            found = {
                self.target_modules: tuple(p for p in modules if _matches(self.target_modules, p))
            }
        else:
            inside = [p for p in modules if self._in_layers(p)]
            first = {
                p: next((t for t in self.target_modules if _matches((t,), p)), None) for p in inside
            }
            found = {t: tuple(p for p in inside if first[p] == t) for t in self.target_modules}
        if not any(found.values()):
            raise LorafoldError(
                f"target_modules {_shown(self.target_modules)} match no module of this model"
            )
        return Matches({pattern: hits for pattern, hits in found.items() if hits})

    def saved(self, model: nn.Module) -> Matches:
        """By name; names that match nothing are left out (a config for classifiers names every head
        there is).
        """
        paths = [p for p, _ in bare_modules(model) if p]
        found = {name: tuple(p for p in paths if p.endswith(name)) for name in self.modules_to_save}
        return Matches({name: hits for name, hits in found.items() if hits})

    def _excluded(self, path: str) -> bool:
        return _matches(self.exclude_modules, path) or any(
            re.match(rf"(^|.*\.){m}($|\..*)", path) for m in self.modules_to_save
        )

    def _in_layers(self, path: str) -> bool:
        if not self.layers_to_transform:
            return True
        heads = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [
            r".*?\.[^.]*\.(\d+)\."
        ]
        number = next((m.group(1) for head in heads if (m := re.match(head, path))), None)
        return number is not None and int(number) in self.layers_to_transform


def describe(
    model: nn.Module,
    targets: Sequence[str],
    patterns: Sequence[str],
    saved: Sequence[str],
    names: Sequence[str],
) -> Selection:
    """The plainest selection of exactly these modules: `targets` to adapt, whose `patterns` the
    user gave, and the leaf modules `saved` to train whole, whose `names` the user gave.
    LorafoldError if PEFT's rule has no name for a module to save.
    """
    whole = next(
        (
            s
            for s in (tuple(names), _ends(saved), tuple(saved))
            if set(saved_leaves(model, s)) == set(saved)
        ),
        None,
    )
    if whole is None:
        extra = sorted(set(saved_leaves(model, saved)) - set(saved))
        raise LorafoldError(
            f"modules to save {', '.join(names)}: PEFT's format can't name them without"
            f" {', '.join(extra)}; save these too"
        )
    candidates: list[Patterns] = [
        _ends(targets),
        tuple(sorted(targets)),
        "|".join(re.escape(p) for p in sorted(targets)),
    ]
    if len(patterns) == 1 and patterns[0] not in targets:
        candidates.insert(1, patterns[0])
    return next(s for c in candidates if _selects(s := Selection(c, whole), model, targets))


def saved_leaves(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The modules holding parameters, at and under those that PEFT's rule finds for
    `modules_to_save`.
    """
    roots = tuple(f"{path}." for path in Selection((), tuple(names)).saved(model).paths)
    return [
        path for path, m in bare_modules(model) if m._parameters and f"{path}.".startswith(roots)
    ]


def _selects(selection: Selection, model: nn.Module, targets: Sequence[str]) -> bool:
    try:
        return set(selection.targets(model).paths) == set(targets)
    except LorafoldError:
        return False


def _ends(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({p.rsplit(".", 1)[-1] for p in paths}))


def _matches(patterns: Patterns, path: str) -> bool:
    if isinstance(patterns, str):
        return bool(patterns) and re.fullmatch(patterns, path) is not None
    return any(path == p or path.endswith(f".{p}") for p in patterns)


def _shown(patterns: Patterns) -> str:
    return repr(patterns) if isinstance(patterns, str) else ", ".join(patterns)
