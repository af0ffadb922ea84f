"""A tiny model as a GGUF, in llama.cpp's names and order."""

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
    """The tiny Llama of `directory` as a GGUF, in llama.cpp's names and order of query and key
    rows.

    Args:
        directory: of the model.
        path: of the file; of a split one without the numbers.
        kind: the type of the matrices; vectors are F32.
        pre: the name of the rule by which the tokenizer splits text.
        without: tensors to leave out, by the file's names.
        besides: arrays to write as well, by the file's names.
        says: metadata besides the model's own.
        per_file: tensors of a file, if it is split.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    backend = json.loads((directory / "tokenizer.json").read_text())
    heads, kv_heads, layers = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["num_hidden_layers"],
    )
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_file)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    tensors: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                weight = (
                    weight.view(count, 2, -1, weight.shape[-1])
                    .transpose(1, 2)
                    .reshape(weight.shape)
                )
        tensors[names.get_name(name, try_suffixes=(".weight",))] = weight.numpy()
    for name, values in {**tensors, **(besides or {})}.items():
        if name in without:
            continue
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
