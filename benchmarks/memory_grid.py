"""Estimated against measured: the peak of a step over methods, storages, shapes and architectures.

    python benchmarks/memory_grid.py [--only lora]

Measured is what torch's allocator gave out at the peak of the second of two real steps (of a prompt
and the token after it for inference), weights included: `lorafold.memory.measure`. The embedded
model has its own weights, the others random ones. 16-bit matrices are multiplied as this machine's
CPU is faster. `error` is of the estimate.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import transformers as tf
from lib.results import keep
from lib.short import parsed

from lorafold.memory.estimate import estimate
from lorafold.memory.measure import measure
from lorafold.memory.presets import memory_setting
from lorafold.memory.trace import MemorySetting
from lorafold.models.classifier import head_paths
from lorafold.models.fake import fake_model
from lorafold.models.loading import load_model
from lorafold.models.sources import read_configuration
from lorafold.ops.arithmetic import widens
from lorafold.recipe.recipe import Recipe

ON = {"gradient_checkpointing": True}
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, Any] = {
    "qwen2": tf.Qwen2Config(
        **SHAPE, num_hidden_layers=12, vocab_size=64000, tie_word_embeddings=True
    ),
    "gemma2": tf.Gemma2Config(
        **SHAPE, head_dim=64, num_hidden_layers=10, vocab_size=64000, sliding_window=256
    ),
    "gpt2": tf.GPT2Config(n_embd=512, n_layer=12, n_head=8),
    "mixtral": tf.MixtralConfig(
        **SHAPE | {"intermediate_size": 1024},
        num_hidden_layers=6,
        num_local_experts=8,
        vocab_size=32000,
    ),
    "qwen3-moe": tf.Qwen3MoeConfig(
        **SHAPE | {"head_dim": 64},
        num_hidden_layers=6,
        vocab_size=32000,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
    ),
    "qwen2-moe": tf.Qwen2MoeConfig(
        **SHAPE,
        num_hidden_layers=6,
        vocab_size=32000,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=1024,
    ),
    "bert": tf.BertConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    ),
}
# architecture, mode, recipe, batch, length
GRID: list[tuple[str, str, dict[str, Any], int, int]] = [
    ("smollm2", "inference", {}, 1, 1024),
    ("smollm2", "inference", {}, 8, 256),
    ("smollm2", "inference", {"storage": "nf4"}, 4, 512),
    ("smollm2", "lora", {}, 1, 1024),
    ("smollm2", "lora", {}, 4, 256),
    ("smollm2", "lora", ON, 4, 512),
    ("smollm2", "lora", {"rank": 64}, 2, 256),
    ("smollm2", "lora", {"storage": "fp32"}, 2, 256),
    ("smollm2", "lora", {"storage": "int8"}, 2, 256),
    ("smollm2", "qlora", {}, 1, 1024),
    ("smollm2", "qlora", ON, 4, 512),
    ("smollm2", "dora", {}, 2, 256),
    ("smollm2", "dora", ON | {"storage": "bf16"}, 2, 512),
    ("smollm2", "vera", {"storage": "bf16"}, 2, 256),
    ("smollm2", "adalora", {"storage": "bf16"}, 2, 256),
    ("smollm2", "loha", {"storage": "bf16"}, 2, 256),
    ("smollm2", "lokr", {}, 2, 256),
    ("smollm2", "ia3", {"storage": "bf16"}, 2, 256),
    ("smollm2", "bitfit", {"storage": "bf16"}, 2, 256),
    ("smollm2", "houlsby", {"storage": "bf16"}, 2, 256),
    ("smollm2", "prefix", {"storage": "bf16"}, 2, 256),
    ("smollm2", "prompt", {"storage": "bf16"}, 2, 256),
    ("smollm2", "lt-sft", {"storage": "bf16"}, 2, 256),
    ("smollm2", "full", {}, 2, 128),
    ("smollm2", "full", ON | {"storage": "bf16"}, 4, 256),
    ("smollm2", "full", {"optimizer": "adamw8bit"}, 2, 256),
    ("qwen2", "inference", {}, 2, 1024),
    ("qwen2", "lora", {}, 2, 512),
    ("qwen2", "qlora", ON, 2, 512),
    ("qwen2", "full", {}, 2, 256),
    ("gemma2", "inference", {}, 2, 1024),
    ("gemma2", "lora", {}, 1, 1024),
    ("gemma2", "dora", ON, 2, 512),
    ("gpt2", "lora", {}, 2, 512),
    ("gpt2", "full", ON, 2, 256),
    ("mixtral", "inference", {}, 2, 512),
    ("mixtral", "lora", {}, 2, 512),
    ("mixtral", "qlora", {}, 2, 512),
    ("mixtral", "dora", ON, 2, 512),
    ("qwen3-moe", "lora", {}, 2, 512),
    ("qwen3-moe", "qlora", ON, 2, 512),
    ("qwen2-moe", "lora", {}, 2, 512),
    ("qwen2-moe", "qlora", {}, 2, 256),
    ("bert", "lora", {}, 4, 256),
    ("bert", "full", {}, 4, 128),
]


def model(name: str, setting: MemorySetting) -> Any:
    if name == "smollm2":
        return load_model(name, setting.base, "cpu")
    return fake_model(CONFIGS[name], setting.base, CONFIGS[name].num_hidden_layers, setting.classes)


def with_head(model: Any) -> dict[str, Any]:
    return {"modules_to_save": head_paths(model)}


def settings(only: str | None) -> Iterator[tuple[dict[str, Any], str, MemorySetting]]:
    for name, mode, recipe, batch, length in GRID:
        if only in (None, mode, name):
            setting = memory_setting(mode, Recipe(**recipe), batch, length)
            setting = replace(setting, widened=widens(setting.base.dtype))
            if name == "bert":
                setting = replace(setting, classes=2, packed=False)
                setting = setting if mode == "full" else replace(setting, beside=with_head)
            words = [
                f"{k.removeprefix('gradient_')}" if v is True else f"{k} {v}"
                for k, v in recipe.items()
            ]
            yield (
                {
                    "model": name,
                    "mode": mode,
                    "with": ", ".join(words),
                    "batch": batch,
                    "length": length,
                },
                name,
                setting,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="one mode or model")
    rows = []
    for row, name, setting in settings(parsed(parser, only="adalora").only):
        torch.manual_seed(0)
        config = read_configuration(name) if name == "smollm2" else CONFIGS[name]
        estimated = estimate(config, setting).total
        measured = measure(
            lambda name=name, setting=setting: model(name, setting), setting, torch.device("cpu")
        )
        rows.append(
            {
                **row,
                "estimated MB": f"{estimated / 1e6:.1f}",
                "measured MB": f"{measured / 1e6:.1f}",
                "error": f"{estimated / measured - 1:+.2%}",
                "off": abs(estimated / measured - 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    off = [row.pop("off") for row in rows]
    keep(
        "memory_grid",
        rows,
        [{"settings": len(off), "median error": f"{median(off):.2%}", "worst": f"{max(off):.2%}"}],
        dtypes="see the rows",
    )


if __name__ == "__main__":
    main()
