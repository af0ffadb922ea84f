"""A Llama-like model and LoRA adapters as GGUF files, for llama.cpp.

    base(source, like, "base.gguf")         bf16 weights; tokenizer and settings from another GGUF
    adapter(directory, config, "a.gguf")    a PEFT adapter, its scale folded into B

llama.cpp rotates neighbouring rows where Hugging Face rotates halves, so the rows of q and k, and
of their B, are put in that order.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor


def base(source: Path, like: Path, out: Path) -> None:
    """Write the weights of a directory in bf16, vectors in fp32."""
    config = json.loads((source / "config.json").read_text())
    writer, reader = gguf.GGUFWriter(str(out), "llama"), gguf.GGUFReader(str(like))
    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if field.name in own or field.name.startswith("GGUF."):
            continue
        items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=items)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for key, tensor in load_file(source / "model.safetensors").items():
        path = key.removesuffix(".weight")
        ordered = _in_pairs(tensor, _heads(path, config))
        _add(writer, _name(path, config), ordered, torch.float32 if tensor.dim() == 1 else None)
    _finish(writer)


def adapter(directory: Path, config: dict[str, Any], out: Path) -> None:
    """Write a PEFT adapter of one rank and alpha in fp32."""
    settings = json.loads((directory / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # the scale is in B
    tensors = load_file(directory / "adapter_model.safetensors")
    for key in sorted(k for k in tensors if k.endswith(".lora_A.weight")):
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        up = tensors[key.replace("lora_A", "lora_B")] * (settings["lora_alpha"] / settings["r"])
        name = _name(path, config)
        _add(writer, name + ".lora_a", tensors[key], torch.float32)
        _add(writer, name + ".lora_b", _in_pairs(up, _heads(path, config)), torch.float32)
    _finish(writer)


def _name(path: str, config: dict[str, Any]) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found = names.get_name(path + ".weight", try_suffixes=(".weight",))
    assert found is not None, path
    return found if found.endswith(".weight") else found + ".weight"


def _heads(path: str, config: dict[str, Any]) -> int:
    last = path.rpartition(".")[2]
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    return config[heads[last]] if last in heads else 0


def _in_pairs(w: Tensor, heads: int) -> Tensor:
    if not heads:
        return w
    parts = w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:])
    return parts.transpose(1, 2).reshape(w.shape)


def _add(writer: gguf.GGUFWriter, name: str, t: Tensor, dtype: torch.dtype | None) -> None:
    t = t.to(dtype or torch.bfloat16).contiguous()
    if dtype is None:
        raw, kind = t.view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=kind)
    else:
        writer.add_tensor(name, t.numpy())


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
