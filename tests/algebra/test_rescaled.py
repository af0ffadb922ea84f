"""RWKV divides weights in place for inference; a delta over them is not divided."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import lorafold as lf
from lorafold.errors import LorafoldError
from lorafold.models.loading import load_model
from noise import moved

IDS = torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(0))


def rwkv() -> Any:
    """Five blocks, of which the last is divided by four."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.RwkvForCausalLM(
            tf.RwkvConfig(
                vocab_size=300, hidden_size=32, attention_hidden_size=32, intermediate_size=48,
                num_hidden_layers=5, rescale_every=2, context_length=32,
            )
        )  # fmt: skip
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def adapted(model: Any) -> lf.Adapter:
    return moved(lf.attach(model, lf.LoRA(rank=2, dropout=0.0)))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
def test_training_and_inference_compute_the_same(ran: bool) -> None:
    """0.13 apart before."""
    model = rwkv()
    alone = logits(rwkv().train())
    if ran:
        logits(model)
    adapter = adapted(model)
    y = logits(model)
    assert gap(logits(model.train()), y) < 1e-6
    assert gap(logits(model.eval()), y) < 1e-6
    with lf.only(model):
        assert gap(logits(model), alone) < 1e-6
    adapter.merge()
    assert gap(logits(model), y) < 1e-5


def test_an_adapter_is_loaded_after_a_forward(tmp_path: Path) -> None:
    """Its fingerprint is that of the weights in the files."""
    model = rwkv()
    model.save_pretrained(tmp_path / "base")
    adapted(model).save(tmp_path / "adapter")
    for again in (load_model(tmp_path / "base", torch.float32), rwkv()):
        logits(again)
        lf.load(again, tmp_path / "adapter")
        assert gap(logits(again), logits(model)) < 1e-6


def test_quantized_weights_that_were_divided_are_refused() -> None:
    model = rwkv()
    logits(model)
    model.rwkv.blocks[0].attention.output.weight.SCB = torch.ones(32)
    with pytest.raises(LorafoldError, match="has rescaled the quantized weights; load the model"):
        lf.attach(model, lf.LoRA(rank=2))


def test_what_a_model_names_as_its_embedding_may_be_no_module(tmp_path: Path) -> None:
    """Perceiver names its latents, a parameter."""
    config = tf.PerceiverConfig(
        num_latents=4, d_latents=32, d_model=32, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2, qk_channels=32, v_channels=32,
        vocab_size=300, max_position_embeddings=24,
    )  # fmt: skip
    model = tf.PerceiverForMaskedLM(config).eval()
    again = tf.PerceiverForMaskedLM(config).eval()
    again.load_state_dict(model.state_dict())
    ids = torch.randint(5, 250, (1, 24))
    with torch.no_grad():
        adapted(model).save(tmp_path / "adapter")
        lf.load(again, tmp_path / "adapter")
        assert torch.equal(again(inputs=ids).logits, model(inputs=ids).logits)
