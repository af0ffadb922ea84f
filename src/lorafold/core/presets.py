"""Presets: named choices of modules in any transformer, found by its structure.

    all-linear      every linear of the blocks and the matrices of their experts, so no head, no
                    embedding, no router and no indexer
    attention, mlp  the linears of the blocks that are inside an attention, and the others
    sublayers       the attention and the MLP of each block, as whole modules
    mlp-sublayers   the MLPs only
    biases          every module that has a bias; all-linear where the blocks have no bias
    parameters      every module that has parameters of its own, tied ones once
    decoder         the module between token ids and head, and the causal self-attentions inside it
    head            the linears over the base model: a classifier's head, or the output embedding
    vision-linear   every linear of the blocks of the towers that see images
    audio-linear    every linear of the blocks of the towers that hear

In a model that has towers, all but the last two take the language model and its head alone: neither
the towers nor the connectors between them (`lorafold.core.towers`).

Each preset is a function from a model, and a test for linear modules, to module paths. It returns
an empty list if the model has no such modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import nn

from lorafold.core.anatomy import (
    bare_modules,
    blocks,
    causal_attentions,
    decoder_of,
    indexers,
    of_attention,
    routers,
)
from lorafold.core.matrices import Matrices
from lorafold.core.towers import aside, heads, towers

IsLinear = Callable[[nn.Module], bool]


def beneath(roots: Iterable[str]) -> Callable[[str], bool]:
    """The test whether a module path is one of these or lies beneath one."""
    prefixes = tuple(f"{root}." for root in roots)
    return lambda path: f"{path}.".startswith(prefixes)


def own_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The path and module of each of the model's modules, without towers and connectors."""
    out = beneath(aside(model))
    return [(path, m) for path, m in bare_modules(model) if not out(path)]


def own_blocks(model: nn.Module) -> list[str]:
    """The paths of the blocks of the language model; all blocks of a model without towers."""
    out = beneath(aside(model))
    return [path for path in blocks(model) if not out(path)]


def block_linears(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The linear modules inside the blocks, the matrices of experts among them, but not what routes
    to experts; all linear modules if the model has no blocks.
    """
    inside, left_out = own_blocks(model), routers(model)
    linears = [p for p, m in own_modules(model) if is_linear(m) and p not in left_out]
    return list(filter(beneath(inside), linears)) if inside else linears


def all_linear(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The linear modules of the blocks that can learn: an indexer gets no gradient."""
    idle = beneath(indexers(model))
    return [path for path in block_linears(model, is_linear) if not idle(path)]


def tower_linear(kind: str, model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The linear modules inside the blocks of the towers, or all those of a tower without blocks.

    Args:
        kind: what the towers take in: vision or audio.
    """
    return [
        f"{path}.{inner}"
        for path, takes in towers(model).items()
        if takes == kind
        for inner in all_linear(model.get_submodule(path), is_linear)
    ]


def attention(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The linear modules of the blocks that are inside an attention."""
    return [path for path in all_linear(model, is_linear) if of_attention(path)]


def mlp(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The linear modules of the blocks that are not inside an attention."""
    return [path for path in all_linear(model, is_linear) if not of_attention(path)]


def sublayers(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The children of each block that have children themselves: its attention and its MLP.

    The list is empty if either is not one module in some block.
    """
    body, _ = decoder_of(model)
    found: list[str] = []
    for block in own_blocks(model):
        if not f"{block}.".startswith(f"{body}." if body else ""):
            continue
        parts = [
            f"{block}.{name}"
            for name, m in model.get_submodule(block).named_children()
            if any(True for _ in m.children())
        ]
        if {of_attention(part.rsplit(".", 1)[-1]) for part in parts} != {True, False}:
            return []
        found += parts
    return found


def mlp_sublayers(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The sublayers that are no attention."""
    return [
        path for path in sublayers(model, is_linear) if not of_attention(path.rsplit(".", 1)[-1])
    ]


def biases(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """Every module that has a bias, but no router; the linears of all-linear if no module inside
    the blocks has one. Experts are left out.
    """
    inside, left_out = beneath(own_blocks(model)), routers(model)
    biased = [p for p, m in own_modules(model) if m._parameters.get("bias") is not None]
    if any(map(inside, biased)):
        return [path for path in biased if path not in left_out]
    experts = {path for path, m in own_modules(model) if isinstance(m, Matrices)}
    return [path for path in all_linear(model, is_linear) if path not in experts]


def parameters(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """Every module with parameters of its own; tied parameters count for the first module only."""
    seen: set[int] = set()
    found = []
    for path, module in own_modules(model):
        own = {id(p) for p in module._parameters.values() if p is not None}
        if own - seen:
            found.append(path)
        seen |= own
    return found


def decoder(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The decoder and the causal self-attentions inside it; empty if there are none inside it."""
    path, body = decoder_of(model)
    inside = [f"{path}.{p}" if path else p for p in causal_attentions(body)]
    return [path, *inside] if inside else []


def head(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The linear modules over the base model."""
    over = beneath(heads(model))
    return [path for path, m in bare_modules(model) if is_linear(m) and over(path)]


PRESETS: dict[str, Callable[[nn.Module, IsLinear], list[str]]] = {
    "all-linear": all_linear,
    "attention": attention,
    "mlp": mlp,
    "sublayers": sublayers,
    "mlp-sublayers": mlp_sublayers,
    "biases": biases,
    "parameters": parameters,
    "decoder": decoder,
    "head": head,
    "vision-linear": partial(tower_linear, "vision"),
    "audio-linear": partial(tower_linear, "audio"),
}
