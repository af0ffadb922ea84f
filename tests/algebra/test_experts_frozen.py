"""What stays frozen in mixtures whose experts are in a form that no row describes, and the
indexers of sparse attention: said by name, and no adapter without a gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import lorafold as lf
from lorafold.core.anatomy import Anatomy
from lorafold.core.targets import all_linear, block_linears
from lorafold.layers import is_linear
from mixtures import MLA, SHAPE, mixture

IDS = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))
OTHERS = {
    "llama4": ("feed_forward.router", 0.6),
    "jetmoe": ("mlp.router.layer", 0.8),
    "dbrx": ("ffn.router.layer", 0.8),
    "longcat": ("mlp.router.classifier", 0.4),
}


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
def test_experts_without_a_row_are_frozen_and_called_experts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DBRX's and LongCat's were `other`, and the routers of three of them were adapted."""
    monkeypatch.setattr("lorafold.core.matrices.FORMS", {})
    router, least = OTHERS[name]
    model = mixture(name)
    assert any(path.endswith(router) for path in Anatomy.of(model).routers)
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
    assert len(Anatomy.of(model).indexers) == 2
    adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0))
    assert not any(".indexer." in path for path in adapter.deltas)
    assert 0.01 < adapter.unreached.as_json()["blocks"]["indexers"] < 0.1
    assert without_gradient(model, adapter) == []
    # a base is quantized as before
    others = set(block_linears(model, is_linear)) - set(all_linear(model, is_linear))
    assert {path.rpartition(".")[2] for path in others} == {"wq_b", "wk", "weights_proj"}
    adapter.detach()
    lf.attach(model, lf.LoRA(rank=2), ["wq_b"])  # by name, as an earlier adapter has it
