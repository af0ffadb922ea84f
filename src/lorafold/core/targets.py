"""Targets: the modules that an adapter is attached to.

    "all-linear"            a preset, resolved from the model's structure (`lorafold.core.anatomy`)
    ["q_proj", "h.0.fc"]    the modules with these names, or whose path ends in them
    "regex"                 the modules whose whole path matches the expression

The presets:

    all-linear      the linear layers and expert weights of the blocks
    attention, mlp  the modules of all-linear inside an attention, and the others
    sublayers       the attention and the MLP of each block, as whole modules
    mlp-sublayers   the MLP of each block
    biases          every module that has a bias; all-linear if the blocks have no bias
    parameters      every module that directly holds parameters, tied ones once
    decoder         the module between token ids and head, and the causal self-attentions inside it
    head            the linear layers on top of the base model, or the output embedding
    vision-linear   the linear layers of the vision encoders' blocks
    audio-linear    the linear layers of the audio encoders' blocks

In a multimodal model, all presets but the last two cover only the language model and its head.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from lorafold.core.anatomy import Anatomy, beneath, ends_in, last_part, of_attention
from lorafold.core.expert_matrices import Matrices
from lorafold.errors import NoTarget, listed, truncate_middle

IsLinear = Callable[[nn.Module], bool]
# modules with a matrix that are in no preset but may be named
NAMEABLE = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Matches:
    """Module paths by the pattern that matched them; each path is listed under its first pattern
    only.
    """

    by_pattern: dict[str, tuple[str, ...]]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for paths in self.by_pattern.values() for path in paths)

    def without(self, paths: Collection[str]) -> Matches:
        by_pattern = self.by_pattern.items()
        return Matches({t: tuple(p for p in hits if p not in paths) for t, hits in by_pattern})


def pattern_matches(pattern: str, path: str) -> bool:
    """Returns whether the path, or its end after a dot, matches the pattern: PEFT's rule for
    `rank_pattern`.
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def match(model: nn.Module, targets: str | Sequence[str] | Matches, is_linear: IsLinear) -> Matches:
    """Resolves targets (preset, regular expression, names or matches) to module paths. Raises
    NoTarget, which lists similar names, for patterns without a match.
    """
    if isinstance(targets, Matches):
        return targets
    paths = Anatomy.of(model).paths
    if not isinstance(targets, str):
        matches = {t: [p for p in paths if ends_in(p, t)] for t in targets}
    elif targets in PRESETS:
        matches = {targets: PRESETS[targets](model, is_linear)}
        if not matches[targets]:
            raise NoTarget(
                f"targets {targets!r}: {type(model).__name__} has no modules of this preset; give"
                " module names instead"
            )
    else:
        try:
            matches = {targets: [p for p in paths if re.fullmatch(targets, p)]}
        except re.error as e:
            raise NoTarget(f"targets {targets!r} is not a regular expression: {e}") from None
    if missing := [t for t in matches if not matches[t]]:
        raise NoTarget(listed((no_match(t, model, is_linear) for t in missing), "; "))
    first = {path: pattern for pattern in reversed(matches) for path in matches[pattern]}
    return Matches({t: tuple(p for p in hits if first[p] == t) for t, hits in matches.items()})


def no_match(pattern: str, model: nn.Module, is_linear: IsLinear) -> str:
    modules = Anatomy.of(model).modules
    named = (path for path, m in modules if is_linear(m) or isinstance(m, NAMEABLE))
    names = sorted(set(map(last_part, named)))
    near = difflib.get_close_matches(last_part(pattern), names, n=3, cutoff=0.4) or names
    quoted, similar = truncate_middle(repr(pattern), 80), listed(near, max_chars=100) or "none"
    if "," in pattern:
        each = [name.strip() for name in pattern.split(",")]
        options = listed((f"--targets {name}" for name in each), " ", max_chars=60)
        return f"target {quoted} matches no module; to give several names, use {options}"
    if pattern in names:  # a single string is a regular expression, as in PEFT
        return f"target {quoted} matches no full module path; to give a name, use [{quoted}]"
    if any(path.endswith(f".{pattern}") for path, _ in modules):
        return f"target {quoted} matches no full module path; as a pattern, use .*{pattern}"
    return f"target {quoted} matches no module; similar names: {similar}"


def block_linears(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """Returns the linear modules inside the blocks, or of a model without blocks, except routers.
    """
    anatomy = Anatomy.of(model)
    inside = beneath(anatomy.language_blocks or [""])
    linears = (path for path, m in anatomy.language_modules if is_linear(m))
    return [path for path in linears if path not in anatomy.routers and inside(path)]


def all_linear(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """Returns the linear modules of the blocks that can be trained; indexers can't, because they
    get no gradient.
    """
    is_indexer = beneath(Anatomy.of(model).indexers)
    return [path for path in block_linears(model, is_linear) if not is_indexer(path)]


def encoder_linear(kind: str, model: nn.Module, is_linear: IsLinear) -> list[str]:
    return [
        f"{path}.{inner}"
        for path, takes in Anatomy.of(model).encoders.items()
        if takes == kind
        for inner in all_linear(model.get_submodule(path), is_linear)
    ]


def by_attention(inside: bool, model: nn.Module, is_linear: IsLinear) -> list[str]:
    return [path for path in all_linear(model, is_linear) if of_attention(path) is inside]


def sublayers(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """Returns the attention and the MLP of each block, which are its children with submodules; none
    if a block lacks one of the two.
    """
    anatomy, paths = Anatomy.of(model), list[str]()
    for block in filter(beneath([anatomy.decoder]), anatomy.language_blocks):
        children = model.get_submodule(block).named_children()
        names = [name for name, m in children if any(True for _ in m.children())]
        if {*map(of_attention, names)} != {True, False}:
            return []
        paths += [f"{block}.{name}" for name in names]
    return paths


def biases(model: nn.Module, is_linear: IsLinear) -> list[str]:
    anatomy = Anatomy.of(model)
    modules = anatomy.language_modules
    biased = [path for path, m in modules if m._parameters.get("bias") is not None]
    if any(map(beneath(anatomy.language_blocks), biased)):
        return [path for path in biased if path not in anatomy.routers]
    experts = {path for path, m in modules if isinstance(m, Matrices)}
    return [path for path in all_linear(model, is_linear) if path not in experts]


def parameters(model: nn.Module, is_linear: IsLinear) -> list[str]:
    counted, paths = set[int](), list[str]()
    for path, module in Anatomy.of(model).language_modules:
        own = {id(p) for p in module._parameters.values() if p is not None}
        paths += [path] * bool(own - counted)
        counted |= own
    return paths


def decoder(model: nn.Module, is_linear: IsLinear) -> list[str]:
    anatomy = Anatomy.of(model)
    path = anatomy.decoder
    inside = [p for p in filter(beneath([path]), anatomy.attentions) if p != path]
    return [path, *inside] if inside else []


def head(model: nn.Module, is_linear: IsLinear) -> list[str]:
    anatomy = Anatomy.of(model)
    over = beneath(anatomy.heads)
    return [path for path, m in anatomy.modules if is_linear(m) and over(path)]


PRESETS: dict[str, Callable[[nn.Module, IsLinear], list[str]]] = {
    "all-linear": all_linear,
    "attention": partial(by_attention, True),
    "mlp": partial(by_attention, False),
    "sublayers": sublayers,
    "mlp-sublayers": lambda model, is_linear: [
        path for path in sublayers(model, is_linear) if not of_attention(last_part(path))
    ],
    "biases": biases,
    "parameters": parameters,
    "decoder": decoder,
    "head": head,
    "vision-linear": partial(encoder_linear, "vision"),
    "audio-linear": partial(encoder_linear, "audio"),
}
