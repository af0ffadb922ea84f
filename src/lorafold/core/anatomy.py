"""A model's anatomy: which of its modules are what, whatever its architecture.

    anatomy = Anatomy.of(model)
    anatomy.blocks          ["model.layers.0", "model.layers.1"]
    anatomy.decoder         "model"
    anatomy.experts         {"model.layers.0.mlp.experts": {8}}
    anatomy.encoders        {"model.vision_tower": "vision"}

It follows from the structure and from the model's embeddings and configuration, never from its
name. It is made once for a model, and again if modules were replaced, added or removed; deltas are
no part of it. The language model of a multimodal model is the outermost part on the way to the
input embedding whose configuration is one of text alone. An encoder-decoder is one model, and so
are two encoders side by side (CLIP).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from lorafold.core.attach import Deltas
from lorafold.core.matrices import Matrices, expert_counts, matrices_of

MODALITIES = {"image": "vision", "video": "vision", "audio": "audio"}

# weak references alone, so that a model and what was replaced in it are freed as without this
Tree = list[tuple[str, ref[nn.Module]]]
_made: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


class Anatomy:
    """What a model consists of: paths of its modules.

    blocks: the elements of the outermost ModuleLists.
    experts: the modules that hold matrices of experts, in whatever form, and how many experts each
        says that there are.
    indexers: the modules that choose the positions which sparse attention reads: transformers calls
        their classes indexers. A choice has no gradient.
    attentions: the causal self-attentions, with a true `is_causal` and a `layer_idx`.
    embedding: the input embedding; None if the model does not say which it is, or if it is no
        module, as the latents that Perceiver names.
    head: the output embedding; None if the model has none.
    """

    def __init__(self, model: nn.Module, tree: Tree) -> None:
        self._model: Callable[[], Any] = ref(model)
        self._tree = tree
        self.experts: dict[str, set[int]] = {}
        self.blocks, self.indexers, self.attentions = list[str](), list[str](), list[str]()
        lists: tuple[str, ...] = ()
        for path, kept in tree:
            module: Any = kept()
            if isinstance(module, nn.ModuleList) and not path.startswith(lists):
                lists += (f"{path}.",)
                self.blocks += [f"{path}.{name}" for name, _ in module.named_children()]
            if counts := expert_counts(module):
                self.experts[path] = counts
            if type(module).__name__.endswith("Indexer"):
                self.indexers.append(path)
            if path and getattr(module, "is_causal", False) and hasattr(module, "layer_idx"):
                self.attentions.append(path)
        own = model
        try:
            embedding = getattr(own, "get_input_embeddings", lambda: None)()
        except NotImplementedError:  # what transformers raises for two encoders side by side
            embedding = None
        head = getattr(own, "get_output_embeddings", lambda: None)()
        paths = {id(kept()): path for path, kept in tree}
        self.embedding, self.head = paths.get(id(embedding)), paths.get(id(head))

    @staticmethod
    def of(model: nn.Module) -> Anatomy:
        """The anatomy of a model as it is now."""
        seen = set()
        tree = []
        left = [("", model)]
        while left:
            path, module = left.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            tree.append((path, ref(module)))
            for name, child in reversed(module._modules.items()):
                if child is not None and not isinstance(child, Deltas | Matrices):
                    left.append((joined(path, name), child))
        known = _made.get(model)
        if known is None or known._tree != tree:
            known = _made[model] = Anatomy(model, tree)
        return known

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """The path and module of each of the model's own modules, without those of deltas. A module
        that has several paths comes once, under the first. The matrices of experts come as
        `Matrices`, under the paths of their parameters.
        """
        modules: dict[str, nn.Module] = {}
        for path, kept in self._tree:
            module: Any = kept()
            if path in self.experts:
                around = modules.get(path.rpartition(".")[0]) if path else None
                within = matrices_of(module, around)
                modules |= {path: module, **{joined(path, name): m for name, m in within.items()}}
            else:
                modules[path] = module
        return list(modules.items())

    @cached_property
    def routers(self) -> frozenset[str]:
        """The matrices that choose or weigh experts: those beside a module of E experts that have E
        outputs (a router), or one (the gate of an expert that all tokens meet).
        """
        # by each module around experts its children that have some inside, and how many
        around: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for path, counts in self.experts.items():
            for outer, child in _steps(path):
                around[outer][child] |= counts
        routers = set()
        for path, module in self.modules if around else ():
            weight = module._parameters.get("weight")
            if weight is None or weight.dim() != 2:
                continue
            for outer, child in _steps(path):
                experts = around.get(outer, {})
                if experts and child not in experts and len(weight) in {1}.union(*experts.values()):
                    routers.add(path)
        return frozenset(routers)

    @cached_property
    def vocabulary_ends(self) -> list[str]:
        """The input embedding and the output embedding, without those that have no weight of their
        own (the patches of a vision model).
        """
        ends = [path for path in (self.embedding, self.head) if path is not None]
        modules = map(self._model().get_submodule, ends)
        weights = [module._parameters.get("weight") for module in modules]
        return [path for path, weight in zip(ends, weights, strict=True) if weight is not None]

    @cached_property
    def decoder(self) -> str:
        """The decoder, which lies between the token ids and the head; "", the model itself, where
        the model has no head or no such module.
        """
        model = self._model()
        part = model.get_decoder() if hasattr(model, "get_decoder") else model
        if part is model and self.embedding and self.head is not None:
            around = self.embedding.partition(".")[0]
            return around if around != self.head else ""
        return next((path for path, module in self._tree if module() is part), "")

    @cached_property
    def heads(self) -> list[str]:
        """The parts over the base model, such as a classifier's head; where the model does not say
        what its base is, the output embedding.
        """
        base = getattr(self._model(), "base_model", self._model())
        if base is not self._model():
            return [name for name, child in self._model().named_children() if child is not base]
        return [self.head] if self.head is not None else []

    @cached_property
    def language(self) -> str:
        """The language model inside a multimodal model; "" for every other model."""
        model = self._model()
        if not self.embedding or _of_text(model):
            return ""
        for _, path in _steps(self.embedding):
            part = model.get_submodule(path)
            if _of_text(part):
                config = part.config
                decodes = getattr(config, "is_decoder", False) or not config.is_encoder_decoder
                half = model.config.is_encoder_decoder and decodes  # of an encoder-decoder
                # its layers have places in a cache, and look back alone or have an output embedding
                # over them: an encoder beside another has neither
                numbered = [m for m in part.modules() if hasattr(m, "layer_idx")]
                causal = any(getattr(m, "is_causal", True) for m in numbered)
                generates = causal or (numbered and model.get_output_embeddings() is not None)
                return path if generates and not half else ""
        return ""

    @cached_property
    def encoders(self) -> dict[str, str]:
        """The encoders beside the language model, and what each takes in: "vision" or "audio"."""
        config: Any = getattr(self._model(), "config", None)
        # an encoder may lie inside a language model whose own configuration has a part for it
        within = _of_text(self._model()) and getattr(config, "sub_configs", None)
        if not self.language and (not within or config.is_encoder_decoder):
            return {}
        known, encoders = _takes(self._model()), dict[str, str]()
        for path, module in self.modules:
            over = f"{self.embedding or ''}.".startswith(f"{path}.") or not path
            inside = beneath(filter(None, (*encoders, self.language)))(path)
            if not over and not inside and (kinds := [k for k in _takes(module) if k in known]):
                encoders[path] = kinds[0]
        return encoders

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """The encoders, and the connectors between them and the language model: the parts that are
        neither in it nor over it, as heads are.
        """
        if not self.language:
            return tuple(self.encoders)
        around = [outer for outer, _ in _steps(self.language)]
        left_out = {*around, self.language, *self.heads}
        paths = [
            joined(outer, name)
            for outer in around
            for name, _ in self._model().get_submodule(outer).named_children()
        ]
        return tuple(path for path in paths if path not in left_out)

    @cached_property
    def language_blocks(self) -> list[str]:
        """The blocks of the language model; all blocks of a model without encoders."""
        out = beneath(self.beside)
        return [path for path in self.blocks if not out(path)]

    @property
    def language_modules(self) -> list[tuple[str, nn.Module]]:
        """The path and module of each of the model's modules, without encoders and connectors."""
        out = beneath(self.beside)
        return [(path, module) for path, module in self.modules if not out(path)]


def joined(path: str, name: str) -> str:
    """The dotted name of a child or a tensor of the module at `path`."""
    return f"{path}.{name}" if path else name


def last_part(path: str) -> str:
    """The last part of a dotted path."""
    return path.rpartition(".")[2]


def ends_in(path: str, name: str) -> bool:
    """Whether the path is the name, or ends in it in whole parts."""
    return f".{path}".endswith(f".{name}")


def beneath(roots: Iterable[str]) -> Callable[[str], bool]:
    """The test whether a module path is one of these or lies beneath one."""
    prefixes = tuple(f"{root}." if root else "" for root in roots)
    return lambda path: f"{path}.".startswith(prefixes)


def of_attention(path: str) -> bool:
    """Whether the module path names an attention: it has `attn` or `attention` in any case."""
    return re.search(r"attn|attention", path, re.IGNORECASE) is not None


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


def _steps(path: str) -> list[tuple[str, str]]:
    """The way from the model to a path: each module on it, and the child that comes next."""
    parts = path.split(".") if path else []
    return [(".".join(parts[:n]), ".".join(parts[: n + 1])) for n in range(len(parts))]


def _of_text(module: nn.Module) -> bool:
    """Whether the module's configuration is that of a text model itself."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    return not config.sub_configs or config.get_text_config(decoder=True) is config


def _takes(module: nn.Module) -> list[str]:
    """What the module takes in beside text: "vision", "audio"; none for a connector, or text."""
    named = getattr(module, "input_modalities", ())
    names = [named] if isinstance(named, str) else named
    return list(dict.fromkeys(MODALITIES[name] for name in names if name in MODALITIES))
