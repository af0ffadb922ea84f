"""Which base fits which card: 12 models by their public configurations, as `lorafold estimate` has
them.

    python benchmarks/fits.py [--only llama]

One row of 2,048 tokens with gradient checkpointing, r = 16 on every linear; `full` is full
fine-tuning of bf16 weights with AdamW. A card's column names the most that fits beside a tenth of
it left free: full, LoRA over bf16, QLoRA over NF4, or nothing. Figures are estimates of a GPU and
the same on every machine.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import transformers as tf
from lib.results import keep, markdown
from lib.short import parsed

import lorafold as lf

LLAMA, QWEN3 = tf.LlamaConfig, tf.Qwen3Config
# name: configuration, hidden size, inner size, blocks, heads, key heads, vocabulary, head and
# embedding are one, and what else differs
MODELS: dict[str, tuple[Any, int, int, int, int, int, int, bool, dict[str, Any]]] = {
    "SmolLM2 135M": (LLAMA, 576, 1536, 30, 9, 3, 49152, True, {}),
    "Qwen2.5 0.5B": (tf.Qwen2Config, 896, 4864, 24, 14, 2, 151936, True, {}),
    "Llama 3.2 1B": (LLAMA, 2048, 8192, 16, 32, 8, 128256, True, {"head_dim": 64}),
    "SmolLM2 1.7B": (LLAMA, 2048, 8192, 24, 32, 32, 49152, True, {}),
    "Llama 3.2 3B": (LLAMA, 3072, 8192, 28, 24, 8, 128256, True, {"head_dim": 128}),
    "Qwen3 4B": (QWEN3, 2560, 9728, 36, 32, 8, 151936, True, {"head_dim": 128}),
    "Mistral 7B v0.3": (tf.MistralConfig, 4096, 14336, 32, 32, 8, 32768, False, {}),
    "Llama 3.1 8B": (LLAMA, 4096, 14336, 32, 32, 8, 128256, False, {}),
    "Gemma 2 9B": (tf.Gemma2Config, 3584, 14336, 42, 16, 8, 256000, True, {"head_dim": 256}),
    "Qwen3 14B": (QWEN3, 5120, 17408, 40, 40, 8, 151936, False, {"head_dim": 128}),
    "Qwen3 32B": (QWEN3, 5120, 25600, 64, 64, 8, 151936, False, {"head_dim": 128}),
    "Llama 3.3 70B": (LLAMA, 8192, 28672, 80, 64, 8, 128256, False, {}),
}
MODES = {"full": "full", "LoRA": "lora", "QLoRA": "qlora"}  # the most memory first
CARDS = (8, 16, 24, 80)  # GB


def configured(name: str, folder: Path) -> Path:
    """A directory with the configuration of a model, as those of the hub have it."""
    kind, hidden, inner, blocks, heads, keys, vocabulary, tied, more = MODELS[name]
    config = kind(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=keys, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=8192, **more,
    )  # fmt: skip
    config.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    return folder


def parameters(name: str) -> float:
    """Billions of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        found = lf.estimate(configured(name, Path(folder)), "inference", max_length=8)
    return found.terms["weights"] / 2e9  # of 2 bytes each


def row(name: str) -> dict[str, str]:
    """The peak of each mode in GB, and what fits each card."""
    peaks = {}
    for shown, mode in MODES.items():
        storage = "nf4" if mode == "qlora" else "bf16"
        recipe = lf.Recipe(storage=storage, gradient_checkpointing=True)
        with tempfile.TemporaryDirectory() as folder:
            given = configured(name, Path(folder))
            peaks[shown] = lf.estimate(given, mode, max_length=2048, recipe=recipe).total / 1e9
    figures = {f"{shown} GB": f"{peak:.1f}" for shown, peak in reversed(peaks.items())}
    fits = {
        f"{card} GB GPU": next((m for m, peak in peaks.items() if peak <= 0.9 * card), "none")
        for card in CARDS
    }
    return {"model": name, "parameters": f"{parameters(name):.2f}B", **figures, **fits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name has this in it")
    only = parsed(parser, only="SmolLM2 135M").only.lower()
    rows = [row(name) for name in MODELS if only in name.lower()]
    if only:
        print(markdown(rows))
    else:
        keep("fits", rows, dtypes="see the columns")


if __name__ == "__main__":
    main()
