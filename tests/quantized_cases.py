"""Small real checkpoints in quantized formats, written by the packages that define them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
DYNAMIC = FP8 | {"strategy": "token", "dynamic": True}
# name -> format, arguments of the weights, arguments of the activations, storage
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    "fp8": ("naive-quantized", FP8 | {"strategy": "tensor"}, None, "fp8"),
    "fp8-dynamic": ("float-quantized", FP8 | {"strategy": "channel"}, DYNAMIC, "fp8"),
    "fp8-block": (
        "naive-quantized",
        FP8 | {"strategy": "block", "block_structure": [16, 32]},
        None,
        "fp8",
    ),
    "int4": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 32}, None, "int4"),
    "int4-channel": ("pack-quantized", INT4 | {"strategy": "channel"}, None, "int4"),
    "int4-asymmetric": (
        "pack-quantized",
        INT4 | {"strategy": "group", "group_size": 32, "symmetric": False},
        None,
        "int4",
    ),
    "int8": ("naive-quantized", INT8 | {"strategy": "channel"}, None, "int8"),
    "int8-packed": ("pack-quantized", INT8 | {"strategy": "channel"}, None, "int8"),
    "int8-asymmetric": (
        "int-quantized",
        INT8 | {"strategy": "channel", "symmetric": False},
        INT8 | {"strategy": "token", "dynamic": True},
        "int8",
    ),
}


def compressor_of(settings: dict[str, Any]) -> tuple[Any, Any]:
    """What compressed-tensors itself reads and writes the weights of this config with: the class
    and the scheme.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(settings)
    scheme = config.config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(scheme.format or config.format), scheme


def extremes(w: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """The least and the greatest element of each block of w (out, in) that shares a scale."""
    out, inn = w.shape
    rows, columns = {
        "tensor": (out, inn),
        "channel": (1, inn),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]
    strips = [[b for b in strip.split(columns, 1)] for strip in w.split(rows)]
    low, high = (
        torch.stack([torch.stack([of(b) for b in strip]) for strip in strips])
        for of in (torch.min, torch.max)
    )
    return (low.view(1), high.view(1)) if args.strategy == "tensor" else (low, high)


def make_compressed(base: Path, path: Path, kind: str) -> Path:
    """Write the plain model at `base`, in bf16, in the format of `kind`, by compressed-tensors' own
    compressor.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    form, weights, activations, _ = KINDS[kind]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {"group_0": {**group, "format": form}},
            "ignore": ["lm_head"],
            "format": form,
            "quant_method": "compressed-tensors",
            "quantization_status": "frozen",
        }
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        low, high = extremes(module.weight.detach().float(), scheme.weights)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path, state_dict=model.state_dict())
    compressor.update_config(str(path))
    for file in base.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, path)
    return path


def make_fine_grained(base: Path, path: Path, block: int = 32) -> Path:
    """Write the plain model at `base` as fine-grained FP8, as the format says."""
    shutil.copytree(base, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }
    (path / "config.json").write_text(json.dumps(config))

    def quantized(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "_proj.weight" in n]:
            w = tensors[name].float()
            blocks = w.unfold(0, block, block).unfold(1, block, block)
            scale = blocks.abs().amax((2, 3)) / torch.finfo(torch.float8_e4m3fn).max
            spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
            tensors[name] = (w / spread).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale

    edit(path, quantized)
    return path


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a directory's only file of weights."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def plain_of(path: Path, base: Path) -> nn.Module:
    """The plain model in fp32 with the weights to which compressed-tensors decompresses a
    checkpoint.
    """
    from transformers import AutoModelForCausalLM

    tensors = load_file(path / "model.safetensors")
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    compressor, scheme = compressor_of(settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parent = name.removesuffix(".weight")
        if f"{parent}.weight_scale" not in tensors:
            parameter.data = tensors[name].float()
            continue
        own = {n.removeprefix(f"{parent}."): t for n, t in tensors.items() if f"{parent}." in n}
        parameter.data = compressor.decompress(own, scheme)["weight"].float()
    return model.eval()
