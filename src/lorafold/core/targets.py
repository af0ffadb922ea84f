"""Targets: the modules that an adapter is attached to.

    "all-linear"            a preset, found by the model's structure (`lorafold.core.presets`)
    ["q_proj", "h.0.fc"]    the modules of these names, or whose path ends in them
    "regex"                 the modules whose whole path it matches

A pattern that matches no module is an error, which lists similar names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import nn

from lorafold.core.anatomy import bare_modules
from lorafold.core.presets import PRESETS
from lorafold.errors import NoTarget, listed, shortened

# what has a matrix and is in no preset, but may be named
NAMED = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Matches:
    """Module paths by the pattern that matched them; each is under its first pattern only."""

    by_pattern: dict[str, tuple[str, ...]]

    @property
    def paths(self) -> tuple[str, ...]:
        """All module paths, in the order of the patterns."""
        return tuple(path for paths in self.by_pattern.values() for path in paths)

    def without(self, paths: Collection[str]) -> Matches:
        """The matches without these paths; a pattern may have none left."""
        left = {
            pattern: tuple(path for path in hits if path not in paths)
            for pattern, hits in self.by_pattern.items()
        }
        return Matches(left)


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether the path, or its end after a dot, matches the regular expression: PEFT's rule for the
    keys of `rank_pattern` and `alpha_pattern`.
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def match(
    model: nn.Module, targets: str | Sequence[str] | Matches, is_linear: Callable[[nn.Module], bool]
) -> Matches:
    """Resolve targets to module paths.

    Raises NoTarget with every pattern that matches no module, and similar names.

    Args:
        targets: a preset, a regular expression, or names; matches are returned as they are.
    """
    if isinstance(targets, Matches):
        return targets
    paths = [path for path, _ in bare_modules(model) if path]
    if isinstance(targets, str) and targets in PRESETS:
        found = {targets: PRESETS[targets](model, is_linear)}
        if not found[targets]:
            raise NoTarget(
                f"targets {targets!r}: {type(model).__name__} has no modules of this preset; name"
                " the modules instead"
            )
    elif isinstance(targets, str):
        try:
            found = {targets: [p for p in paths if re.fullmatch(targets, p)]}
        except re.error as e:
            raise NoTarget(f"targets {targets!r} is not a regular expression: {e}") from None
    else:
        found = {t: [p for p in paths if p == t or p.endswith(f".{t}")] for t in targets}
    if missing := [t for t in found if not found[t]]:
        raise NoTarget(listed((no_match(t, model, is_linear) for t in missing), "; "))
    seen: set[str] = set()
    by_pattern = {}
    for pattern, hits in found.items():
        by_pattern[pattern] = tuple(p for p in hits if p not in seen)
        seen.update(hits)
    return Matches(by_pattern)


def no_match(pattern: str, model: nn.Module, is_linear: Callable[[nn.Module], bool]) -> str:
    """The error message for a pattern that matches no module.

    Args:
        model: the model, whose linears, embeddings and convolutions with similar names are listed.
    """
    names = sorted(
        {
            path.rsplit(".", 1)[-1]
            for path, m in bare_modules(model)
            if is_linear(m) or isinstance(m, NAMED)
        }
    )
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], names, n=3, cutoff=0.4) or names
    given, similar = shortened(repr(pattern), 80), listed(near, room=100) or "none"
    if "," in pattern:
        each = [name.strip() for name in pattern.split(",")]
        apart = listed((f"--targets {name}" for name in each), " ", room=60)
        return f"target {given} matches no module; several names are a list: {apart}"
    if pattern in names:  # alone it is a regular expression, as in PEFT
        return f"target {given} matches no whole path of a module; as a name it is [{given}]"
    if any(path.endswith(f".{pattern}") for path, _ in bare_modules(model)):
        return f"target {given} matches no whole path of a module; .*{pattern} does"
    return f"target {given} matches no module; similar names: {similar}"
