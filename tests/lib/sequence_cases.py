"""Tiny models of many families, rows for them, and the loss and gradients of a step."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from lorafold.training_step.lm_head_loss import labelled_loss

VOCAB = 97
COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCAB,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": 8}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, GROUPED),
    "qwen2": (tf.Qwen2Config, GROUPED),
    "gemma2": (tf.Gemma2Config, HEADED | {
        "sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3": (tf.Gemma3TextConfig, HEADED | {
        "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": (tf.GPT2Config,
             {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB} | NO_DROPOUT),
    "mistral": (tf.MistralConfig, GROUPED | {"sliding_window": 5}),
    "qwen3": (tf.Qwen3Config, HEADED),
    "gemma": (tf.GemmaConfig, HEADED),
    "phi3": (tf.Phi3Config, GROUPED | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "qwen3-moe": (tf.Qwen3MoeConfig, HEADED | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "decoder_sparse_step": 1}),
    "mixtral": (tf.MixtralConfig, GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
# models in which the documents of one sequence influence each other
LEAKY: dict[str, Any] = {
    "mamba": tf.MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=VOCAB, initializer_range=0.2
    ),
    "opt": tf.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, ffn_dim=48,
        init_std=0.2, word_embed_proj_dim=32, max_position_embeddings=64,
    ),
    "gpt-oss": tf.GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip
LENGTHS = [9, 14, 14, 5]


@dataclass(frozen=True)
class Row:
    ids: list[int]
    labels: list[int]


def build(name: str, **changes: Any) -> tf.PreTrainedModel:
    """A tiny model whose weights are large enough that attention matters."""
    kind, fields = CONFIGS[name]
    torch.manual_seed(0)
    config = kind(**fields | {"initializer_range": 0.2} | changes)
    model = tf.AutoModelForCausalLM.from_config(config)
    model.config.pad_token_id = 0
    return model.train()


def rows(lengths: list[int] = LENGTHS) -> list[Row]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    return [Row(i, [-100] * (len(i) // 3) + i[len(i) // 3 :]) for i in ids]


def loss_and_gradients(
    model: tf.PreTrainedModel, batches: list[dict[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        inputs = dict(batch)
        loss, _ = labelled_loss(model, inputs.pop("labels"), inputs)
        loss.backward()
        total = total + loss.detach()
    named = model.named_parameters()
    return total, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_close(found: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """1e-5 of the norm, which sums in another order cost in these depths."""
    assert (found - expected).norm() <= 1e-5 * (expected.norm() if scale is None else scale)


def heads(tokens: int, widths: tuple[int, int], queries: int, keys: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    shapes = [(queries, widths[0]), (keys, widths[0]), (keys, widths[1])]
    how: dict[str, Any] = {"generator": draw, "dtype": torch.float64}
    return [torch.randn(tokens, *s, **how).requires_grad_() for s in shapes]
