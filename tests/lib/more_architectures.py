"""More tiny models, so that with those of `architectures.py` there is one of every family that
docs/models.md lists.

    FAMILIES["zamba2"].model()      the model, the same each time, in evaluation mode
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers as tf

from architectures import (
    ARCHITECTURES,
    COMMON,
    GPT2,
    GROUPED,
    HEADS,
    IDS,
    LABELS,
    MIXERS,
    QWEN_VL_TOKENS,
    ROUTED,
    SEQ2SEQ,
    SHAPE,
    TOKENS,
    TOWER,
    Architecture,
    audio,
    causal,
    image,
)

SHORT: dict[str, Any] = COMMON | {"max_position_embeddings": 64}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
GROUPS: dict[str, Any] = COMMON | LATENT | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
SPARSE: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
SHARED: dict[str, Any] = COMMON | {
    "num_hidden_layers": 5, "num_key_value_heads": 4, "mamba_d_state": 8,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
}  # fmt: skip
OF_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_NET: dict[str, Any] = HEADS | OF_LAYERS | {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
SEEN: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
    "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 1,
    "num_position_embeddings": 16,
}  # fmt: skip
MLLAMA_SEEN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1,
    "attention_heads": 4, "image_size": 8, "patch_size": 4, "vision_output_dim": 64,
    "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip


def classifier(config: type, fields: dict[str, Any] = SHORT, **changes: Any) -> Architecture:
    kind = tf.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[config]
    made = fields | changes | {"num_labels": 3}
    return Architecture(kind, lambda: config(**made), trains=lambda: {"labels": LABELS})


def translator(config: type, **changes: Any) -> Architecture:
    kind = tf.models.auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[config]
    return Architecture(
        kind,
        lambda: config(**IDS | changes),
        lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :7]},
        trains=lambda: {"labels": TOKENS[:, 1:8].clone()},
    )


T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 1,
}  # fmt: skip

DECODERS = {
    "gemma": causal(tf.GemmaConfig, HEADS),
    "phi": causal(tf.PhiConfig, GROUPED),
    "gpt-neo": causal(
        tf.GPTNeoConfig, COMMON, num_layers=2, num_heads=4, window_size=6,
        attention_types=[[["global", "local"], 1]],
    ),
    "gptj": causal(tf.GPTJConfig, GPT2, rotary_dim=4),
    "codegen": causal(tf.CodeGenConfig, GPT2, rotary_dim=4),
    "gpt-bigcode": causal(tf.GPTBigCodeConfig, GPT2),
    "mpt": causal(tf.MptConfig, IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "xglm": causal(
        tf.XGLMConfig, IDS, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4,
        max_position_embeddings=64,
    ),
    "biogpt": causal(tf.BioGptConfig, SHORT),
    "starcoder2": causal(tf.Starcoder2Config, GROUPED),
    "nemotron": causal(tf.NemotronConfig, GROUPED),
    "persimmon": causal(tf.PersimmonConfig, COMMON),
    "olmo": causal(tf.OlmoConfig, GROUPED),
    "glm": causal(tf.GlmConfig, HEADS),
    "glm4": causal(tf.Glm4Config, HEADS),
    "cohere2": causal(tf.Cohere2Config, GROUPED, sliding_window=6),
    "exaone4": causal(
        tf.Exaone4Config, GROUPED, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "ernie4.5": causal(tf.Ernie4_5Config, GROUPED),
    "hunyuan": causal(tf.HunYuanDenseV1Config, HEADS),
    "helium": causal(tf.HeliumConfig, HEADS),
    "seed-oss": causal(tf.SeedOssConfig, HEADS),
    "minicpm3": causal(tf.MiniCPM3Config, COMMON | LATENT, num_key_value_heads=4),
    "lfm2": causal(tf.Lfm2Config, GROUPED, layer_types=["conv", "full_attention"]),
    "rwkv": replace(
        causal(
            tf.RwkvConfig, COMMON, num_hidden_layers=5, attention_hidden_size=32, rescale_every=2,
            context_length=64,
        ),
        not_in_peft=("output", "value"),  # it divides them, and not what lies over them
        within=1e-4,  # alone it halves its hidden states, but not the epsilon of its norms
    ),
    "zamba": causal(tf.ZambaConfig, SHARED, MIXERS, n_mamba_heads=2, attention_hidden_size=64),
    "zamba2": replace(
        causal(tf.Zamba2Config, SHARED, MIXERS, n_mamba_heads=8, mamba_ngroups=1, chunk_size=8),
        idle=(r".*_adapter_list\..*", "copies of the blocks' own adapters that no block calls"),
    ),
    "falcon-mamba": causal(tf.FalconMambaConfig, COMMON, MIXERS, state_size=8, time_step_rank=4),
    "falcon-h1": causal(
        tf.FalconH1Config, HEADS, MIXERS, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4,
    ),
    "nemotron-h": causal(
        tf.NemotronHConfig, HEADS, MIXERS, num_hidden_layers=3,
        layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=8, mamba_head_dim=8,
        n_groups=1, ssm_state_size=8, chunk_size=4,
    ),
}  # fmt: skip
SPARSE_DECODERS = {
    "llama4": causal(
        tf.Llama4TextConfig, HEADS, intermediate_size_mlp=48, num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "jetmoe": causal(
        tf.JetMoeConfig, IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
    ),
    "dbrx": causal(
        tf.DbrxConfig, IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        not_in_peft=("w1", "v1", "w2"),  # 2-D parameters of all experts are one matrix there
    ),
    "longcat": causal(
        tf.LongcatFlashConfig, IDS | LATENT, hidden_size=32, ffn_hidden_size=48, num_layers=2,
        expert_ffn_hidden_size=16, num_attention_heads=4, n_routed_experts=4, zero_expert_num=2,
        moe_topk=2, head_dim=8, routed_scaling_factor=1.0,
    ),
    "deepseek-v2": causal(tf.DeepseekV2Config, GROUPS, n_shared_experts=1),
    "deepseek-v3.2": causal(tf.DeepseekV32Config, GROUPS | SPARSE, n_shared_experts=1),
    "deepseek-v4": causal(
        tf.DeepseekV4Config, HEADS | SPARSE, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, q_lora_rank=8, o_lora_rank=8, o_groups=2, sliding_window=6,
        num_key_value_heads=1,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
    "glm-moe-dsa": causal(tf.GlmMoeDsaConfig, GROUPS | SPARSE, n_shared_experts=1),
    "glm4-moe": causal(
        tf.Glm4MoeConfig, ROUTED, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "olmoe": causal(tf.OlmoeConfig, GROUPED, num_experts=4, num_experts_per_tok=2),
    "phimoe": causal(tf.PhimoeConfig, GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "granite-moe": causal(tf.GraniteMoeConfig, GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "ernie4.5-moe": causal(
        tf.Ernie4_5_MoeConfig, GROUPED, moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
        moe_num_shared_experts=1, moe_layer_start_index=1,
    ),
    "hunyuan-moe": causal(tf.HunYuanMoEV1Config, HEADS, num_experts=4, moe_topk=2),
    "minimax": causal(
        tf.MiniMaxConfig, HEADS, num_local_experts=4, num_experts_per_tok=2, block_size=4,
        **OF_LAYERS,
    ),
}  # fmt: skip
OTHERS = {
    "bert-masked": Architecture(
        tf.BertForMaskedLM, lambda: tf.BertConfig(**SHORT), trains=lambda: {"labels": TOKENS}
    ),
    "roberta-classifier": classifier(tf.RobertaConfig),
    "xlm-roberta": classifier(tf.XLMRobertaConfig),
    "electra": classifier(tf.ElectraConfig, embedding_size=32),
    "esm": classifier(tf.EsmConfig, mask_token_id=3),
    "longformer": replace(
        classifier(tf.LongformerConfig, attention_window=4),
        idle=(
            r".*layer\.1\.attention\.self\.(query|key|value)",
            "the last block's local attention, since the head reads the first token alone",
        ),
    ),
    "bigbird": classifier(tf.BigBirdConfig),
    "modernbert": classifier(tf.ModernBertConfig, sep_token_id=2, cls_token_id=1),
    "distilbert": classifier(
        tf.DistilBertConfig, IDS, dim=32, hidden_dim=48, n_layers=2, n_heads=4,
        max_position_embeddings=64,
    ),
    "albert": classifier(tf.AlbertConfig, embedding_size=16),
    "xlnet": classifier(tf.XLNetConfig, IDS, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "perceiver": Architecture(
        tf.PerceiverForMaskedLM,
        lambda: tf.PerceiverConfig(
            vocab_size=300, d_model=32, d_latents=32, num_latents=4, num_self_attends_per_block=2,
            num_blocks=1, num_self_attention_heads=4, num_cross_attention_heads=4,
            max_position_embeddings=12, qk_channels=32, v_channels=32,
        ),
        trains=lambda: {"labels": TOKENS},
    ),
    "mt5": translator(tf.MT5Config, **T5),
    "mbart": translator(tf.MBartConfig, **SEQ2SEQ),
    "pegasus": translator(tf.PegasusConfig, **SEQ2SEQ),
    "marian": translator(tf.MarianConfig, **SEQ2SEQ),
    "m2m100": translator(tf.M2M100Config, **SEQ2SEQ),
    "wav2vec2": Architecture(
        tf.Wav2Vec2ForSequenceClassification,
        lambda: tf.Wav2Vec2Config(
            **SHAPE, conv_dim=(16, 16), conv_kernel=(4, 4), conv_stride=(2, 2), num_labels=3,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=16,
        ),
        lambda: {"input_values": audio(1, 64)[0]},
        trains=lambda: {"labels": LABELS[:1]},
    ),
    "dinov2": Architecture(
        tf.Dinov2ForImageClassification,
        lambda: tf.Dinov2Config(**TOWER, num_labels=3),
        lambda: {"pixel_values": image(2)},
        trains=lambda: {"labels": LABELS},
    ),
}  # fmt: skip
TEXT_PARTS = {
    "qwen3.5": Architecture(
        tf.Qwen3_5ForConditionalGeneration,
        lambda: tf.Qwen3_5Config(text_config=DELTA_NET, vision_config=SEEN, **QWEN_VL_TOKENS),
    ),
    "qwen3.5-moe": Architecture(
        tf.Qwen3_5MoeForConditionalGeneration,
        lambda: tf.Qwen3_5MoeConfig(
            text_config=DELTA_NET | ROUTED | {"shared_expert_intermediate_size": 16},
            vision_config=SEEN, **QWEN_VL_TOKENS,
        ),
    ),
    "mllama": Architecture(
        tf.MllamaForConditionalGeneration,
        lambda: tf.MllamaConfig(
            text_config=GROUPED | {"cross_attention_layers": [1]}, vision_config=MLLAMA_SEEN
        ),
        idle=(r".*layers\.1\..*", "the blocks of cross-attention, on text alone"),
    ),
}  # fmt: skip
FAMILIES: dict[str, Architecture] = ARCHITECTURES | DECODERS | SPARSE_DECODERS | OTHERS | TEXT_PARTS
