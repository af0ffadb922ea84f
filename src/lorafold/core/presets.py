"""Presets: named choices of modules in any transformer, found by its structure.

    all-linear      every linear of the blocks and the matrices of their experts, so no head, no
                    embedding and no router
    attention, mlp  the linears of the blocks that are inside an attention, and the others
    sublayers       the attention and the MLP of each block, as whole modules
    mlp-sublayers   the MLPs only
    biases          every module that has a bias; all-linear where the blocks have no bias
    parameters      every module that has parameters of its own, tied ones once
    decoder         the module between token ids and head, and the causal self-attentions inside it
    head            the linears outside the decoder: a classifier's head, or the output embedding

Each preset is a function from a model, and a test for linear modules, to module paths. It returns
an empty list if the model has no such modules.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lorafold.core.anatomy import (
    bare_modules,
    blocks,
    causal_attentions,
    decoder_of,
    of_attention,
    routers,
)

IsLinear = Callable[[nn.Module], bool]


def all_linear(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The linear modules inside the blocks, the matrices of experts among them, but not what routes
    to experts; all linear modules if the model has no blocks.
    """
    inside, left_out = tuple(f"{path}." for path in blocks(model)), routers(model)
    linears = [p for p, m in bare_modules(model) if is_linear(m) and p not in left_out]
    return [p for p in linears if f"{p}.".startswith(inside)] if inside else linears


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
    for block in blocks(model):
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
    """Every module that has a bias; all-linear if no module inside the blocks has one."""
    inside = tuple(f"{path}." for path in blocks(model))
    biased = [path for path, m in bare_modules(model) if m._parameters.get("bias") is not None]
    return (
        biased if any(f"{p}.".startswith(inside) for p in biased) else all_linear(model, is_linear)
    )


def parameters(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """Every module with parameters of its own; tied parameters count for the first module only."""
    seen: set[int] = set()
    found = []
    for path, module in bare_modules(model):
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
    """The linear modules outside the decoder."""
    path, _ = decoder_of(model)
    return (
        [p for p, m in bare_modules(model) if is_linear(m) and not f"{p}.".startswith(f"{path}.")]
        if path
        else []
    )


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
}
