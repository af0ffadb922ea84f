"""Find the parts of a model by its structure, whatever its architecture: its own modules, its
blocks, its input and output embeddings, its decoder and the attentions inside it.

Module paths are dotted, as `named_modules` gives them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

from lorafold.core.attach import Deltas
from lorafold.core.matrices import expert_counts, matrices_of


def bare_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and module of each of the model's own modules, without those of the deltas
    attached to it. A module that has several paths comes once, under the first. The matrices of
    experts come as `Matrices`, under the paths of their parameters.
    """
    seen: dict[int, nn.Module] = {}
    left: list[tuple[str, nn.Module, nn.Module | None]] = [(path, model, None)]
    while left:
        path, module, around = left.pop()
        if id(module) in seen or isinstance(module, Deltas):
            continue
        seen[id(module)] = module
        yield path, module
        own = {**module._modules, **matrices_of(module, around)}
        left += [
            (f"{path}.{name}" if path else name, child, module)
            for name, child in reversed(own.items())
            if child is not None
        ]


def blocks(model: nn.Module) -> list[str]:
    """The paths of the blocks: the elements of the outermost ModuleLists."""
    lists: list[str] = []
    for path, module in bare_modules(model):
        if isinstance(module, nn.ModuleList) and not any(
            path.startswith(f"{outer}.") for outer in lists
        ):
            lists.append(path)
    return [
        f"{path}.{name}" for path in lists for name, _ in model.get_submodule(path).named_children()
    ]


def routers(model: nn.Module) -> set[str]:
    """The paths of the matrices that choose or weigh experts: those beside a module of E experts
    that have E outputs (a router), or one (the gate of an expert that all tokens meet).
    """
    found: set[str] = set()
    for path, module in bare_modules(model):
        counts = {
            child: set().union(*(expert_counts(m) for m in child.modules()))
            for child in module._modules.values()
            if child is not None
        }
        experts = [child for child, of in counts.items() if of]
        outputs = {1}.union(*counts.values())
        for name, beside in module._modules.items() if experts else ():
            if beside is None or beside in experts:
                continue
            for inner, m in bare_modules(beside, f"{path}.{name}" if path else name):
                weight = m._parameters.get("weight")
                if weight is not None and weight.dim() == 2 and len(weight) in outputs:
                    found.add(inner)
    return found


def indexers(model: nn.Module) -> list[str]:
    """The paths of the modules that choose the positions which sparse attention reads: transformers
    calls their classes indexers. A choice has no gradient.
    """
    return [path for path, m in bare_modules(model) if type(m).__name__.endswith("Indexer")]


def of_attention(path: str) -> bool:
    """Whether the module path names an attention: it has `attn` or `attention` in any case."""
    return re.search(r"attn|attention", path, re.IGNORECASE) is not None


def input_embedding(model: Any) -> nn.Module | None:
    """The model's input embedding; None if the model does not say which it is, or if it is no
    module, as the latents that Perceiver names.
    """
    try:
        found: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # what transformers raises for two encoders side by side
        return None
    return found if isinstance(found, nn.Module) else None


def vocabulary_ends(model: Any) -> list[str]:
    """The paths of the input embedding and of the output embedding, where the model's
    `get_input_embeddings` and `get_output_embeddings` name them.

    A module without a weight of its own (the patches of a vision model) is left out.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    ends = [input_embedding(model), output]
    paths = {id(m): path for path, m in bare_modules(model)}
    return [
        paths[id(end)]
        for end in ends
        if end is not None and end._parameters.get("weight") is not None
    ]


def decoder_of(model: Any) -> tuple[str, nn.Module]:
    """The path and module of the decoder, which lies between the token ids and the head.

    Where the model has no head or no such module, the decoder is the model itself, at path "".
    """
    part = model.get_decoder() if hasattr(model, "get_decoder") else model
    if part is model and (embedding := input_embedding(model)) is not None:
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
    """The paths of a decoder's self-attentions: the modules with a true `is_causal` and a
    `layer_idx`.
    """
    return [
        path
        for path, m in bare_modules(body)
        if path and getattr(m, "is_causal", False) and hasattr(m, "layer_idx")
    ]


def sharers(model: nn.Module, module: nn.Module) -> list[str]:
    """The paths of the other modules that have the same Parameter as their `weight`."""
    weight = module._parameters.get("weight")
    return [
        path
        for path, m in model.named_modules()
        if m is not module and weight is not None and m._parameters.get("weight") is weight
    ]


def tied_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map each name of a parameter that has several names to the other names."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {
        name: tuple(n for n in group if n != name)
        for group in names.values()
        if len(group) > 1
        for name in group
    }
