"""The auto class for a configuration, and language models inside multimodal models.

    AutoModelForCausalLM        if transformers has a causal class for the configuration
    AutoModelForMultimodalLM    for other models that accept text with images or audio (LLaVA,
                                SmolVLM, Qwen2.5-VL, Qwen2-Audio)

A language model can be loaded alone from a multimodal checkpoint. Its adapter files then use the
module paths of the class in config.json, as other programs expect.
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
from lorafold.models.sources import source_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CAUSAL = "AutoModelForCausalLM"


@dataclass(frozen=True)
class WholeModel:
    """The multimodal model (on the meta device) that contains a language model. `paths` maps module
    paths of the language model to module paths of the multimodal model.
    """

    model: nn.Module
    paths: Mapping[str, str]

    def path_in_whole(self, path: str) -> str:
        return _map_path(path, self.paths.items())

    def path_in_part(self, path: str) -> str:
        """Maps a path in the whole model to the language model; other paths are returned unchanged.
        """
        return _map_path(path, ((b, a) for a, b in self.paths.items()))


def _map_path(path: str, roots: Iterable[tuple[str, str]]) -> str:
    for a, b in roots:
        if f"{path}.".startswith(f"{a}."):
            return b + path[len(a) :]
    return path


def whole_model_of(model: nn.Module) -> WholeModel | None:
    """The multimodal model that a language model was loaded from, or None."""
    import transformers as tf

    source, own = source_of(model), getattr(model, "config", None)
    name = source.path if source else getattr(own, "_name_or_path", "")
    trusted = source is not None and source.trust_remote_code  # transformers prompts if unset
    if not name:
        return None
    try:  # the configuration of the original files, if they are on this machine
        config = tf.AutoConfig.from_pretrained(
            name, local_files_only=True, trust_remote_code=trusted
        )
    except (OSError, ValueError):
        return None
    if config.get_text_config() is config or isinstance(own, type(config)):
        return None
    cls = getattr(tf, next(iter(config.architectures or ()), ""), None)
    # the tasks, such as ForCausalLM
    task, of_model = (c and c.__name__[c.__name__.rfind("For") :] for c in (cls, type(model)))
    if cls is None or isinstance(model, cls) or task == of_model:
        return None
    with torch.device("meta"):
        whole = cls(config)
    anatomy, around = Anatomy.of(model), Anatomy.of(whole)
    body = model.get_submodule(anatomy.decoder)
    inner = next((p for p, m in around.modules if p and isinstance(body, type(m))), None)
    if not anatomy.decoder or inner is None:
        return None
    heads = {anatomy.head: around.head} if anatomy.head and around.head else {}
    return WholeModel(whole, {anatomy.decoder: inner, **heads})


def text_auto_class(config: PreTrainedConfig, what: str) -> Any:
    """The auto class of a language model; raises if the model can't run on text alone."""
    auto = auto_class_of(config)
    cls = auto._model_mapping.get(type(config), None)
    if auto.__name__ != CAUSAL and cls and (needed := _other_required_inputs(config, cls)):
        raise LorafoldError(
            f"{what}: a {config.model_type} model can't run on text alone ({needed}), but lorafold"
            " passes only text; expected a causal language model, or a multimodal model whose"
            " language model runs without images or audio"
        )
    return auto


def auto_class_of(config: PreTrainedConfig, cls: type | None = None) -> Any:
    """The auto class for a configuration. An auto class that maps the configuration to `cls` is
    preferred, then AutoModelForCausalLM.
    """
    import transformers as tf

    kinds = tf.AutoModelForCausalLM, tf.AutoModelForMultimodalLM
    coded = getattr(config, "auto_map", None) or {}
    exact = [a for a in kinds if cls and a._model_mapping.get(type(config), None) is cls]
    able = [a for a in kinds if a.__name__ in coded or type(config) in a._model_mapping]
    return [*exact, *able, kinds[0]][0]


def auto_class_name(model: Any) -> str:
    """The name of the auto class that loads the model again, for its model card."""
    whole = whole_model_of(model)
    shown = model if whole is None else whole.model
    config = getattr(shown, "config", None)
    return CAUSAL if config is None else str(auto_class_of(config, type(shown)).__name__)


def _other_required_inputs(config: PreTrainedConfig, cls: Any) -> str:
    """The reason why the model can't run on `input_ids` alone; empty if it can."""
    takes = signature(cls.forward).parameters
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if "input_ids" not in takes:
        return "its forward has no argument input_ids"
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    required = {n for n, p in takes.items() if p.kind in named and p.default is p.empty}
    needed = [n for n in takes if n in required - {"self", "input_ids"}]
    return f"its forward requires {', '.join(needed)}" if needed else ""
