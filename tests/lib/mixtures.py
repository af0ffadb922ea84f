"""Tiny mixtures of experts: with and without experts that all tokens meet, with the matrices stored
either way, with biases; and those whose experts are not transformers' interface for them.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MANY = {"num_experts": 8, "moe_intermediate_size": 128}

CONFIGS: dict[str, Callable[..., Any]] = {
    "mixtral": lambda **o: tf.MixtralConfig(**SHAPE | {"num_local_experts": 4} | o),
    "qwen3-moe": lambda **o: tf.Qwen3MoeConfig(**SHAPE | MANY | {"head_dim": 16} | o),
    # an expert that all tokens meet, beside those that they are sent to
    "qwen2-moe": lambda **o: tf.Qwen2MoeConfig(
        **SHAPE | MANY | {"shared_expert_intermediate_size": 64} | o
    ),
    # matrices (E, in, out), and biases
    "gpt-oss": lambda **o: tf.GptOssConfig(
        **SHAPE
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        | o
    ),
    # the first block is dense
    "deepseek-v3": lambda **o: tf.DeepseekV3Config(
        **SHAPE
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        }
        | o
    ),
}
MLA: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "num_attention_heads": 4,
}  # fmt: skip
# the rows of `core.expert_matrices.FORMS`, and a router of more experts than have matrices
FORMS: dict[str, Callable[..., Any]] = {
    "llama4": lambda: tf.Llama4TextConfig(
        **SHAPE, head_dim=16, intermediate_size_mlp=128, num_local_experts=4, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    ),
    "jetmoe": lambda: tf.JetMoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_key_value_heads=2, kv_channels=32, num_local_experts=4, num_experts_per_tok=2,
    ),
    "dbrx": lambda: tf.DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, vocab_size=300, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={
            "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64,
        },
    ),
    "longcat": lambda: tf.LongcatFlashConfig(
        vocab_size=300, hidden_size=64, ffn_hidden_size=96, expert_ffn_hidden_size=128,
        num_layers=2, n_routed_experts=4, zero_expert_num=2, moe_topk=2, head_dim=16,
        routed_scaling_factor=1.0, **MLA,
    ),
}  # fmt: skip


def mixture(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of that name with random weights, among which the router decides clearly."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config((CONFIGS | FORMS)[name]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()
