"""Models with random weights in the shape of others, written as directories to measure with."""

from pathlib import Path


def qwen3(path: Path) -> None:
    """Write the shape of Qwen3-0.6B, in bf16: 596M parameters, of which the tied head has 156M."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def llama8(path: Path) -> None:
    """Write eight blocks in the shape of Llama-3.1-8B under a small vocabulary, in bf16: 1.8B
    parameters.
    """
    import torch
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=49_152,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)


SHAPES = {"qwen3": qwen3, "llama8": llama8}
