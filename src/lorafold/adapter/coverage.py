"""Reports the parameters of a model that an adapter does not reach.

    frozen in the blocks: experts 68.9%, router 0.3%, norms 0.1% of their 1,234,567 parameters;
    beside them: vision tower 31.0% of the model's 2,345,678

A parameter is reached if it, or its module, has a delta.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lorafold.core.anatomy import Anatomy, beneath, last_part
from lorafold.core.expert_matrices import Matrices, module_at
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError
from lorafold.files.templates import render_text
from lorafold.layers import is_linear, layer_of, parameter_sizes

ENCODER_INPUTS = {"vision": "an image", "audio": "audio"}
KINDS = (
    *("linears", "experts", "router", "indexers", "convolutions", "embeddings", "norms", "other"),
)


@dataclass(frozen=True)
class Unreached:
    """The numbers of parameters without a delta, by kind: `blocks` are in the language model's
    blocks, which have `of_blocks` parameters, and `beside` in encoders and connectors. The whole
    model has `of_model` parameters.
    """

    blocks: dict[str, int]
    of_blocks: int
    beside: dict[str, int]
    of_model: int

    def as_json(self) -> dict[str, dict[str, float]]:
        """The shares of parameters without a delta: under `blocks` relative to the blocks'
        parameters, and under `beside` relative to all parameters.
        """
        return {
            "blocks": {kind: n / self.of_blocks for kind, n in self.blocks.items()},
            "beside": {what: n / self.of_model for what, n in self.beside.items()},
        }

    def __str__(self) -> str:
        return render_text("adapter/unreached.jinja", counts=self, **self.as_json())


def unreached(model: nn.Module, sites: Collection[str]) -> Unreached:
    """Counts the parameters without a delta, in the blocks, and in encoders and connectors."""
    anatomy, sizes = Anatomy.of(model), parameter_sizes(model)
    in_block = beneath(anatomy.language_blocks or [""])
    outside = beneath(anatomy.encoders_and_connectors)
    kinds, around, of_blocks = Counter[str](), Counter[str](), 0
    for path, module in anatomy.modules:
        own = sizes.get(path, {})
        left = sum(n for name, n in own.items() if not {path, f"{path}.{name}"} & {*sites})
        if outside(path):
            towers = (f"{k} tower" for root, k in anatomy.encoders.items() if beneath([root])(path))
            around[next(towers, "connector")] += left
        elif in_block(path):
            kinds[_kind_of_module(path, module, anatomy)] += left
            of_blocks += sum(own.values())
    return Unreached(
        {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        of_blocks,
        {what: n for what, n in around.items() if n},
        sum(n for own in sizes.values() for n in own.values()),
    )


def count_modules(model: nn.Module, paths: Collection[str]) -> str:
    """The number of adapted modules, expert parameters and modules in encoders, in words."""
    experts = [m for m in (module_at(model, path) for path in paths) if isinstance(m, Matrices)]
    rest = len(paths) - len(experts)
    words = [f"{rest} modules"] * bool(rest or not experts)
    if experts:
        matrices = sum(layer_of(m).matrices[0] for m in experts)
        words.append(f"{len(experts)} expert parameters ({matrices:,} matrices)")
    inside = sum(map(beneath(Anatomy.of(model).encoders), paths))
    return " and ".join(words) + (f", {inside} of them in an encoder" if inside else "")


def encoder_targets_note(model: nn.Module, matches: Matches) -> str | None:
    """A line about targets that match modules of an encoder although they do not name it, or None.
    """
    anatomy = Anatomy.of(model)
    roots, language = anatomy.encoders, anatomy.language
    named = {last_part(root) for root in roots} | {f"{k}-linear" for k in roots.values()}
    inside = {
        pattern: hits
        for pattern, paths in matches.by_pattern.items()
        if (hits := [*filter(beneath(roots), paths)]) and not any(n in pattern for n in named)
    }
    if not inside:
        return None
    hit = {path for paths in inside.values() for path in paths}
    where = dict.fromkeys(kind for root, kind in roots.items() if any(map(beneath([root]), hit)))
    counts = ", ".join(
        f"{len(paths)} of the {len(matches.by_pattern[pattern])} modules of {pattern}"
        for pattern, paths in inside.items()
    )
    ends = {last_part(p) for t in inside for p in matches.by_pattern[t] if p not in hit}
    only = rf"{re.escape(language)}\..*\.({'|'.join(sorted(ends))})"
    advice = f", or the regular expression {only}" if language and ends else ""
    return (
        f"targets in the {' encoder and the '.join(where)} encoder: {counts}; to adapt only the"
        f" language model, use a preset such as all-linear{advice}"
    )


def _kind_of_module(path: str, module: nn.Module, anatomy: Anatomy) -> str:
    weight, name = module._parameters.get("weight"), type(module).__name__.lower()
    if isinstance(module, _ConvNd):
        return "convolutions"
    if path in anatomy.experts:  # also experts that do not use transformers' interface
        return "experts"
    if path in anatomy.routers:
        return "router"
    if beneath(anatomy.indexers)(path):
        return "indexers"
    if is_linear(module):
        return "linears"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "norms" if "norm" in name or (weight is not None and weight.dim() == 1) else "other"


def text_only_note(model: nn.Module, sites: Collection[str]) -> str | None:
    """A line about the encoders, which get no input because all rows are text, or None."""
    anatomy = Anatomy.of(model)
    kinds = list(dict.fromkeys(anatomy.encoders.values()))
    if not kinds:
        return None
    idle = sum(map(beneath(anatomy.encoders_and_connectors), sites))
    where = " and ".join(f"{kind} encoder" for kind in kinds)
    why = f"no row has {' or '.join(ENCODER_INPUTS[kind] for kind in kinds)}"
    if idle and idle == len(sites):
        raise LorafoldError(
            f"targets: all {idle} modules are in or next to the {where}, and {why}, so none of them"
            " would get a gradient; use targets in the language model, such as all-linear"
        )
    line = f"training on text only: {why}, so the {where} gets no input"
    if idle:
        line += f", and {idle} of the {len(sites)} adapted modules get no gradient"
    return line
