"""Which of transformers' auto classes opens a configuration as a model that continues text.

    AutoModelForCausalLM        wherever transformers has a causal class for it
    AutoModelForMultimodalLM    for others that take images or sounds beside text (LLaVA, SmolVLM,
                                Qwen2.5-VL, Qwen2-Audio); of text alone they compute what their
                                language model does

transformers' own mappings decide, so a new architecture needs nothing here. A model that can't run
on text alone is refused before its weights are read.
"""

from __future__ import annotations

from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError
from lorafold.models.text_part import whole_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CAUSAL = "AutoModelForCausalLM"


def auto_class(config: PreTrainedConfig, what: str) -> Any:
    """Return the auto class of a language model with this configuration.

    Raises LorafoldError if the model needs more than text.

    Args:
        config: The configuration of the model.
        what: The name of the model in messages.
    """
    auto = opened_by(config)
    cls = auto._model_mapping.get(type(config), None)
    if auto.__name__ != CAUSAL and cls and (needed := _beside_text(config, cls)):
        raise LorafoldError(
            f"{what}: a {config.model_type} model can't run on text alone ({needed}), and rows have"
            " only text; expected a causal language model, or one with towers for images or sounds"
            " beside a language model that runs without them"
        )
    return auto


def opened_by(config: PreTrainedConfig) -> Any:
    """Return the auto class that has a model for this configuration, whatever that model needs; the
    causal one, whose error lists what there is, if none has.
    """
    kinds, coded = _kinds(), getattr(config, "auto_map", None) or {}
    found = (a for a in kinds if a.__name__ in coded or type(config) in a._model_mapping)
    return next(found, kinds[0])


def opened_by_name(model: Any) -> str:
    """Return the name of the auto class that opens a model again, for its model card: whole, where
    the model is a part for text.
    """
    whole = whole_of(model)
    shown = model if whole is None else whole.model
    config: Any = getattr(shown, "config", None)
    if config is None:
        return CAUSAL
    exact = (a for a in _kinds() if a._model_mapping.get(type(config), None) is type(shown))
    name: str = next(exact, opened_by(config)).__name__
    return name


def _kinds() -> tuple[Any, ...]:
    import transformers as tf

    return tf.AutoModelForCausalLM, tf.AutoModelForMultimodalLM


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
