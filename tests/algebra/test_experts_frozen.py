"""What stays frozen in mixtures whose experts are not transformers' interface for them, and the
indexers of sparse attention: said by name, and no adapter without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import lorafold as lf
from lorafold.bases import is_linear
from lorafold.core.anatomy import indexers, routers
from lorafold.core.presets import all_linear, block_linears
from mixtures import SHAPE

IDS = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))
MLA: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "num_attention_heads": 4,
}  # fmt: skip
OTHERS: dict[str, tuple[Callable[[], Any], str, float]] = {
    "llama4": (
        lambda: tf.Llama4TextConfig(
            **SHAPE, head_dim=16, intermediate_size_mlp=128, num_local_experts=4, pad_token_id=0,
            bos_token_id=0, eos_token_id=0,
        ),
        "feed_forward.router",
        0.6,
    ),
    "jetmoe": (
        lambda: tf.JetMoeConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_key_value_heads=2, kv_channels=16, num_local_experts=4, num_experts_per_tok=2,
        ),
        "mlp.router.layer",
        0.8,
    ),
    "dbrx": (
        lambda: tf.DbrxConfig(
            d_model=64, n_heads=4, n_layers=2, vocab_size=300, max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            ffn_config={
                "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64,
            },
        ),
        "ffn.router.layer",
        0.8,
    ),
    "longcat": (
        lambda: tf.LongcatFlashConfig(
            vocab_size=300, hidden_size=64, ffn_hidden_size=96, expert_ffn_hidden_size=96,
            num_layers=2, n_routed_experts=4, zero_expert_num=2, moe_topk=2, head_dim=16,
            routed_scaling_factor=1.0, **MLA,
        ),
        "mlp.router.classifier",
        0.4,
    ),
}  # fmt: skip


def drawn(config: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.05)
    return model


def without_gradient(model: Any, adapter: lf.Adapter) -> list[str]:
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05)
    model(input_ids=IDS).logits.sin().sum().backward()
    named = adapter.named_parameters()
    return [name for name, p in named if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("name", OTHERS)
def test_experts_of_other_forms_are_called_experts(name: str) -> None:
    """DBRX's and LongCat's were `other`, and the routers of three of them were adapted."""
    make, router, least = OTHERS[name]
    model = drawn(make())
    assert any(path.endswith(router) for path in routers(model))
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0))
    assert not any(router in path for path in adapter.deltas)
    frozen = adapter.unreached.as_json()["blocks"]
    assert frozen["experts"] > least
    assert frozen.get("other", 0) < 0.002
    assert 0 < frozen["router"] < 0.01
    assert without_gradient(model, adapter) == []


def test_an_indexer_gets_no_adapter() -> None:
    """It had three, of which none ever got a gradient."""
    config = tf.DeepseekV32Config(
        **SHAPE | {"num_key_value_heads": 4} | MLA | {"qk_rope_head_dim": 8},
        moe_intermediate_size=32, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, index_n_heads=2, index_head_dim=16, index_topk=4,
    )  # fmt: skip
    model = drawn(config)
    assert len(indexers(model)) == 2
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0))
    assert not any(".indexer." in path for path in adapter.deltas)
    assert 0.01 < adapter.unreached.as_json()["blocks"]["indexers"] < 0.1
    assert without_gradient(model, adapter) == []
    # a base is quantized as before
    others = set(block_linears(model, is_linear)) - set(all_linear(model, is_linear))
    assert {path.rpartition(".")[2] for path in others} == {"wq_b", "wk", "weights_proj"}
    adapter.detach()
    lf.attach(model, lf.LoRA(rank=2), ["wq_b"])  # by name, as an earlier adapter has it
