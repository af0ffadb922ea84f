"""The reference of a model computes without what trains, by whichever way it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lorafold as lf
from method_cases import IDS, moved

WAYS: dict[str, Callable[[Any], Tensor]] = {
    "the model": lambda m: m(IDS).logits,
    "its forward": lambda m: m.forward(IDS).logits,
    "the body": lambda m: m.model(IDS).last_hidden_state,
    "the body's forward": lambda m: m.model.forward(IDS).last_hidden_state,
    "the decoder": lambda m: m.get_decoder()(IDS).last_hidden_state,
    "the base model": lambda m: m.base_model(IDS).last_hidden_state,
    "a submodule": lambda m: m.get_submodule("model")(IDS).last_hidden_state,
    "generated": lambda m: m.generate(IDS, max_new_tokens=4, do_sample=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_asking_it_has_the_policy(way: str, tiny_model) -> None:
    model, ask = tiny_model("llama"), WAYS[way]
    moved(lf.attach(model, lf.LoRA(rank=4, dropout=0.5), name="below")).requires_grad_(False)
    moved(lf.attach(model, lf.LoRA(rank=4, dropout=0.5), name="trains"), 0.5)
    reference = lf.reference(model)
    with torch.no_grad(), lf.only(model, "below"):
        expected = ask(model.eval())
    with torch.no_grad():
        assert not torch.equal(ask(model), expected)
    found = ask(reference.train())
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_what_is_set_on_it_stays_the_model_s(tiny_model) -> None:
    model = tiny_model("llama")
    moved(lf.attach(model, lf.LoRA(rank=4), name="trains"))
    reference, head = lf.reference(model), model.lm_head
    assert reference.config is model.config
    assert reference.model is reference.model
    reference.lm_head = reference.lm_head.float()  # as a trainer casts it
    assert model.lm_head is head
    assert model(IDS).logits.requires_grad
