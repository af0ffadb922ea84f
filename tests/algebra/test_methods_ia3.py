"""Where IA3 goes by itself, on models of different families, against PEFT's table."""

import pytest
import torch
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as PLACES
from transformers import AutoConfig, AutoModel

import lorafold as lf

WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size")
INNER = ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads")  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
SMALL = dict.fromkeys(WIDTHS, 32) | dict.fromkeys(INNER, 48) | dict.fromkeys(HEADS, 4)
SMALL |= dict.fromkeys((*LAYERS, "num_key_value_heads"), 2) | {"pad_token_id": 0, "vocab_size": 64}
SMALL |= dict.fromkeys(("d_kv", "head_dim", "rotary_dim"), 8)
FAMILIES = ["llama", "mistral", "gpt2", "bloom", "gpt_neox", "t5", "bert", "roberta",
            "gpt_bigcode", "deberta-v2"]  # fmt: skip
# the paper trains keys; PEFT's table has queries in their place
QUERIES = ["opt", "gptj", "gpt_neo", "bart", "phi", "gemma", "gemma2", "qwen2", "qwen3"]


def sites(family: str) -> dict[str, bool]:
    config = AutoConfig.for_model(family)
    for name, value in SMALL.items():
        if name in config.to_dict():
            setattr(config, name, value)
    if family == "gpt_neo":
        config.attention_layers = ["global", "local"]
        config.attention_types = [[["global", "local"], 1]]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return {path: delta.of_input for path, delta in lf.attach(model, lf.IA3()).deltas.items()}


def ends(path: str, names: list[str]) -> bool:
    return any(path.endswith(f".{name}") for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_those_of_peft(family: str) -> None:
    found = sites(family)
    encoders = ("bert", "roberta", "deberta-v2")
    names = [n for n in PLACES[family] if family not in encoders or n != "output.dense"]
    assert {p for p in found if not found[p]} == {
        p for p in found if ends(p, names) and not ends(p, FEEDFORWARD[family])
    }
    assert all(ends(p, FEEDFORWARD[family]) for p, of_input in found.items() if of_input)
    assert all(any(ends(p, [n]) for p in found) for n in PLACES[family])
    assert any(found.values())


@pytest.mark.parametrize("family", QUERIES)
def test_keys_and_values_where_peft_takes_queries(family: str) -> None:
    found = sites(family)
    outputs = {p.rsplit(".", 1)[-1] for p, of_input in found.items() if not of_input}
    assert outputs == {"k_proj", "v_proj"}
    assert all(ends(p, FEEDFORWARD[family]) for p, of_input in found.items() if of_input)
    assert any(found.values())


def test_inputs_of_an_embedding_are_refused() -> None:
    root = torch.nn.Sequential(torch.nn.Embedding(8, 4))
    with pytest.raises(lf.LorafoldError, match="whose inputs are ids"):
        lf.attach(root, lf.IA3(feedforward=["0"]), ["0"])
