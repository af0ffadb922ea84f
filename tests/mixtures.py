"""Tiny mixtures of experts: with and without experts that all tokens meet, with the matrices stored
either way, with biases.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MANY = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**SHAPE, **MANY, head_dim=16),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(**SHAPE, **MANY, shared_expert_intermediate_size=64),
    "gpt-oss": lambda: tf.GptOssConfig(
        **SHAPE,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek-v3": lambda: tf.DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4},
        moe_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}


def mixture(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of that name with random weights, among which the router decides clearly."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()
