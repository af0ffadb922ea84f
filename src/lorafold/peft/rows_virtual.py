"""Prompt and prefix tuning in PEFT's files, for `table.py`.

There is one tensor, `prompt_embeddings`: (n, d), or (n, 2 L Hk D) with a virtual token's keys and
values of all layers in order. There are no target modules. A prefix that PEFT trained through a
projection is stored as the projection's output, so it is read like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafold.core.delta import Delta
from lorafold.methods.prefix import Prefix, PrefixDelta
from lorafold.methods.prompt import Prompt, PromptDelta
from lorafold.peft.format import Entries, Field, Method, Site, named

PROMPT_INITS = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}
# keys for encoder-decoders, for the initialization, and sizes that follow from the tensor
IRRELEVANT = frozenset(
    {
        "encoder_hidden_size",
        "init_weights",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "token_dim",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)


def delta_of(sites: Sequence[Site]) -> Any:
    """Return the delta that has the prompt or the prefix."""
    return next(site.delta for site in sites if isinstance(site.delta, PrefixDelta | PromptDelta))


def of_prompt(sites: Sequence[Site]) -> Mapping[str, Any]:
    """Return the sizes that PEFT's config of a prompt has."""
    delta: PromptDelta = delta_of(sites)
    width = delta.embeddings.shape[1]
    return {
        "token_dim": width,
        "num_layers": len(delta.layers),
        "num_attention_heads": 1,
        "num_transformer_submodules": 1,
    }


def of_prefix(sites: Sequence[Site]) -> Mapping[str, Any]:
    """Return the sizes that PEFT's config of a prefix has."""
    delta: PrefixDelta = delta_of(sites)
    heads, size = delta.shape
    return {
        "token_dim": heads * size,
        "num_layers": len(delta.layers),
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }


def read_as_random(_: Any) -> str:
    """Return the initialization that is fastest, since the file's values replace it."""
    return "random"


TOKENS = Field("num_virtual_tokens", "tokens", int, None)

METHODS: tuple[Method, ...] = (
    Method(
        Prompt,
        "PROMPT_TUNING",
        (
            TOKENS,
            Field(
                "prompt_tuning_init",
                "init",
                str,
                "RANDOM",
                PROMPT_INITS.__getitem__,
                read_as_random,
            ),
        ),
        irrelevant=IRRELEVANT,
        derived=of_prompt,
        biases=False,
        preset=Prompt.targets,
    ),
    Method(
        Prefix,
        "PREFIX_TUNING",
        (
            TOKENS,
            Field("init_weights", "init", str | None, None, lambda init: None, read_as_random),
        ),
        irrelevant=IRRELEVANT,
        derived=of_prefix,
        biases=False,
        preset=Prefix.targets,
    ),
)

TENSORS: dict[type[Delta], Entries] = {
    PromptDelta: named(embeddings="prompt_embeddings"),
    PrefixDelta: named(prefix="prompt_embeddings"),
}
