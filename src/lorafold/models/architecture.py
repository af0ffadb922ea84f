"""Which of transformers' auto classes opens a configuration as a model that continues text.

    AutoModelForCausalLM        wherever transformers has a causal class for it
    AutoModelForMultimodalLM    for others that take text beside images or sounds (LLaVA, Qwen2.5-VL,
                                SmolVLM, Qwen2-Audio): they compute from text alone what their
                                language model does

transformers' own mappings decide, so a new architecture needs nothing here. A model that can't run
on text alone is refused before its weights are read.
"""

from __future__ import annotations

from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def auto_class(config: PreTrainedConfig, what: str) -> Any:
    """Return the auto class of a language model with this configuration.

    Raises LorafoldError if the model needs more than text.

    Args:
        config: The configuration of the model.
        what: The name of the model in messages.
    """
    import transformers as tf

    kinds: tuple[Any, ...] = (tf.AutoModelForCausalLM, tf.AutoModelForMultimodalLM)
    coded = getattr(config, "auto_map", None) or {}
    auto = next((a for a in kinds if a.__name__ in coded or type(config) in a._model_mapping), None)
    if auto is None or auto is kinds[0] or auto.__name__ in coded:
        return auto or kinds[0]  # whose message lists what there is
    if needed := _beside_text(config, auto._model_mapping[type(config)]):
        raise LorafoldError(
            f"{what}: a {config.model_type} model can't run on text alone ({needed}), and rows have"
            " only text; expected a causal language model, or one with towers for images or sounds"
            " beside a language model that runs without them"
        )
    return auto


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
