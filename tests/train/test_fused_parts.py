"""Parts of a model that fusing leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lorafold as lf
from fused_cases import adapted, assert_same_step, model_of, seeded_step, together
from lorafold.methods import make_spec
from lorafold.training_step.fused_modules import ROTARY, fused
from lorafold.training_step.packed_attention import packed
from sequence_cases import GROUPED, VOCAB, loss_and_gradients


def test_a_norm_that_is_trained() -> None:
    norms = {"modules_to_save": ["input_layernorm", "post_attention_layernorm"]}
    for options in ({"spec": lf.Full()}, {"spec": lf.LoRA(rank=4), **norms}):
        model = model_of("llama")
        adapted(model, **options)
        with packed(model):
            expected = seeded_step(model, together())
            with fused(model) as found:
                assert (found.fast, found.plain) == (0, ("norms",))
                assert_same_step(seeded_step(model, together()), expected)
        assert any("layernorm" in name for name in expected[1])


def test_a_weight_that_is_trained_without_an_adapter() -> None:
    model = model_of("llama").requires_grad_(False)
    model.model.layers[0].input_layernorm.requires_grad_(True)
    expected = loss_and_gradients(model, together())
    with fused(model):
        assert "forward" not in vars(model.model.layers[0].input_layernorm)
        assert "forward" in vars(model.model.layers[1].input_layernorm)
        assert_same_step(loss_and_gradients(model, together()), expected)


@pytest.mark.parametrize("word", ["houlsby", "pfeiffer"])
def test_a_module_that_carries_a_delta(word: str) -> None:
    """A bottleneck lies over the whole MLP: its delta must run."""
    model = model_of("llama")
    adapted(model, make_spec(word))
    with packed(model):
        expected = seeded_step(model, together())
        with fused(model) as found:
            lacking = ("MLP",) if word == "pfeiffer" else ("MLP", "rotary embedding")
            assert (found.fast, found.plain) == (0, lacking)
            assert_same_step(seeded_step(model, together()), expected)


def test_another_model_of_the_same_family_is_left_alone() -> None:
    ours, other = (model_of("llama").requires_grad_(False) for _ in range(2))
    plain = modeling_llama.apply_rotary_pos_emb
    with fused(ours) as found:
        assert found.plain == ()
        assert modeling_llama.apply_rotary_pos_emb is plain
        assert not any("forward" in vars(module) for module in other.modules())
    assert not any("forward" in vars(module) for module in ours.modules())


class Shifted(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.01


class Gated(LlamaRMSNorm):
    """As Mamba's: with a second input, which may be missing."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class Needy(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(hidden_states) * gate.sigmoid()


class Called(nn.Module):
    """Gives the norm its second input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm(hidden_states, hidden_states)


@pytest.mark.parametrize("kind", [Shifted, Gated, Needy])
def test_a_norm_that_is_another(kind: type[LlamaRMSNorm]) -> None:
    model = model_of("llama")
    plain = model.model.layers[1].input_layernorm
    norm = kind(len(plain.weight), 1e-5)
    norm.load_state_dict(plain.state_dict())
    model.model.layers[1].input_layernorm = norm if kind is Shifted else Called(norm)
    adapted(model)
    expected = seeded_step(model, together())
    with fused(model):
        assert "forward" not in vars(norm)
        assert "forward" in vars(model.model.layers[1].post_attention_layernorm)
        assert_same_step(seeded_step(model, together()), expected)


def test_a_forward_that_someone_else_put_there() -> None:
    """It answers as the module does, and does more."""
    model = model_of("llama").requires_grad_(False)
    norm, seen = model.model.layers[0].input_layernorm, []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return LlamaRMSNorm.forward(norm, x)

    norm.forward = watched
    with fused(model):
        assert norm.forward is watched
    assert norm.forward is watched
    assert seen == []


def test_a_delta_that_changes_nothing_yet() -> None:
    """At the start a norm trained whole, and a bottleneck, answer as what they lie over."""
    model = model_of("llama")
    lf.attach(model, make_spec("houlsby"), modules_to_save=["input_layernorm"])
    with fused(model) as found:
        assert (found.fast, found.plain) == (0, ("MLP", "rotary embedding"))
        for layer in model.model.layers:
            assert not {"forward"} & (vars(layer.mlp).keys() | vars(layer.input_layernorm).keys())
        loss_and_gradients(model, together())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(model.get_parameter(name).grad is not None for name in trained)


class PartlyGated(nn.Module):
    """The names of a gated MLP, and another function."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            setattr(self, name, getattr(mlp, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (1 + self.up_proj(x)))


@pytest.mark.parametrize("change", ["function", "activation"])
def test_an_mlp_that_is_another(change: str) -> None:
    model = model_of("llama")
    for layer in model.model.layers:
        if change == "function":
            layer.mlp = PartlyGated(layer.mlp)
        else:
            layer.mlp.act_fn = nn.ReLU()
    adapted(model)
    with fused(model) as found:
        assert (found.fast, found.plain) == (0, ("MLP",))


def test_a_rotary_embedding_of_a_part_of_each_head() -> None:
    """Phi3 turns the first half of each head and passes the rest: its own function does that."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = model_of("phi3", rope_parameters=rope)
    adapted(model)
    expected = seeded_step(model, together())
    with fused(model):
        assert_same_step(seeded_step(model, together()), expected)


def test_a_rotary_embedding_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        q, k = (torch.stack(x.chunk(2, -1), -1).flatten(-2) for x in (q, k))
        return plain(q, k, cos, sin, unsqueeze_dim)

    plain = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, ROTARY, interleaved)
    with fused(model_of("llama").requires_grad_(False)) as found:
        assert (found.fast, found.plain) == (0, ("rotary embedding",))
        assert modeling_llama.apply_rotary_pos_emb is interleaved


def test_a_mixture_of_experts_is_itself() -> None:
    model = model_of("qwen3-moe")
    adapted(model)
    expected = seeded_step(model, together())
    with fused(model) as found:
        assert found.plain == ()
        assert_same_step(seeded_step(model, together()), expected)


def test_a_linear_attention_whose_norm_takes_a_gate_is_itself() -> None:
    size = GROUPED | {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    size |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    layers = {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]}
    config = tf.Qwen3NextConfig(**size, **layers, num_experts=0, initializer_range=0.2)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids, use_cache=False).logits
    model.requires_grad_(False)
    with fused(model):
        found = model(input_ids=ids, use_cache=False).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
