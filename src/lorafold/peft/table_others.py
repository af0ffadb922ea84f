"""LoHa, LoKr, IA3, prompt and prefix tuning in PEFT's files, for `table.py`.

    LoHa    r, alpha                        hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b
    LoKr    r, alpha, decompose_factor ...  lokr_w1 or lokr_w1_a and lokr_w1_b, lokr_w2 likewise
    IA3     feedforward_modules             ia3_l, (out, 1), or (1, in) for feedforward modules

Prompt and prefix tuning have no target modules and one tensor, `prompt_embeddings`: (n, d), or
(n, 2 L Hk D) with the keys and values of all layers in order. For a prefix trained through a
projection, PEFT stores the projection's output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorafold.core.anatomy import last_part
from lorafold.methods.common.virtual_tokens import VirtualTokens
from lorafold.methods.ia3 import IA3, IA3Delta
from lorafold.methods.loha import LoHa, LoHaDelta
from lorafold.methods.lokr import LoKr, LoKrDelta
from lorafold.methods.prefix_tuning import Prefix, PrefixDelta
from lorafold.methods.prompt_tuning import Prompt, PromptDelta
from lorafold.peft.convolution import from_channels, from_kernel, full_w2, to_channels, w2_problem
from lorafold.peft.table_lora import as_peft_number, fan_in_fan_out
from lorafold.peft.table_types import Entries, Field, FileTensor, Method, Regex, TargetModule, named

# keys for convolutions (redundant), initialization, and dropouts that only act in training
LYCORIS_IRRELEVANT = frozenset(
    {"init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d"}
)

LOHA = Method(
    LoHa, "LOHA",
    (Field("r", "rank", int, 8), Field("alpha", "alpha", float, 8, as_peft_number)),
    irrelevant=LYCORIS_IRRELEVANT,
    biases=False,
)  # fmt: skip

LOKR = Method(
    LoKr, "LOKR",
    (
        Field("r", "rank", int, 8),
        Field("alpha", "alpha", float, 8, as_peft_number),
        Field("decompose_both", "decompose_both", bool, False),
        Field("decompose_factor", "decompose_factor", int, -1),
    ),
    irrelevant=LYCORIS_IRRELEVANT,
    biases=False,
)  # fmt: skip
# keys for encoder-decoders, initialization, and sizes that follow from the tensor
IRRELEVANT = frozenset({
    "encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers",
    "num_transformer_submodules", "prefix_projection", "prompt_tuning_init",
    "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
})  # fmt: skip


def prefixed_tensors(prefix: str) -> Entries:
    """The file's entries for a delta whose keys are the names of its parameters with a prefix."""
    return lambda site: [
        FileTensor(name, f"{{at}}.{prefix}_{name}") for name, _ in site.delta.named_parameters()
    ]


def lokr_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for LoKr. For a convolution, a full D is stored as a kernel."""
    entries = prefixed_tensors("lokr")(site)
    if not site.window:
        return entries
    w2 = {"to_file": full_w2, "from_file": from_kernel, "check": w2_problem}
    return [replace(e, **w2) if e.attribute == "w2" else e for e in entries]  # type: ignore


def feedforward_modules(sites: Sequence[TargetModule]) -> dict[str, Any]:
    """Further config keys for IA3: a regular expression for the modules whose inputs are scaled. It
    consists of last path parts if they are unambiguous.
    """
    scaled = {site.path: site.delta.of_input for site in sites if isinstance(site.delta, IA3Delta)}
    paths = [path for path, of_input in scaled.items() if of_input]
    names = sorted({last_part(path) for path in paths})
    regex = (
        rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"
        if all(of_input == (last_part(path) in names) for path, of_input in scaled.items())
        else "|".join(map(re.escape, paths))
    )
    return {**fan_in_fan_out(sites), "feedforward_modules": regex if paths else []}


IA3_ROW = Method(
    IA3, "IA3",
    (
        Field(
            "feedforward_modules", "feedforward", Regex | list[str] | None, None,
            from_file=lambda value: value or (),
        ),
    ),
    irrelevant=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
    derived=feedforward_modules,
    biases=False,
)  # fmt: skip


def ia3_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entry for IA3's vector, which PEFT stores as a matrix or, for a convolution, in
    the shape of its output channels.
    """
    if site.window:
        return [FileTensor("l", "{at}.ia3_l", to_channels, from_channels)]
    if site.delta.l.dim() > 1:  # type: ignore[operator]
        return [FileTensor("l", "{at}.ia3_l")]
    axis = 0 if site.delta.of_input else 1
    return [FileTensor("l", "{at}.ia3_l", lambda v, site: v.unsqueeze(axis), from_channels)]


METHODS = (LOHA, LOKR, IA3_ROW)


def virtual_token_config(sites: Sequence[TargetModule]) -> Mapping[str, Any]:
    """The sizes in PEFT's config for prompt and prefix tuning."""
    deltas = (site.delta for site in sites)
    delta: Any = next(delta for delta in deltas if isinstance(delta, PrefixDelta | PromptDelta))
    of_prefix = isinstance(delta, PrefixDelta)
    heads, size = delta.shape if of_prefix else (1, delta.embeddings.shape[1])
    prefix = {"encoder_hidden_size": heads * size, "prefix_projection": False} if of_prefix else {}
    return prefix | {
        "token_dim": heads * size,
        "num_layers": len(delta.layers),
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }


def read_as_random(_: Any) -> str:
    """Returns `random`, the fastest initialization, because the values in the file replace it."""
    return "random"


def virtual_token_method(spec: type[VirtualTokens], peft_type: str, init: Field) -> Method:
    """The row of prompt or prefix tuning."""
    tokens = Field("num_virtual_tokens", "tokens", int, None)
    return Method(
        spec, peft_type, (tokens, init), irrelevant=IRRELEVANT, derived=virtual_token_config,
        biases=False, preset=spec.targets,
    )  # fmt: skip


PROMPT_INITS = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}
VIRTUAL_TOKEN_METHODS = (
    virtual_token_method(Prompt, "PROMPT_TUNING", Field(
        "prompt_tuning_init", "init", str, "RANDOM", PROMPT_INITS.__getitem__, read_as_random
    )),
    virtual_token_method(Prefix, "PREFIX_TUNING", Field(
        "init_weights", "init", str | None, None, lambda init: None, read_as_random
    )),
)  # fmt: skip

TENSORS = {
    LoHaDelta: prefixed_tensors("hada"),
    LoKrDelta: lokr_tensors,
    IA3Delta: ia3_tensors,
    PromptDelta: named(embeddings="prompt_embeddings"),
    PrefixDelta: named(prefix="prompt_embeddings"),
}
