"""Finds the parts of a model (blocks, decoder, experts, encoders) from its modules, embeddings and
configuration, never from the model's name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import nn

from lorafold.core.attach import Deltas
from lorafold.core.expert_matrices import Matrices, expert_counts, matrices_of, numbers_of_experts

K = TypeVar("K")
V = TypeVar("V")
MODALITIES = {"image": "vision", "video": "vision", "audio": "audio"}

# weak references, so that the cache does not keep models or replaced modules alive
_anatomies: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


class Anatomy:
    """The module paths of a model, by role.

    blocks: the elements of the outermost ModuleLists.
    experts: the modules that hold expert weights, with their numbers of experts.
    indexers: the modules that select positions for sparse attention, and get no gradients.
    attentions: the causal self-attentions.
    embedding, head: the input and the output embedding, or None if the model has none.
    """

    def __init__(self, model: nn.Module, tree: list[tuple[str, ref[nn.Module]]]) -> None:
        self._model: Callable[[], Any] = ref(model)
        self._tree = tree
        self.experts: dict[str, set[int]] = {}
        self.blocks, self.indexers, self.attentions = list[str](), list[str](), list[str]()
        lists: tuple[str, ...] = ()
        for path, module_ref in tree:
            module: Any = module_ref()
            if isinstance(module, nn.ModuleList) and not path.startswith(lists):
                lists += (f"{path}.",)
                self.blocks += [f"{path}.{name}" for name, _ in module.named_children()]
            if counts := expert_counts(module):
                self.experts[path] = counts
            if type(module).__name__.endswith("Indexer"):
                self.indexers.append(path)
            if path and getattr(module, "is_causal", False) and hasattr(module, "layer_idx"):
                self.attentions.append(path)
        try:
            embedding = getattr(model, "get_input_embeddings", lambda: None)()
        except NotImplementedError:  # transformers raises it for two encoders side by side
            embedding = None
        head = getattr(model, "get_output_embeddings", lambda: None)()
        paths = {id(module_ref()): path for path, module_ref in tree}
        self.embedding, self.head = paths.get(id(embedding)), paths.get(id(head))

    @staticmethod
    def of(model: nn.Module) -> Anatomy:
        """Returns the model's anatomy, which is cached until modules change."""
        visited, tree = set(), []
        pending = [("", model)]
        while pending:
            path, module = pending.pop()
            if id(module) in visited:
                continue
            visited.add(id(module))
            tree.append((path, ref(module)))
            for name, child in reversed(module._modules.items()):
                if child is not None and not isinstance(child, Deltas | Matrices):
                    pending.append((joined(path, name), child))
        known = _anatomies.get(model)
        if known is None or known._tree != tree:
            known = _anatomies[model] = Anatomy(model, tree)
        return known

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """Each module outside deltas once, under its first path; expert weights appear as
        `Matrices`.
        """
        modules: dict[str, nn.Module] = {}
        for path, module_ref in self._tree:
            module: Any = module_ref()
            if path in self.experts:
                parent = modules.get(path.rpartition(".")[0]) if path else None
                matrices = matrices_of(module, parent)
                modules |= {path: module, **{joined(path, name): m for name, m in matrices.items()}}
            else:
                modules[path] = module
        return list(modules.items())

    @property
    def paths(self) -> list[str]:
        """The paths of `modules`, without the model's own."""
        return [path for path, _ in self.modules if path]

    @cached_property
    def routers(self) -> frozenset[str]:
        """The weight matrices next to E experts, if they have E outputs, or as many as their parent
        declares (a router), or one (the gate of a shared expert).
        """
        # module that contains experts -> its children with experts inside -> numbers of experts
        inside: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for path, counts in self.experts.items():
            for outer, child in _ancestors(path):
                inside[outer][child] |= counts
        routers = set()
        for path, module in self.modules if inside else ():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() != 2:
                continue
            sizes = {1} | numbers_of_experts(self._model().get_submodule(path.rpartition(".")[0]))
            for outer, child in _ancestors(path):
                near = inside.get(outer, {})
                if near and child not in near and len(weight) in sizes.union(*near.values()):
                    routers.add(path)
        return frozenset(routers)

    @cached_property
    def vocabulary_ends(self) -> list[str]:
        """The input and the output embedding, if they have a `weight` parameter."""
        ends = [path for path in (self.embedding, self.head) if path is not None]
        modules = map(self._model().get_submodule, ends)
        weights = [module._parameters.get("weight") for module in modules]
        return [path for path, weight in zip(ends, weights, strict=True) if weight is not None]

    @cached_property
    def decoder(self) -> str:
        """The module between token ids and LM head, or "", the model itself, if there is none."""
        model = self._model()
        part = model.get_decoder() if hasattr(model, "get_decoder") else model
        if part is model and self.embedding and self.head is not None:
            outer = self.embedding.partition(".")[0]
            return outer if outer != self.head else ""
        return next((path for path, module in self._tree if module() is part), "")

    @cached_property
    def heads(self) -> list[str]:
        """The modules on top of the base model, or the output embedding if the model is its own
        base model.
        """
        base = getattr(self._model(), "base_model", self._model())
        if base is not self._model():
            return [name for name, child in self._model().named_children() if child is not base]
        return [self.head] if self.head is not None else []

    @cached_property
    def language(self) -> str:
        """The language model inside a multimodal model; "" for any other model."""
        model = self._model()
        if not self.embedding or _is_text_model(model):
            return ""
        for _, path in _ancestors(self.embedding):
            part = model.get_submodule(path)
            if _is_text_model(part):
                config = part.config
                decodes = getattr(config, "is_decoder", False) or not config.is_encoder_decoder
                half = model.config.is_encoder_decoder and decodes  # an encoder-decoder's
                # a language model's layers have cache indices, and are causal or have an output
                # embedding on top; neither holds for one of two encoders side by side
                numbered = [m for m in part.modules() if hasattr(m, "layer_idx")]
                causal = any(getattr(m, "is_causal", True) for m in numbered)
                generates = causal or (numbered and model.get_output_embeddings() is not None)
                return path if generates and not half else ""
        return ""

    @cached_property
    def encoders(self) -> dict[str, str]:
        """The encoders next to the language model, with their modality: "vision" or "audio"."""
        config: Any = getattr(self._model(), "config", None)
        # an encoder may be part of a language model, whose config then has a sub-config for it
        may_contain = _is_text_model(self._model()) and getattr(config, "sub_configs", None)
        if not self.language and (not may_contain or config.is_encoder_decoder):
            return {}
        known, encoders = _modalities(self._model()), dict[str, str]()
        for path, module in self.modules:
            contains_text = f"{self.embedding or ''}.".startswith(f"{path}.") or not path
            inside = beneath(filter(None, (*encoders, self.language)))(path)
            kinds = [kind for kind in _modalities(module) if kind in known]
            if kinds and not contains_text and not inside:
                encoders[path] = kinds[0]
        return encoders

    @cached_property
    def encoders_and_connectors(self) -> tuple[str, ...]:
        """The encoders, and the connectors between them and the language model, without heads."""
        if not self.language:
            return tuple(self.encoders)
        ancestors = [outer for outer, _ in _ancestors(self.language)]
        left_out = {*ancestors, self.language, *self.heads}
        paths = [
            joined(outer, name)
            for outer in ancestors
            for name, _ in self._model().get_submodule(outer).named_children()
        ]
        return tuple(path for path in paths if path not in left_out)

    @cached_property
    def language_blocks(self) -> list[str]:
        is_outside = beneath(self.encoders_and_connectors)
        return [path for path in self.blocks if not is_outside(path)]

    @property
    def language_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules outside encoders and connectors, with their paths."""
        is_outside = beneath(self.encoders_and_connectors)
        return [(path, module) for path, module in self.modules if not is_outside(path)]


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def last_part(path: str) -> str:
    return path.rpartition(".")[2]


def ends_in(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")


def beneath(roots: Iterable[str]) -> Callable[[str], bool]:
    """Returns a function that tests whether a module path is one of the roots or lies below one."""
    prefixes = tuple(f"{root}." if root else "" for root in roots)
    return lambda path: f"{path}.".startswith(prefixes)


def of_attention(path: str) -> bool:
    return re.search(r"attn|attention", path, re.IGNORECASE) is not None


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Returns the values of each key, in the order of the pairs."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def tied_modules(model: nn.Module, module: nn.Module) -> list[str]:
    weight = module._parameters.get("weight")
    return [
        path
        for path, m in model.named_modules()
        if m is not module and weight is not None and m._parameters.get("weight") is weight
    ]


def tied_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Maps each name of a shared parameter to its other names."""
    parameters = model.named_parameters(remove_duplicate=False)
    names = grouped((id(parameter), name) for name, parameter in parameters)
    return {
        name: tuple(n for n in group if n != name)
        for group in names.values()
        if len(group) > 1
        for name in group
    }


def _ancestors(path: str) -> list[tuple[str, str]]:
    """Returns the modules on the way to `path`, each with its next child."""
    parts = path.split(".") if path else []
    return [(".".join(parts[:n]), ".".join(parts[: n + 1])) for n in range(len(parts))]


def _is_text_model(module: nn.Module) -> bool:
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    return not config.sub_configs or config.get_text_config(decoder=True) is config


def _modalities(module: nn.Module) -> list[str]:
    inputs = getattr(module, "input_modalities", ())
    names = [inputs] if isinstance(inputs, str) else inputs
    return list(dict.fromkeys(MODALITIES[name] for name in names if name in MODALITIES))
