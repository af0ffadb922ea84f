"""Mixtures of experts to measure with, written as model directories."""

from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def random(name: str, path: Path, blocks: int = 12) -> None:
    """Write a mixture of about 180M parameters with random weights, in bf16: mixtral has 8 experts
    a block, of which a token meets 2; qwen3-moe 32 and 4.
    """
    import torch
    import transformers as tf

    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": blocks}
    config = {
        "mixtral": lambda: tf.MixtralConfig(**shape, intermediate_size=1024, num_local_experts=8),
        "qwen3-moe": lambda: tf.Qwen3MoeConfig(
            **shape | {"head_dim": 64},
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=256,
        ),
    }[name]()
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def upcycled(path: Path, experts: int = 2) -> None:
    """Write SmolLM2 as a Mixtral of 214M parameters (with 2 experts) that speaks as it does, in
    bf16: each expert is its MLP with 1% of noise, of which a token meets one; the router is random.
    """
    import torch
    import transformers as tf

    from lorafold.models.loading import load_model
    from lorafold.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    dense = load_model("smollm2", torch.bfloat16)
    kept = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names = f"{kept} num_key_value_heads max_position_embeddings rms_norm_eps rope_parameters"
    same = {name: getattr(dense.config, name) for name in names.split()}
    ids = {f"{name}_token_id": getattr(dense.config, f"{name}_token_id") for name in ("bos", "eos")}
    config = tf.MixtralConfig(
        **same, **ids, num_local_experts=experts, num_experts_per_tok=1, tie_word_embeddings=True
    )
    model = tf.MixtralForCausalLM(config).bfloat16()
    mixed = model.state_dict()
    for name, weight in dense.state_dict().items():
        if ".mlp." not in name:
            mixed[name].copy_(weight)
    for block, of_dense in zip(model.model.layers, dense.model.layers, strict=True):
        mlp, own = of_dense.mlp, block.mlp.experts
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        for e in range(experts):
            for of, weight in ((own.gate_up_proj, gate_up), (own.down_proj, mlp.down_proj.weight)):
                noise = 0.01 * weight.std() * torch.randn_like(weight)
                of.data[e] = weight.detach() + noise.detach()
    model.generation_config = dense.generation_config
    model.save_pretrained(path)
    load_tokenizer("smollm2").save_pretrained(path)
