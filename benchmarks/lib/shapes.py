"""Models with random weights in the shape of others, written as directories to measure with."""

from pathlib import Path


def qwen3(path: Path) -> None:
    """Write four blocks in the shape of Qwen3-0.6B under its vocabulary, in bf16: 218M parameters,
    of which the tied head has 156M.
    """
    import torch
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


SHAPES = {"qwen3": qwen3}
