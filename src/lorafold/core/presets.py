"""Places that a method can name in any transformer, found by structure and not by architecture.

    all-linear      every linear of the blocks (the repeated layers), so neither head nor embeddings
    attention, mlp  those inside attention, and the others
    sublayers       the attention and the MLP of each block, whole
    mlp-sublayers   the MLPs only
    biases          every module that has a bias; all-linear where the blocks have none
    parameters      every module that holds parameters of its own, tied ones once
    decoder         the module between token ids and head, and the causal self-attentions inside it
    head            what lies over the decoder: the linears of a classifier, or the output embedding

Each is a function from a model to paths; an empty answer means that the model has no such place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lorafold.core.attach import Deltas

IsLinear = Callable[[nn.Module], bool]


def bare_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by path, without those of the deltas laid over it; a shared module
    once.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen or isinstance(module, Deltas):
            return
        seen.add(id(module))
        yield path, module
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, path)


def blocks(model: nn.Module) -> list[str]:
    """The paths of the repeated layers: the elements of the outermost ModuleLists."""
    lists: list[str] = []
    for path, module in bare_modules(model):
        if isinstance(module, nn.ModuleList) and not any(
            path.startswith(f"{outer}.") for outer in lists
        ):
            lists.append(path)
    return [
        f"{path}.{name}" for path in lists for name, _ in model.get_submodule(path).named_children()
    ]


def all_linear(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The linear modules inside the blocks; all of them where the model has no blocks."""
    inside = tuple(f"{path}." for path in blocks(model))
    linears = [path for path, m in bare_modules(model) if is_linear(m)]
    return [p for p in linears if f"{p}.".startswith(inside)] if inside else linears


def of_attention(path: str) -> bool:
    return re.search(r"attn|attention", path) is not None


def attention(model: nn.Module, is_linear: IsLinear) -> list[str]:
    return [path for path in all_linear(model, is_linear) if of_attention(path)]


def mlp(model: nn.Module, is_linear: IsLinear) -> list[str]:
    return [path for path in all_linear(model, is_linear) if not of_attention(path)]


def sublayers(model: nn.Module, is_linear: IsLinear) -> list[str]:
    """The parts of each block that are made of parts themselves; none at all if a block lacks its
    attention or its MLP as one module.
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
    return [
        path for path in sublayers(model, is_linear) if not of_attention(path.rsplit(".", 1)[-1])
    ]


def biases(model: nn.Module, is_linear: IsLinear) -> list[str]:
    inside = tuple(f"{path}." for path in blocks(model))
    biased = [path for path, m in bare_modules(model) if m._parameters.get("bias") is not None]
    return (
        biased if any(f"{p}.".startswith(inside) for p in biased) else all_linear(model, is_linear)
    )


def parameters(model: nn.Module, is_linear: IsLinear) -> list[str]:
    seen: set[int] = set()
    found = []
    for path, module in bare_modules(model):
        own = {id(p) for p in module._parameters.values() if p is not None}
        if own - seen:
            found.append(path)
        seen |= own
    return found


def vocabulary_ends(model: Any) -> list[str]:
    """The paths of the input embedding and of the output embedding, as far as the model has them
    and says so. What has no weight of its own (a vision model's patches) is no vocabulary.
    """
    ends = [
        getattr(model, name)()
        for name in ("get_input_embeddings", "get_output_embeddings")
        if hasattr(model, name)
    ]
    paths = {id(m): path for path, m in bare_modules(model)}
    return [
        paths[id(end)]
        for end in ends
        if end is not None and end._parameters.get("weight") is not None
    ]


def decoder_of(model: Any) -> tuple[str, nn.Module]:
    """The module between the token ids and the head, with its path: the model itself where it has
    no head or no such part.
    """
    part = model.get_decoder() if hasattr(model, "get_decoder") else model
    if part is model and hasattr(model, "get_input_embeddings"):
        embedding = model.get_input_embeddings()
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:
            around = [
                m
                for m in model.children()
                if m is not head and any(n is embedding for n in m.modules())
            ]
            part = around[0] if around else model
    return next((path, m) for path, m in bare_modules(model) if m is part)


def causal_attentions(body: nn.Module) -> list[str]:
    """The self-attentions of a decoder: modules that say they are causal and know the layer they
    belong to.
    """
    return [
        path
        for path, m in bare_modules(body)
        if path and getattr(m, "is_causal", False) and hasattr(m, "layer_idx")
    ]


def decoder(model: nn.Module, is_linear: IsLinear) -> list[str]:
    path, body = decoder_of(model)
    inside = [f"{path}.{p}" if path else p for p in causal_attentions(body)]
    return [path, *inside] if inside else []


def head(model: nn.Module, is_linear: IsLinear) -> list[str]:
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
