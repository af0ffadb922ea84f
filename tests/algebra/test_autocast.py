"""torch.autocast over an fp32 base: layers, models, experts, the fused parts, and PEFT beside."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorafold as lf
from laws import BASES, CASES, adapted, move, to
from lorafold.layers import layer_of
from lorafold.methods import METHODS
from lorafold.training_step.fused_modules import fused
from method_cases import IDS, attached, moved, spec_of
from mixtures import CONFIGS

UNIT = torch.finfo(torch.bfloat16).eps


def bf16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def off(found: Tensor, expected: Tensor) -> float:
    """The distance relative to what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.few(24)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "base"), CASES)
def test_a_layer_is_as_exact_as_the_plain_module(method, base, stored) -> None:
    root, x, adapter = adapted(method, base, stored)
    move(adapter)
    x = x.float() if x.is_floating_point() else x
    exact = to(copy.deepcopy(root), torch.float64)
    with torch.no_grad():
        y = exact(x.double() if x.is_floating_point() else x)
        with bf16():
            ours = root(x)
            plain = BASES[base][0]() if layer_of(root[0]).quantized is False else nn.Linear(16, 32)
            like = plain.to(stored)(x)
    assert ours.dtype is like.dtype
    allowed = 1e-6 if ours.dtype is torch.float32 else 2 * UNIT
    assert off(ours, y) <= allowed


@pytest.mark.few(24)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("inside", [False, True], ids=["backward-after", "backward-inside"])
@pytest.mark.parametrize(("method", "base"), CASES)
def test_a_layer_has_the_gradients_of_fp32(method: str, base: str, inside: bool) -> None:
    root, x, adapter = adapted(method, base)
    move(adapter)
    if x.is_floating_point():
        x.requires_grad_()
    found: list[list[Tensor]] = []
    for enabled in (True, False):
        with bf16(enabled):
            loss = root(x).float().sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        leaves = [*adapter.parameters(), *([x] if x.is_floating_point() else [])]
        assert all(p.grad.dtype is torch.float32 for p in leaves)
        found.append([p.grad for p in leaves])
        for p in leaves:
            p.grad = None
    for ours, expected in zip(*found, strict=True):
        assert off(ours, expected) < 16 * UNIT


def with_and_without(model: nn.Module, adapter: lf.Adapter, ids: Tensor) -> Iterator[Any]:
    """The loss and the gradients of a step under autocast, and of one in fp32."""
    for enabled in (True, False):
        with bf16(enabled):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = [p.grad.flatten() for p in adapter.parameters() if p.grad is not None]
        yield float(loss.detach()), torch.cat(grads)
        model.zero_grad()


@pytest.mark.few(10)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear-probe"])
def test_a_model_trains_as_in_fp32(method: str, checkpointing: bool, tiny_model) -> None:
    model = tiny_model("llama").train()
    adapter = moved(attached(model, method))
    if checkpointing:
        model.gradient_checkpointing_enable()
    (ours, g), (expected, e) = with_and_without(model, adapter, IDS)
    assert ours == pytest.approx(expected, rel=1e-2)
    assert off(g, e) < 0.05


def test_the_bare_base_is_the_plain_model(tiny_model) -> None:
    model = tiny_model("llama")
    with torch.no_grad(), bf16():
        plain = model(IDS).logits
        moved(attached(model, "lora"))
        with lf.only(model):
            assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "loha", "lokr", "vera", "bitfit"])
def test_fused_parts_and_adapters_agree(method: str, tiny_model) -> None:
    """`fused` around a trainer: its linears are as autocast makes them too."""
    model = tiny_model("qwen2").train()
    adapter = moved(attached(model, method))
    found = []
    for parts in (fused(model), nullcontext()):
        with bf16(), parts:
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in adapter.parameters()]))
        model.zero_grad()
    assert off(*found) < 0.05


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "loha", "lokr", "vera"])
def test_peft_s_model_computes_the_same(method: str, tiny_model, tiny_model_dir, tmp_path) -> None:
    model = tiny_model("llama")
    moved(attached(model, method)).save(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    found = []
    for each in (model, theirs, theirs):
        x = tiny_model("llama").get_input_embeddings()(IDS).detach().requires_grad_()
        with bf16(len(found) < 2):  # the last in fp32
            logits = each(inputs_embeds=x).logits
        logits.float().sin().sum().backward()
        found.append((logits.detach(), x.grad))
    ours, peft, exact = found
    assert ours[0].dtype is peft[0].dtype
    for mine, his, right in zip(ours, peft, exact, strict=True):
        assert off(mine, right) <= 1.5 * off(his, right) + UNIT


def test_layers_that_share_an_input_share_its_cast_and_its_dropout(tiny_model) -> None:
    model = tiny_model("llama").train()
    lf.attach(model, lf.LoRA(rank=2, dropout=0.5), ["q_proj", "k_proj"])
    layer = model.model.layers[0].self_attn
    x = torch.randn(2, 5, 32, requires_grad=True) * 1.0
    with bf16():
        layer.q_proj(x)
        layer.k_proj(x)
    ((_, cast),) = vars(x)["_lorafold_once"].values()
    assert cast.dtype is torch.bfloat16
    (drawn,) = vars(cast)["_lorafold_dropped"].values()
    assert drawn.readers == {id(layer.q_proj), id(layer.k_proj)}


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_experts(method: str, family: str) -> None:
    # every token meets every expert: which ones it is sent to may turn on a rounding
    model = AutoModelForCausalLM.from_config(CONFIGS[family](num_experts_per_tok=4)).train()
    ids = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    adapter = moved(lf.attach(model, spec_of(method), ["experts.gate_up_proj"]))
    (_, ours), (_, expected) = with_and_without(model, adapter, ids)
    assert off(ours, expected) < 0.1
