"""Which of transformers' auto classes opens a configuration as a model that continues text.

    AutoModelForCausalLM        if transformers has a causal class for it
    AutoModelForMultimodalLM    for others that take images or sounds beside text (LLaVA, SmolVLM,
                                Qwen2.5-VL, Qwen2-Audio)

A model that can't run on text alone is refused before its weights are read. A language model can be
loaded alone from the files of a multimodal one; adapter files then have the module paths of the
class that config.json names, as other programs expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafold.core.anatomy import Anatomy
from lorafold.errors import LorafoldError
from lorafold.models.sources import known

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CAUSAL = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Whole:
    """The model that a language model is a part of, on the meta device, and the paths there of the
    parts that both have, by their paths in the language model.
    """

    model: nn.Module
    paths: Mapping[str, str]

    def outward(self, path: str) -> str:
        """The path in the whole model of what the language model has at a path."""
        return moved(path, self.paths.items())

    def inward(self, path: str) -> str:
        """The reverse; a path that the whole model does not have is left as it is."""
        return moved(path, ((b, a) for a, b in self.paths.items()))


def moved(path: str, roots: Iterable[tuple[str, str]]) -> str:
    """The path with its root, if it is the first of a pair, replaced by the second."""
    for a, b in roots:
        if path == a or path.startswith(f"{a}."):
            return b + path[len(a) :]
    return path


def whole_of(model: nn.Module) -> Whole | None:
    """The whole that a language model was loaded out of; None for any other model."""
    import transformers as tf

    found, own = known(model), getattr(model, "config", None)
    name = found.path if found else getattr(own, "_name_or_path", "")
    trusted = found is not None and found.trust_remote_code  # left open, transformers asks on stdin
    if not name:
        return None
    try:  # the configuration in the files that it was read from, where they are at hand
        config: PreTrainedConfig = tf.AutoConfig.from_pretrained(
            name, local_files_only=True, trust_remote_code=trusted
        )
    except (OSError, ValueError):
        return None
    if config.get_text_config() is config or isinstance(own, type(config)):
        return None
    cls = getattr(tf, next(iter(config.architectures or ()), ""), None)
    if cls is None or isinstance(model, cls) or _task(cls) == _task(type(model)):
        return None
    with torch.device("meta"):
        whole = cls(config)
    path = Anatomy.of(model).decoder
    body = model.get_submodule(path)
    inner = [p for p, m in Anatomy.of(whole).modules if p and isinstance(body, type(m))]
    ends = Anatomy.of(model).head, Anatomy.of(whole).head
    own_ends = {ends[0]: ends[1]} if ends[0] and ends[1] else {}
    return Whole(whole, {path: inner[0], **own_ends}) if path and inner else None


def _task(cls: type) -> str:
    """What a model of a class is for, from its name: "ForCausalLM", "ForSequenceClassification"."""
    return cls.__name__[cls.__name__.rfind("For") :]


def auto_class(config: PreTrainedConfig, what: str) -> Any:
    """The auto class of a language model with this configuration."""
    auto = opened_by(config)
    cls = auto._model_mapping.get(type(config), None)
    if auto.__name__ != CAUSAL and cls and (needed := _beside_text(config, cls)):
        raise LorafoldError(
            f"{what}: a {config.model_type} model can't run on text alone ({needed}), and rows have"
            " only text; expected a causal language model, or one with towers for images or sounds"
            " beside a language model that runs without them"
        )
    return auto


def opened_by(config: PreTrainedConfig, cls: type | None = None) -> Any:
    """The auto class that has a model for this configuration, whatever that model needs, first the
    one that makes it of a class; the causal one, whose error lists what there is, if none has.
    """
    import transformers as tf

    kinds = tf.AutoModelForCausalLM, tf.AutoModelForMultimodalLM
    coded = getattr(config, "auto_map", None) or {}
    exact = [a for a in kinds if cls and a._model_mapping.get(type(config), None) is cls]
    found = [a for a in kinds if a.__name__ in coded or type(config) in a._model_mapping]
    return [*exact, *found, kinds[0]][0]


def opened_by_name(model: Any) -> str:
    """The name of the auto class that opens a model again, for its model card: whole, where the
    model is a part for text.
    """
    whole = whole_of(model)
    shown = model if whole is None else whole.model
    config = getattr(shown, "config", None)
    return CAUSAL if config is None else str(opened_by(config, type(shown)).__name__)


def _beside_text(config: PreTrainedConfig, cls: Any) -> str:
    """What the model needs that text alone does not give; empty if nothing."""
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    takes = signature(cls.forward).parameters
    if "input_ids" not in takes:
        return "its forward takes no input_ids"
    given = {"self", "input_ids"}
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    needed = [
        n for n, p in takes.items() if n not in given and p.kind in named and p.default is p.empty
    ]
    return f"its forward needs {', '.join(needed)}" if needed else ""
