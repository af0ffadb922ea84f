"""A table of tiny random models, one for each way in which a transformer is built.

    ARCHITECTURES["qwen3"].model()      the model, the same each time, in evaluation mode
    ARCHITECTURES["qwen3"].inputs()     what it is called with
    run(model, inputs)                  all that it computes of them, as one vector
    moved(model)                        an adapter on it of which every parameter matters

What a test must know of a model is a field of its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import lorafold as lf

VOCAB = 300  # as many as the tokenizer of conftest.py has
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
COMMON = SHAPE | IDS
GROUPED = COMMON | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
EXPERTS = HEADS | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = EXPERTS | {"num_experts": 4}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
TOWER = SHAPE | {"image_size": 8, "patch_size": 4}
IMAGE = 96  # the token that stands for a part of an image or of a sound
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Architecture:
    """One tiny model: its class, its configuration, what it is called with, the paths of its
    towers, its labels if it is no language model, the targets that PEFT refuses or leaves out,
    those without a gradient as a regular expression and in words, and how near one another two ways
    to compute it are.
    """

    cls: Any
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]] = lambda: {"input_ids": TOKENS}
    towers: tuple[str, ...] = ()
    trains: Callable[[], dict[str, Any]] | None = None
    not_in_peft: tuple[str, ...] = ()
    idle: tuple[str, str] = ("", "")
    within: float = 1e-5

    def model(self) -> nn.Module:
        """Weights so large that every part matters: gains and biases are drawn too."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.cls(self.config())
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * (0.05 if p.dim() == 1 else 0.1))
        return model.float().eval()


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the model computes of its inputs, as one vector (n,)."""
    found = model(**inputs)
    name = next(n for n in ("logits", "logits_per_image", "last_hidden_state") if n in found)
    return found[name].float().flatten()


def moved(model: nn.Module, **options: Any) -> lf.Adapter:
    """A LoRA on the default targets, or on others, with every parameter drawn."""
    adapter = lf.attach(model, lf.LoRA(rank=4, dropout=0.0), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def near(found: Tensor, expected: Tensor, within: float = 1e-5) -> bool:
    """1e-5 of the norm: what sums in another order cost in fp32."""
    return bool((found - expected).norm() <= within * expected.norm())


def audio(mels: int, frames: int) -> Tensor:
    return torch.randn(1, mels, frames, generator=torch.Generator().manual_seed(2))


def image(n: int = 1, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def with_parts(parts: int, **others: Any) -> dict[str, Any]:
    """One row of tokens of which some stand for parts of an image."""
    ids = TOKENS[:1].repeat(1, 2).clone()
    ids[0, 3 : 3 + parts] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | others


def causal(
    config: type, fields: dict[str, Any] = COMMON, not_in_peft: tuple[str, ...] = (), **changes: Any
) -> Architecture:
    kind = tf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[config]
    return Architecture(kind, lambda: config(**fields | changes), not_in_peft=not_in_peft)


def patches(side: int, width: int) -> Tensor:
    return torch.randn(side * side, width, generator=torch.Generator().manual_seed(1))


# the model reads the weight past PEFT's layer, or PEFT refuses the module
MIXERS = ("dt_proj", "out_proj")
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4} | IDS
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}  # fmt: skip

TEXT = {
    "llama": causal(tf.LlamaConfig, GROUPED),
    "mistral": causal(tf.MistralConfig, GROUPED, sliding_window=5),
    "qwen2": causal(tf.Qwen2Config, GROUPED),
    "qwen3": causal(tf.Qwen3Config, HEADS),
    "gemma2": causal(tf.Gemma2Config, HEADS, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3-text": causal(
        tf.Gemma3TextConfig, HEADS, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": causal(tf.Phi3Config, GROUPED),
    "gpt2": causal(tf.GPT2Config, GPT2),
    "gpt-neox": causal(tf.GPTNeoXConfig),
    "falcon": causal(tf.FalconConfig),
    "bloom": causal(tf.BloomConfig, GPT2 | {"hidden_size": 32}),
    "opt": causal(tf.OPTConfig, COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "stablelm": causal(tf.StableLmConfig, GROUPED),
    "olmo2": causal(tf.Olmo2Config, GROUPED),
    "cohere": causal(tf.CohereConfig, GROUPED),
    "granite": causal(tf.GraniteConfig, GROUPED),
    "smollm3": causal(tf.SmolLM3Config, GROUPED),
}
RECURRENT = {
    "mamba": causal(tf.MambaConfig, COMMON, MIXERS, state_size=8, time_step_rank=4),
    "mamba2": causal(
        tf.Mamba2Config, COMMON, MIXERS, state_size=8, num_heads=8, head_dim=8, expand=2,
        n_groups=1, chunk_size=4,
    ),
    "jamba": causal(
        tf.JambaConfig, GROUPED | MAMBA, ("dt_proj",), attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=4,
        mamba_dt_rank=4,
    ),
    "bamba": causal(tf.BambaConfig, GROUPED | MAMBA2, attn_layer_indices=[1], mamba_chunk_size=4),
    "granite-hybrid": causal(
        tf.GraniteMoeHybridConfig, GROUPED | MAMBA2, layer_types=["mamba", "attention"],
        shared_intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, mamba_chunk_size=4,
    ),
    "recurrent-gemma": causal(
        tf.RecurrentGemmaConfig, GROUPED, lru_width=32, attention_window_size=8,
        block_types=["recurrent", "attention"],
    ),
    "qwen3-next": causal(
        tf.Qwen3NextConfig, ROUTED,  layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, shared_expert_intermediate_size=16,
    ),
}  # fmt: skip
MIXTURES = {
    "mixtral": causal(tf.MixtralConfig, GROUPED, num_local_experts=4),
    "qwen3-moe": causal(tf.Qwen3MoeConfig, ROUTED, decoder_sparse_step=1),
    "qwen2-moe": causal(
        tf.Qwen2MoeConfig, GROUPED, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "deepseek-v3": causal(
        tf.DeepseekV3Config, COMMON,  n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, kv_lora_rank=8,
        q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_shared_experts=1,
        num_key_value_heads=4,
    ),
    "gpt-oss": causal(tf.GptOssConfig, HEADS, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
LABELS = torch.tensor([1, 2])
ENCODERS = {
    "t5": Architecture(
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=1,
            dropout_rate=0.0, **IDS,
        ),
        lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :7]},
        trains=lambda: {"labels": TOKENS[:, 1:8].clone()},
    ),
    "bart": Architecture(
        tf.BartForConditionalGeneration,
        lambda: tf.BartConfig(**SEQ2SEQ | IDS),
        lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :7]},
        trains=lambda: {"labels": TOKENS[:, 1:8].clone()},
    ),
    "whisper": Architecture(
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(
            num_mel_bins=8, max_source_positions=10, max_target_positions=20, **SEQ2SEQ | IDS
        ),
        lambda: {"input_features": audio(8, 20), "decoder_input_ids": TOKENS[:1, :7]},
        trains=lambda: {"labels": TOKENS[:1, 1:8].clone()},
    ),
    "bert": Architecture(
        tf.BertForSequenceClassification,
        lambda: tf.BertConfig(**COMMON, num_labels=3),
        trains=lambda: {"labels": LABELS},
    ),
    "roberta": Architecture(
        tf.RobertaForMaskedLM,
        lambda: tf.RobertaConfig(**COMMON, max_position_embeddings=64),
        trains=lambda: {"labels": TOKENS},
    ),
    "deberta-v2": Architecture(
        tf.DebertaV2ForSequenceClassification,
        lambda: tf.DebertaV2Config(
            **COMMON, num_labels=3, relative_attention=True, pos_att_type=["p2c", "c2p"]
        ),
        trains=lambda: {"labels": LABELS},
    ),
    "vit": Architecture(
        tf.ViTForImageClassification,
        lambda: tf.ViTConfig(**TOWER, num_labels=3),
        lambda: {"pixel_values": image(2)},
        trains=lambda: {"labels": LABELS},
    ),
    "clip": Architecture(
        tf.CLIPModel,
        lambda: tf.CLIPConfig(
            text_config=COMMON | {"projection_dim": 16, "max_position_embeddings": 32},
            vision_config=TOWER | {"projection_dim": 16},
            projection_dim=16,
        ),
        lambda: {"input_ids": TOKENS, "pixel_values": image(2)},
    ),
    "siglip": Architecture(
        tf.SiglipModel,
        lambda: tf.SiglipConfig(
            text_config=COMMON | {"max_position_embeddings": 32, "projection_size": 32},
            vision_config=TOWER,
        ),
        lambda: {"input_ids": TOKENS, "pixel_values": image(2)},
    ),
    "clip-text": Architecture(
        tf.CLIPTextModel,
        lambda: tf.CLIPTextConfig(**COMMON, projection_dim=16, max_position_embeddings=32),
    ),
}  # fmt: skip
QWEN_VL_TEXT = GROUPED | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}
QWEN_VL_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 95, "vision_start_token_id": 94,
    "vision_end_token_id": 93,
}  # fmt: skip
MULTIMODAL = {
    "gemma3": Architecture(
        tf.Gemma3ForConditionalGeneration,
        lambda: tf.Gemma3Config(
            text_config=HEADS | {"layer_types": ["sliding_attention", "full_attention"]},
            vision_config=TOWER, mm_tokens_per_image=4, image_token_index=IMAGE,
            image_token_id=IMAGE, boi_token_index=95, eoi_token_index=94,
        ),
        lambda: with_parts(4, pixel_values=image(), token_type_ids=(
            with_parts(4)["input_ids"] == IMAGE).long()),
        ("model.vision_tower",),
    ),
    "qwen2.5-vl": Architecture(
        tf.Qwen2_5_VLForConditionalGeneration,
        lambda: tf.Qwen2_5_VLConfig(
            text_config=QWEN_VL_TEXT,
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                "patch_size": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1],
                "window_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 1,
            },
            **QWEN_VL_TOKENS,
        ),
        lambda: with_parts(
            4, pixel_values=patches(4, 48), image_grid_thw=torch.tensor([[1, 4, 4]])
        ),
        ("model.visual",),
    ),
    "qwen3-vl": Architecture(
        tf.Qwen3VLForConditionalGeneration,
        lambda: tf.Qwen3VLConfig(
            text_config=HEADS | {"rope_parameters": QWEN_VL_TEXT["rope_parameters"]},
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                "patch_size": 4, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
                "spatial_merge_size": 2, "temporal_patch_size": 1, "num_position_embeddings": 16,
            },
            **QWEN_VL_TOKENS,
        ),
        lambda: with_parts(
            4, pixel_values=patches(4, 48), image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(with_parts(4)["input_ids"] == IMAGE).long(),
        ),
        ("model.visual",),
    ),
    "llava": Architecture(
        tf.LlavaForConditionalGeneration,
        lambda: tf.LlavaConfig(
            text_config=tf.LlamaConfig(**GROUPED),
            vision_config=tf.CLIPVisionConfig(**TOWER),
            image_token_index=IMAGE, image_token_id=IMAGE,
        ),
        lambda: with_parts(4, pixel_values=image()),
        ("model.vision_tower",),
    ),
    "smolvlm": Architecture(
        tf.SmolVLMForConditionalGeneration,
        lambda: tf.SmolVLMConfig(
            text_config=tf.LlamaConfig(**GROUPED), vision_config=TOWER, scale_factor=2,
            image_token_id=IMAGE, pad_token_id=0,
        ),
        lambda: with_parts(1, pixel_values=image()[None]),
        ("model.vision_model",),
    ),
    "qwen2-audio": Architecture(
        tf.Qwen2AudioForConditionalGeneration,
        lambda: tf.Qwen2AudioConfig(
            text_config=tf.Qwen2Config(**GROUPED),
            audio_config={
                "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2,
                "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_source_positions": 10,
            },
            audio_token_index=IMAGE, audio_token_id=IMAGE,
        ),
        lambda: with_parts(
            5, input_features=audio(8, 20), feature_attention_mask=torch.ones(1, 20).long()
        ),
        ("model.audio_tower",),
    ),
}  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = TEXT | RECURRENT | MIXTURES | ENCODERS | MULTIMODAL
