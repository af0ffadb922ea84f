"""A tiny model as a GGUF, in llama.cpp's names and order."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def write_gguf(directory: Path, path: Path) -> None:
    """The tiny Llama of `directory` as an F32 GGUF, in llama.cpp's names and order of query and key
    rows.
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
    writer = gguf.GGUFWriter(path, "llama")
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
    special = {token["content"] for token in backend["added_tokens"]}
    vocabulary = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
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
    for name, weight in model.state_dict().items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                weight = (
                    weight.view(count, 2, -1, weight.shape[-1])
                    .transpose(1, 2)
                    .reshape(weight.shape)
                )
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
