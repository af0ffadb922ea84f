"""A tiny gpt-oss in bf16, and the same with its experts in MXFP4, as it is released."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import make_tokenizer
from lorafold.ops.mxfp4 import MAGNITUDES
from mixtures import CONFIGS
from quantized_cases import edit

NAMES = ("gate_up_proj", "down_proj")
SITES = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in NAMES]
PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": PLAIN}


def to_mxfp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (..., G, 16) and scales (..., G) of w (..., 32 G): the smallest power of two by which
    all of a group fit, and the nearest values.
    """
    groups = w.float().unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / MAGNITUDES[-1]).log2().ceil().clamp(-127, 127)
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - torch.tensor(MAGNITUDES)).abs().argmin(-1)
    codes = codes + 8 * scaled.signbit()
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponents + 127).to(torch.uint8)


def change_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def make_gpt_oss(path: Path) -> Path:
    """Write the tiny model in bf16, with its tokenizer."""
    tokenizer, config = make_tokenizer(), CONFIGS["gpt-oss"]()
    config.intermediate_size, config.vocab_size = 96, len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.05)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_mxfp4(plain: Path, path: Path) -> Path:
    """Write the model at `plain` with its experts in MXFP4."""
    shutil.copytree(plain, path)

    def quantized(tensors: dict[str, Tensor]) -> None:
        for name in SITES:
            blocks, scales = to_mxfp4(tensors.pop(name).mT)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales

    edit(path, quantized)
    change_config(path, lambda config: config.update(quantization_config=SETTINGS))
    return path
