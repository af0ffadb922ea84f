"""Tiny models as GGUF files, in llama.cpp's names and order."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def write_gguf(
    directory: Path,
    path: Path,
    *,
    kind: str = "F32",
    pre: str | None = "smollm",
    without: Collection[str] = (),
    besides: Mapping[str, Any] | None = None,
    says: Mapping[str, str | float] | None = None,
    per_file: int = 0,
) -> None:
    """The tiny Llama, or mixture of experts of Qwen 3, of a directory as a GGUF file.

    `kind`: the type of the matrices; vectors are F32. `pre`: how the tokenizer splits text.
    `without`, `besides`: tensors by the file's names. `per_file`: tensors of each, if it is split.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text())
    backend = json.loads((directory / "tokenizer.json").read_text())
    architecture = config["model_type"].replace("_", "")
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_file)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    for key, given in (says or {}).items():
        (writer.add_string if isinstance(given, str) else writer.add_float32)(key, given)
    special = {token["content"] for token in backend["added_tokens"]}
    vocabulary = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
            for token in vocabulary
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template((directory / "chat_template.jinja").read_text())
    for name, values in {**tensors(directory, config), **(besides or {})}.items():
        if name in without:
            continue
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The weights as arrays, by the file's names."""
    import gguf

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = arch[config["model_type"].replace("_", "")]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    found: dict[str, Any] = {}
    for name, weight in AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32
    ).state_dict().items():  # fmt: skip
        part = name.split(".")[-2]
        if kind == gguf.MODEL_ARCH.LLAMA and part in heads:
            weight = (
                weight.view(config[heads[part]], 2, -1, weight.shape[-1])
                .transpose(1, 2)
                .reshape(weight.shape)
            )
        if part == "experts":
            *_, layer, _, _, leaf = name.split(".")
            halves = ["gate", "up"] if leaf == "gate_up_proj" else ["down"]
            for half, values in zip(halves, weight.chunk(len(halves), dim=1), strict=True):
                found[f"blk.{layer}.ffn_{half}_exps.weight"] = values.contiguous().numpy()
        elif name != "lm_head.weight" or not config["tie_word_embeddings"]:
            found[names.get_name(name, try_suffixes=(".weight",))] = weight.numpy()
    return found
